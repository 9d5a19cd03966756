"""From bytes to event tables: input formats, a reader of each, one decoder."""
