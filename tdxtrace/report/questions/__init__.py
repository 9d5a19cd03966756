"""Questions: each module answers one, from findings to a section of the report."""
