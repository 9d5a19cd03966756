"""Which events there are, and what their fields mean."""
