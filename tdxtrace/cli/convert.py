"""``tdxtrace convert``: traces into a folder that every command opens at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tdxtrace.cli import options


def convert_command(
    traces: options.Traces,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to make.", show_default=False),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that convert made.")
    ] = False,
    input_format: options.InputFormat = None,
    mappings: options.Mappings = [],  # noqa: B006 - typer reads, nobody writes it
    level_base: options.LevelBase = None,
    formats: options.Formats = None,
    quiet: options.Quiet = False,
) -> None:
    """Read traces once and keep their tables (Parquet): name the folder in place of a trace.

    Example: tdxtrace convert trace.dat -o run1; tdxtrace analyze run1
    """
    from tdxtrace.cli.inputs import Request
    from tdxtrace.tables.store import make_room

    make_room(output, force)
    request = Request(
        traces,
        input_format=input_format,
        mappings=mappings,
        level_base=level_base,
        formats=formats,
        quiet=quiet,
    )
    request.convert(output)
    if not quiet:
        print(f"tdxtrace: wrote {output}", file=sys.stderr)
