"""``tdxtrace export TRACE --perfetto FILE``: for the programs of others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tdxtrace.cli import options
from tdxtrace.cli.groups import spread
from tdxtrace.cli.inputs import Request


@spread
def export_command(
    request: Request,
    perfetto: Annotated[
        Path,
        typer.Option(
            "--perfetto", metavar="FILE", help="Trace for ui.perfetto.dev.", show_default=False
        ),
    ],
    force: options.Force = False,
) -> None:
    """Write a trace for Perfetto: SEAMCALLs by thread, retries as flows, zero-step, losses.

    Example: tdxtrace export trace.txt --perfetto out.pftrace --since +1 --until +2
    """
    from tdxtrace.pipeline import analyze
    from tdxtrace.report.perfetto import write_perfetto
    from tdxtrace.tables.files import whole_file

    trace, chosen = request.read(), request.selection
    findings = analyze(trace, chosen)
    with whole_file(perfetto, force=force, inputs=request.inputs) as file:
        n = write_perfetto(chosen.filter_trace(trace), findings, file)
    if not request.quiet:
        print(f"tdxtrace: wrote {n:,} packets; open them at ui.perfetto.dev", file=sys.stderr)
