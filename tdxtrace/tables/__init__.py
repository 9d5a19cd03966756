"""Declarations of all tables, the containers Trace and Findings, and their store on disk."""
