"""Live statistics of a running trace, in bounded memory."""
