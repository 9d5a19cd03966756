"""The command line: each command is one call of the library, its output and an exit status."""

from __future__ import annotations

from tdxtrace.cli.main import main

__all__ = ["main"]
