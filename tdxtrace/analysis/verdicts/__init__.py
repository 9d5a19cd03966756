"""Verdicts on groups of findings, each with the rule that decided it."""
