"""``python -m tdxtrace``."""

from tdxtrace.cli import main

main()
