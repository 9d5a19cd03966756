"""Classify events by name, and parse the fields in their text."""
