"""``tdxtrace convert``: traces into a folder that every command opens at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tdxtrace.cli.groups import spread
from tdxtrace.cli.inputs import Reading


@spread
def convert_command(
    reading: Reading,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to make.", show_default=False),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that convert made.")
    ] = False,
) -> None:
    """Read traces once and keep their tables (Parquet): name the folder in place of a trace.

    Example: tdxtrace convert trace.dat -o run1; tdxtrace analyze run1
    """
    reading.convert(output, force)
    if not reading.quiet:
        print(f"tdxtrace: wrote {output}", file=sys.stderr)
