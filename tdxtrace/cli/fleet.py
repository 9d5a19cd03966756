"""``tdxtrace fleet``: facts of many traces, and the limits, report and comparison of a fleet."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tdxtrace.cli import options
from tdxtrace.cli.help import Command
from tdxtrace.cli.options import OutputFormat, ReportFormat
from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tdxtrace.fleet.mapping import MapSummary
    from tdxtrace.fleet.merge import Facts
    from tdxtrace.recommend.target import Target

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Count the requests of many traces, and compute limits over all hosts.",
)
FactsUrl = Annotated[
    str, typer.Argument(metavar="FACTS", help="Folder or s3:// URL that fleet map wrote to.")
]
Where = Annotated[
    str | None,
    typer.Option(
        "--where", metavar="SQL", help="Only these traces: \"kernel = '7.2' and generation = 'C'\"."
    ),
]
TargetShare = Annotated[
    float, typer.Option("--target", metavar="P", help="Largest share that may need more.")
]
Confidence = Annotated[
    float, typer.Option("--confidence", metavar="C", help="One-sided confidence of that.")
]
_LATEST_SHOWN: Final = 5


@app.command("map", cls=Command)
def map_command(
    traces: Annotated[
        list[str], typer.Argument(metavar="TRACE", help="Files, folders, globs, s3:// URLs.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="URL", help="Output, folder or URL.", show_default=False)
    ],
    identify: Annotated[
        str | None,
        typer.Option(
            "--identify",
            metavar="FORM",
            help="End of a trace's path with host and date in braces, such as HOST/DATE.dat; "
            "also kernel, module and *. Default: each file is a host.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="ADDRESS", help="Dask scheduler, tcp://…, or local: start one."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-j", min=1, metavar="N", help="Processes. Default: one a CPU."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Per process. Default: its share."),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option("--module", metavar="VERSION", help="Release of the TDX module."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--hash-hosts", metavar="FILE", help="Hash hosts with this key."),
    ] = None,
    big: Annotated[
        str | None,
        typer.Option("--big", metavar="SIZE", help="Larger traces need the Dask resource big."),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Count each trace, in parallel; traces that were counted before are not read again.

    Exit status 1: a trace could not be counted.

    Example: tdxtrace fleet map traces/ --to facts
    """
    from tdxtrace.fleet.engine import open_engine
    from tdxtrace.fleet.mapping import MapOptions, map_traces
    from tdxtrace.fleet.storage import open_storage, trace_inputs
    from tdxtrace.tables.memory import free_bytes, parse_size

    n_workers = workers or os.cpu_count() or 1
    each = parse_size(memory) if memory is not None else None
    here = each or free_bytes() // n_workers
    given = MapOptions(
        identify=identify,
        key=_key(key_file),
        memory=here if cluster in (None, "local") else each,
        module=module,
        big_bytes=parse_size(big) if big is not None else None,
    )
    inputs, storage = trace_inputs(traces), open_storage(to)
    engine = open_engine(cluster, n_workers, each)
    try:
        if engine.dashboard and not quiet:
            print(f"tdxtrace: dashboard {one_line(engine.dashboard)}", file=sys.stderr)
        summary = map_traces(inputs, storage, engine, given, _Progress(quiet).show)
    finally:
        engine.close()
    _say(summary, quiet)
    if summary.n_failed:
        raise typer.Exit(1)


def _key(path: Path | None) -> bytes:
    """Read the key from a file, without leading and trailing whitespace; b"" without a file.

    Raises:
        InputError: If it cannot be read, or does not have 16 to 64 bytes.
    """
    from tdxtrace.errors import InputError

    if path is None:
        return b""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"cannot read {one_line(str(path))}: {error.strerror}") from None
    if not 16 <= len(key) <= 64:
        raise InputError(f"{one_line(str(path))} is not a key: it must have 16 to 64 bytes")
    return key


@dataclass(slots=True)
class _Progress:
    """Progress line on a terminal: traces counted, rate and remaining time."""

    quiet: bool

    def show(self, summary: MapSummary) -> None:
        """Replace the progress line."""
        if self.quiet or not sys.stderr.isatty():
            return
        n = summary.n_finished - summary.n_there
        left = ""
        if n and summary.seconds:
            rate = n / summary.seconds
            remaining = (summary.n_traces - summary.n_finished) / rate
            left = f", {rate:.2g} a second, {remaining:.0f} s left"
        ends = "\n" if summary.n_finished == summary.n_traces else ""
        words = f"{summary.n_finished:,} of {summary.n_traces:,} traces{left}"
        print(f"\r\x1b[Ktdxtrace: {words}", end=ends, file=sys.stderr, flush=True)


def _say(summary: MapSummary, quiet: bool) -> None:
    if quiet:
        return
    print(
        f"{summary.n_done:,} traces counted in {summary.seconds:.1f} s, {summary.n_there:,} were "
        f"counted before, {summary.n_failed:,} failed"
    )
    for url, reason in summary.failures[:_LATEST_SHOWN]:
        print(f"  {one_line(url, 80)}: {one_line(reason, 200)}")
    if summary.n_failed > _LATEST_SHOWN:
        print(f"  and {summary.n_failed - _LATEST_SHOWN:,} more: see fleet report")


