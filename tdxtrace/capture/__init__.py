"""Capture: checks of what a host can trace, recipes for it, and the recorder."""
