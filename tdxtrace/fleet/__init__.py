"""Retry limits of a fleet of hosts: counts of many traces, computed in parallel and summed."""
