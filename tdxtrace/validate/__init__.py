"""Scores of every analysis against simulated truth."""
