"""Commands that write files: analyze, report, compare, convert, export, notebook."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdxtrace.cli import options
from tdxtrace.cli.option_groups import expand_option_groups
from tdxtrace.cli.options import ReportFormat, format_of
from tdxtrace.cli.progress import Steps, reading, working
from tdxtrace.cli.query_options import PrintOptions, QueryOptions, ReadArguments
from tdxtrace.errors import QueryError

if TYPE_CHECKING:
    from tdxtrace.analysis.thresholds import FailRule
    from tdxtrace.tables.trace import Findings


@expand_option_groups
def analyze_command(
    query: QueryOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write every table (Parquet) and findings.json."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
    limit: options.Limit = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="Problems, totals, losses; no tables.")
    ] = False,
    fail_on: options.FailOn = [],  # noqa: B006 - never modified
) -> None:
    """Read traces and report problems, retries and losses.

    The word log before TRACE is optional.

    Example: tdxtrace analyze log trace.txt --fail-on 'max-attempts>16'
    """
    from tdxtrace.cli.histogram import histogram_of, show_histogram

    rules = _rules(fail_on)
    query = replace(query, traces=_traces(query.traces))
    if (counted := histogram_of(query)) is not None:
        if output is not None or as_json or rules:
            raise QueryError("for a histogram analyze prints only text; attempts has --format")
        show_histogram(counted, query, PrintOptions())
        return
    findings = query.analyze()
    _write(findings, output, as_json, limit, brief, query)
    if rules:
        from tdxtrace.analysis.thresholds import check_findings

        exceeded = check_findings(findings, rules)
        for line in exceeded:
            print(f"tdxtrace: {line}", file=sys.stderr)
        if exceeded:
            raise typer.Exit(3)


def _rules(texts: list[str]) -> list[FailRule]:
    if not texts:
        return []
    from tdxtrace.analysis.thresholds import parse_rule

    return [parse_rule(text) for text in texts]


def _traces(words: list[str]) -> list[str]:
    """Return the traces without a leading word ``log``, unless a file has that name."""
    is_word = words[0] == "log" and len(words) > 1 and not Path("log").exists()
    return words[1:] if is_word else words


def _write(
    findings: Findings,
    output: Path | None,
    as_json: bool,
    limit: int | None,
    brief: bool,
    query: QueryOptions,
) -> None:
    from tdxtrace.cli import screen

    if output is not None:
        from tdxtrace.cli import outputs
        from tdxtrace.report.json_data import findings_data

        outputs.write_folder(output, findings.tables(), findings_data(findings), query.inputs)
    if as_json:
        from tdxtrace.report.json_data import findings_data

        typer.echo(screen.json_text(findings_data(findings)), nl=False)
    elif not query.quiet:
        from tdxtrace.report.findings_text import findings_text

        height = shutil.get_terminal_size(fallback=(80, 24)).lines
        lines = height if screen.is_terminal() else None
        shown = findings_text(findings, lines, limit, brief=brief)
        screen.print_screen(shown, query.coloring)


@expand_option_groups
def report_command(
    query: QueryOptions,
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
    brief: Annotated[
        bool, typer.Option("--brief", help="Markdown of at most 40 lines, for a mail to a list.")
    ] = False,
    force: options.Force = False,
) -> None:
    """Write a report: one HTML file that works offline, Markdown for a mail, or JSON.

    Example: tdxtrace report trace.txt -o report.html
    """
    from tdxtrace.cli import outputs
    from tdxtrace.report import render
    from tdxtrace.report.origin import origin

    chosen = "brief" if brief else (form or format_of(output)).value
    findings = query.analyze()
    made = origin(shlex.join(["tdxtrace", *sys.argv[1:]]), query.traces)
    with working(query.quiet, lambda: f"writing the report as {chosen}"):
        data = render.report(findings, chosen, made)
    for folder, kind in ((png, "png"), (svg, "svg")):
        if folder is not None:
            with working(query.quiet, lambda: "drawing the charts"):
                n = render.save_charts(findings, folder, kind, force, query.inputs)
            query.notify(f"wrote {n} charts into {folder}")
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        outputs.write_file(output, data, force=force, inputs=query.inputs)
        query.notify(f"wrote {output}")


def compare_command(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="A trace, or a folder.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The other.")],
    leaf: options.Leaves = [],  # noqa: B006 - never modified
    output: options.Output = None,
    form: Annotated[
        ReportFormat | None,
        typer.Option("--format", help="Default: by the name of --output, else md."),
    ] = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare two traces: print the differences in retries that the data support.

    Example: tdxtrace compare before.txt after.txt --leaf TDH.MEM.PAGE.AUG
    """
    from tdxtrace.analysis.selection import Selection
    from tdxtrace.cli import outputs
    from tdxtrace.ingest.read import read_trace
    from tdxtrace.pipeline import analyze, compare
    from tdxtrace.report import comparison, render

    shape = form or format_of(output)
    selection = Selection(leaves=tuple(leaf))
    step = Steps(quiet).step
    with reading(quiet) as report:
        traces = [read_trace(path, progress=report) for path in (before, after)]
    old, new = (analyze(trace, selection, step=step) for trace in traces)
    with working(quiet, lambda: "comparing"):
        rows = compare(old, new)
        data = render.comparison(
            comparison.title(old, new), comparison.sections(old, new, rows), shape.value, rows
        )
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    outputs.write_file(output, data, force=force, inputs=(before, after))
    if not quiet:
        print(f"tdxtrace: wrote {output}", file=sys.stderr)


