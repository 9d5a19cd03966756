"""Loops of analysis that :mod:`tdxtrace.compiler` runs, each a rule over calls in order."""
