"""What tools on the host record of a run: events, losses, and one writer per format."""