@expand_option_groups
def convert_command(
    reading: ReadArguments,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to make.", show_default=False),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing folder of convert.")
    ] = False,
    since: options.Since = None,
    until: options.Until = None,
) -> None:
    """Read traces and store their tables (Parquet) in a folder that replaces the traces.

    Example: tdxtrace convert trace.dat -o run1; tdxtrace analyze run1
    """
    if since is None and until is None:
        reading.convert(output, force)
    else:
        from tdxtrace.analysis.selection import Selection
        from tdxtrace.tables.files import refuse_overwriting
        from tdxtrace.tables.part import write_part

        refuse_overwriting(output, reading.inputs)
        trace = reading.read()
        since_ns, until_ns = Selection(since=since, until=until).times(trace)
        write_part(trace, output, since_ns, until_ns, force=force)
    if not reading.quiet:
        print(f"tdxtrace: wrote {output}", file=sys.stderr)


@expand_option_groups
def export_command(
    query: QueryOptions,
    perfetto: Annotated[
        Path,
        typer.Option(
            *("--perfetto", "-o"),
            metavar="FILE",
            help="Trace for ui.perfetto.dev.",
            show_default=False,
        ),
    ],
    force: options.Force = False,
) -> None:
    """Write a trace for Perfetto: SEAMCALLs by thread, retries as flows, zero-step, losses.

    Example: tdxtrace export trace.txt --perfetto out.pftrace --since +1 --until +2
    """
    from tdxtrace.pipeline import analyze
    from tdxtrace.report.perfetto import write_perfetto
    from tdxtrace.tables.files import atomic_file

    trace, chosen = query.read(), query.selection
    findings = analyze(trace, chosen, step=Steps(query.quiet, query.verbose).step)
    with (
        working(query.quiet, lambda: "writing packets"),
        atomic_file(perfetto, force=force, inputs=query.inputs) as file,
    ):
        n = write_perfetto(chosen.filter_trace(trace), findings, file)
    if not query.quiet:
        print(f"tdxtrace: wrote {n:,} packets; open them at ui.perfetto.dev", file=sys.stderr)


def notebook_command(
    trace: Annotated[
        str | None,
        typer.Argument(metavar="TRACE", help="Trace to open; default: simulate one."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Output file.")
    ] = Path("tdxtrace.ipynb"),
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a Jupyter notebook that opens a trace, draws charts, queries it and replays a policy.

    Example: tdxtrace notebook trace.txt -o look.ipynb; jupyter lab look.ipynb
    """
    from tdxtrace.cli.outputs import write_file
    from tdxtrace.report.notebook import notebook

    write_file(output, notebook(trace).encode(), force=force, inputs=[trace])
    if not quiet:
        print(f"tdxtrace: wrote {output}; open it with: jupyter lab {output}", file=sys.stderr)
