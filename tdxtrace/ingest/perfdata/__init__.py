"""perf.data: what perf record writes to a file or a pipe."""
