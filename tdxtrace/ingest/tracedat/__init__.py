"""The kernel's ring buffer: pages as trace-cmd and tracefs keep them."""
