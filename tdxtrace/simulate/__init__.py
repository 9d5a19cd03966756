"""A TDX host in a scenario and a seed: what the tools would have recorded, and the truth."""
