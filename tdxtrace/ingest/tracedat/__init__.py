"""Readers of the kernel's ring-buffer pages: trace.dat of trace-cmd, and tracefs' raw pages."""