@app.command("limits", cls=Command)
def limits_command(
    facts: FactsUrl,
    where: Where = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="GROUP", help="For each host, kernel or module.")
    ] = None,
    target: TargetShare = 1e-3,
    confidence: Confidence = 0.95,
    about_hosts: Annotated[
        bool, typer.Option("--hosts", help="Share of each host in the tail of each leaf.")
    ] = False,
    form: options.Format = OutputFormat.table,
    output: options.Output = None,
    force: options.Force = False,
) -> None:
    """Print the retry limits that all hosts support, and which hosts contribute most to the tail.

    Example: tdxtrace fleet limits facts --where "kernel = '7.2'" --target 1e-4
    """
    from tdxtrace.cli import outputs
    from tdxtrace.errors import QueryError
    from tdxtrace.fleet.limits import fleet_hosts, fleet_limits
    from tdxtrace.fleet.merge import count_fleet
    from tdxtrace.report.fleet import fleet_text

    chosen = _opened(facts, where)
    if chosen.n_histograms == chosen.parts.height:
        if by is not None or about_hosts:
            raise QueryError("--by and --hosts need recordings, and all of these are histograms")
        _show_counted(chosen, _target(target, confidence), form, output, force, facts)
        return
    counts = count_fleet(chosen)
    if about_hosts:
        rows = fleet_hosts(counts)
    else:
        rows = fleet_limits(chosen, _target(target, confidence), by, counts=counts)
    if chosen.n_histograms:
        print(
            f"tdxtrace: {chosen.n_histograms:,} histograms are left out; for these, "
            "--where \"format = 'histogram'\"",
            file=sys.stderr,
        )
    if form is not OutputFormat.table:
        outputs.write_table(rows, form, output, force=force, inputs=[facts])
        return
    if about_hosts:
        from tdxtrace.report.listing import listing

        shown = listing(rows)
    else:
        hosts = fleet_hosts(counts)
        shown = fleet_text(rows, hosts, chosen.parts, chosen.failures)
    _show(shown, output, force, facts)


def _show_counted(
    facts: Facts,
    target: Target,
    form: OutputFormat,
    output: Path | None,
    force: bool,
    url: str,
) -> None:
    """Print the limits of histograms, which have only numbers of attempts, and hosts."""
    from rich.text import Text

    from tdxtrace.cli import outputs
    from tdxtrace.fleet.counted import fleet_counted
    from tdxtrace.report.histogram_text import limit_lines

    rows = fleet_counted(facts.table_with_hosts("requests"), target.confidence)
    if form is not OutputFormat.table:
        outputs.write_table(rows, form, output, force=force, inputs=[url])
    else:
        text = limit_lines(rows, target.ratio, target.confidence)
        _show(Text(text.rstrip("\n")), output, force, url)


@app.command("report", cls=Command)
def report_command(
    facts: FactsUrl,
    where: Where = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="GROUP", help="For each host, kernel or module.")
    ] = None,
    target: TargetShare = 1e-3,
    confidence: Confidence = 0.95,
    form: Annotated[
        ReportFormat | None,
        typer.Option("--format", help="Default: by the name of --output, else md."),
    ] = None,
    output: options.Output = None,
    force: options.Force = False,
) -> None:
    """Write a report on a fleet: limits, hosts, causes, verdicts, and what was left out.

    Example: tdxtrace fleet report facts -o fleet.html
    """
    from tdxtrace.fleet.counted import fleet_counted
    from tdxtrace.fleet.limits import fleet_hosts, fleet_limits
    from tdxtrace.fleet.merge import count_fleet
    from tdxtrace.report import fleet, render

    shape = form or options.format_of(output)
    chosen = _opened(facts, where)
    counts = count_fleet(chosen)
    rows = fleet_limits(chosen, _target(target, confidence), by, counts=counts)
    hosts = fleet_hosts(counts)
    tables = (chosen.table("shares"), chosen.table("rare"))
    parts = fleet.sections(rows, hosts, chosen.parts, chosen.failures, *tables)
    counted = fleet_counted(chosen.table_with_hosts("requests"), confidence)
    parts.append(fleet.histogram_section(counted))
    title = f"TDX SEAMCALL retries of a fleet (facts {chosen.digest})"
    _write(render.comparison(title, parts, shape.value, rows), output, force, facts)


@app.command("compare", cls=Command)
def compare_command(
    facts: FactsUrl,
    before: Annotated[
        str,
        typer.Option("--before", metavar="SQL", help="First set of traces.", show_default=False),
    ],
    after: Annotated[
        str, typer.Option("--after", metavar="SQL", help="Second set.", show_default=False)
    ],
    form: options.Format = OutputFormat.table,
    output: options.Output = None,
    force: options.Force = False,
) -> None:
    """Compare two sets of traces, with hosts as clusters, for example before and after a rollout.

    Example: tdxtrace fleet compare facts --before "kernel = '7.1'" --after "kernel = '7.2'"
    """
    from tdxtrace.cli import outputs
    from tdxtrace.fleet.limits import compare_fleets
    from tdxtrace.report.listing import listing

    rows = compare_fleets(_opened(facts, before), _opened(facts, after))
    if form is not OutputFormat.table:
        outputs.write_table(rows, form, output, force=force, inputs=[facts])
    else:
        _show(listing(rows), output, force, facts)


def _opened(url: str, where: str | None) -> Facts:
    """Open the facts at a URL, restricted to traces for which a condition holds."""
    from tdxtrace.fleet.merge import open_facts
    from tdxtrace.fleet.storage import open_storage

    return open_facts(open_storage(url)).where(where)


def _target(ratio: float, confidence: float) -> Target:
    from tdxtrace.recommend.target import Target

    return Target(ratio, confidence)


def _show(shown: RenderableType, output: Path | None, force: bool, facts: str) -> None:
    """Print a renderable, or write it as text to ``output``."""
    from tdxtrace.cli import screen

    if output is None:
        screen.print_screen(shown)
    else:
        _write(screen.plain_text(shown).encode(), output, force, facts)


def _write(data: bytes, output: Path | None, force: bool, facts: str) -> None:
    from tdxtrace.cli import outputs

    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        outputs.write_file(output, data, force=force, inputs=[facts])
