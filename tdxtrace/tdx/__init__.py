"""The vocabulary of TDX: leaves, status words, operands, locks, exit reasons, wrappers."""
