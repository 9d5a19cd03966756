"""Lines of ftrace, trace-cmd and perf text: one by one, and many at once."""
