"""``tdxtrace report TRACE... -o report.html``: what people attach to a mail."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tdxtrace.cli import options
from tdxtrace.cli.groups import spread
from tdxtrace.cli.inputs import Request


class ReportFormat(StrEnum):
    """What a report is written as."""

    html = "html"
    md = "md"
    json = "json"


@spread
def report_command(
    request: Request,
    output: options.Output = None,
    form: Annotated[
        ReportFormat | None,
        typer.Option("--format", help="Default: by the name of --output, else md."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="DIR", help="Save each chart there as PNG.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="DIR", help="Save each chart there as SVG.")
    ] = None,
    force: options.Force = False,
) -> None:
    """Write a report: one HTML file that works offline, Markdown for a mail, or JSON.

    Example: tdxtrace report trace.txt -o report.html
    """
    from tdxtrace.cli import outputs
    from tdxtrace.report import written

    shape = form or ReportFormat(written.format_of(output))
    findings = request.analyze()
    data = written.report(findings, shape.value)
    for folder, kind in ((png, "png"), (svg, "svg")):
        if folder is not None:
            n = written.save_charts(findings, folder, kind, force, request.inputs)
            request.say(f"wrote {n} charts into {folder}")
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        outputs.write_file(output, data, force=force, inputs=request.inputs)
        request.say(f"wrote {output}")
