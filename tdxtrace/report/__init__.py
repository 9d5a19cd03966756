"""From findings to something to look at."""
