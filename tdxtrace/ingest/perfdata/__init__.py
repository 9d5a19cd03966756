"""Reader of perf.data, the output of perf record to a file or a pipe."""
