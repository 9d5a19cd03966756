"""Verdicts: whose fault it is, per group of findings, by which rule."""
