"""Parts that trace.dat and perf.data share: event formats, fields of records."""
