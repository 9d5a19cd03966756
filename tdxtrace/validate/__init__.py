"""Whether the analyses are right: simulated captures, scored against the truth."""
