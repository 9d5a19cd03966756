"""The TDX module: its locks, its Secure EPT, its TDs, and the effects of each leaf."""
