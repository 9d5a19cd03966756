"""Readers of text traces from ftrace, trace-cmd, perf and bpftrace."""
