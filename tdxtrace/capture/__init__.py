"""Capture: what a host lets be traced, the recipe that does it, and the recorder."""
