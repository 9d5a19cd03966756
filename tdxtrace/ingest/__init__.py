"""From bytes to event tables: one module per format, one decoder, one front door."""
