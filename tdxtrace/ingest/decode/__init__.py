"""From raw events of any format to the event tables."""
