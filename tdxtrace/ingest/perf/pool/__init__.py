"""Samples of a large perf.data that wait for their turn."""
