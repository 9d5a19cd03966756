"""Rules of reading, each a plain loop over arrays: interpreted, or compiled (compiler.py)."""
