"""``tdxtrace compare BEFORE AFTER``: did a patch, or a new module, change anything?"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tdxtrace.cli import options
from tdxtrace.cli.report import ReportFormat


def compare_command(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="A trace, or a folder.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The other.")],
    leaf: options.Leaves = [],  # noqa: B006 - typer reads, nobody writes it
    output: options.Output = None,
    form: Annotated[
        ReportFormat | None,
        typer.Option("--format", help="Default: by the name of --output, else md."),
    ] = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare two traces: which differences in retries does the data support?

    Example: tdxtrace compare before.txt after.txt --leaf TDH.MEM.PAGE.AUG
    """
    from tdxtrace.analysis.selection import Selection
    from tdxtrace.cli import outputs
    from tdxtrace.ingest.read import read_trace
    from tdxtrace.pipeline import analyze, compare
    from tdxtrace.report import comparison, written

    shape = form.value if form is not None else written.format_of(output)
    chosen = Selection(leaves=tuple(leaf))
    old, new = (analyze(read_trace(path), chosen) for path in (before, after))
    rows = compare(old, new)
    data = written.comparison(
        comparison.title(old, new), comparison.sections(old, new, rows), shape, rows
    )
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    outputs.write_file(output, data, force=force, inputs=(before, after))
    if not quiet:
        print(f"tdxtrace: wrote {output}", file=sys.stderr)
