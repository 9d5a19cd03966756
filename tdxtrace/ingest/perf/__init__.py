"""The records of perf.data."""
