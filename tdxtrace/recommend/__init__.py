"""Replay of retry policies, and recommended limits with their uncertainty."""
