"""Analyses that compute findings from events: one module per table, with the table's name."""
