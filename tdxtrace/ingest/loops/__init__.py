"""Decoding rules as plain loops over arrays, interpreted or compiled (see compiler.py)."""
