"""Facts of many traces, counted one by one and added: the limits of a fleet of hosts."""
