"""The command line: words become one library call, text and an exit status."""

from __future__ import annotations

from tdxtrace.cli.main import main

__all__ = ["main"]
