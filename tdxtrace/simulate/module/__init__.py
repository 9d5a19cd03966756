"""The TDX module: its locks, its Secure EPT, its TDs, and what each leaf does."""
