"""What trace.dat and perf.data have in common: formats of events, numbers at places."""
