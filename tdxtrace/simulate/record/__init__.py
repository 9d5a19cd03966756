"""Recordings of a run by tools on the host: events, losses, and one writer per format."""
