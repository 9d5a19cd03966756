"""``tdxtrace notebook [TRACE]``: a notebook to start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tdxtrace.cli import options


def notebook_command(
    trace: Annotated[
        str | None,
        typer.Argument(metavar="TRACE", help="What it opens; else it simulates a trace."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")
    ] = Path("tdxtrace.ipynb"),
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a Jupyter notebook that opens a trace, draws it, asks it and changes a policy.

    Example: tdxtrace notebook trace.txt -o look.ipynb; jupyter lab look.ipynb
    """
    from tdxtrace.cli.outputs import write_file
    from tdxtrace.report.notebook import notebook

    write_file(output, notebook(trace).encode(), force=force, inputs=[trace])
    if not quiet:
        print(f"tdxtrace: wrote {output}; open it with: jupyter lab {output}", file=sys.stderr)
