"""Decode raw events of any input format into the event tables."""
