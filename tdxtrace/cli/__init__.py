"""The command line: each command calls the library, prints the result and sets an exit status."""

from __future__ import annotations

from tdxtrace.cli.main import main

__all__ = ["main"]
