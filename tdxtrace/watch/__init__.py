"""Watch: what goes on now, in memory that does not grow, however long it goes on."""
