"""Code shared by the trace.dat and perf.data readers: event formats, fields of records."""
