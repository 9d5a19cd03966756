"""Commands that print one table: events, retry-chains, zero-steps."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdxtrace.cli import options
from tdxtrace.cli.options import OutputFormat

if TYPE_CHECKING:
    import polars as pl

    from tdxtrace.cli.inputs import Request
    from tdxtrace.tables.trace import Findings


class EventTable(StrEnum):
    """Tables of a Trace."""

    seamcalls = "seamcalls"
    vm_entries = "vm_entries"
    page_faults = "page_faults"
    host_events = "host_events"
    threads = "threads"
    losses = "losses"


class Outcome(StrEnum):
    """How a chain can end."""

    succeeded = "succeeded"
    failed = "failed"
    resolved_elsewhere = "resolved_elsewhere"
    abandoned = "abandoned"
    cut = "cut"


_Limit = Annotated[
    int, typer.Option("--limit", "-n", min=0, help="Most rows of --format table; 0: all.")
]


def events_command(
    traces: options.Traces,
    table: Annotated[EventTable, typer.Option("--table", help="Which.")] = EventTable.seamcalls,
    limit: _Limit = 40,
    form: options.Format = OutputFormat.table,
    output: options.Output = None,
    force: options.Force = False,
    vm: options.Vms = [],  # noqa: B006 - typer reads, nobody writes it
    leaf: options.Leaves = [],  # noqa: B006
    since: options.Since = None,
    until: options.Until = None,
    input_format: options.InputFormat = None,
    mappings: options.Mappings = [],  # noqa: B006
    level_base: options.LevelBase = None,
    formats: options.Formats = None,
    cache: options.Cache = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Print the events that were read: SEAMCALLs, vCPU entries, faults, losses.

    Example: tdxtrace events trace.txt --table losses
    """
    from tdxtrace.cli.inputs import Request

    request = Request(
        traces,
        vm,
        leaf,
        since,
        until,
        input_format,
        mappings,
        level_base,
        quiet,
        formats,
        cache,
    )
    trace = request.read()
    rows = request.selection.of(getattr(trace, table), trace)
    _show(rows, form, output, force, limit, no_color)


def retry_chains_command(
    traces: options.Traces,
    outcome: Annotated[
        Outcome | None, typer.Option("--outcome", help="Only chains that ended so.")
    ] = None,
    retried: Annotated[
        bool, typer.Option("--retried/--all", help="Only requests that met busy, or all.")
    ] = True,
    limit: _Limit = 40,
    form: options.Format = OutputFormat.table,
    output: options.Output = None,
    force: options.Force = False,
    vm: options.Vms = [],  # noqa: B006
    leaf: options.Leaves = [],  # noqa: B006
    since: options.Since = None,
    until: options.Until = None,
    input_format: options.InputFormat = None,
    mappings: options.Mappings = [],  # noqa: B006
    level_base: options.LevelBase = None,
    formats: options.Formats = None,
    cache: options.Cache = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Print the retry chains, those with most attempts first.

    Example: tdxtrace retry-chains trace.txt --leaf TDH.MEM.PAGE.AUG --format csv
    """
    import polars as pl

    from tdxtrace.cli.inputs import Request

    request = Request(
        traces,
        vm,
        leaf,
        since,
        until,
        input_format,
        mappings,
        level_base,
        quiet,
        formats,
        cache,
    )
    findings = _analyzed(request)
    rows = findings.retry_chains
    if outcome is not None:
        rows = rows.filter(pl.col("outcome") == outcome.value)
    elif retried and form is OutputFormat.table:
        rows = rows.filter(pl.col("n_busy") > 0)
    if form is OutputFormat.table:
        rows = rows.sort("n_attempts", "first_seq", descending=[True, False])
    _show(rows, form, output, force, limit, no_color)


def zero_steps_command(
    traces: options.Traces,
    limit: _Limit = 40,
    form: options.Format = OutputFormat.table,
    output: options.Output = None,
    force: options.Force = False,
    vm: options.Vms = [],  # noqa: B006
    leaf: options.Leaves = [],  # noqa: B006
    since: options.Since = None,
    until: options.Until = None,
    input_format: options.InputFormat = None,
    mappings: options.Mappings = [],  # noqa: B006
    level_base: options.LevelBase = None,
    formats: options.Formats = None,
    cache: options.Cache = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Print the zero-step episodes: where a vCPU was kept from entering.

    Example: tdxtrace zero-steps trace.txt --format json
    """
    from tdxtrace.cli.inputs import Request

    request = Request(
        traces,
        vm,
        leaf,
        since,
        until,
        input_format,
        mappings,
        level_base,
        quiet,
        formats,
        cache,
    )
    findings = _analyzed(request)
    _show(findings.zero_steps, form, output, force, limit, no_color)


def _analyzed(request: Request) -> Findings:
    from tdxtrace.pipeline import analyze

    return analyze(request.read(), request.selection)


def _show(
    rows: pl.DataFrame,
    form: OutputFormat,
    output: Path | None,
    force: bool,
    limit: int,
    no_color: bool,
) -> None:
    from tdxtrace.cli import outputs

    if form is not OutputFormat.table:
        outputs.write_table(rows, form, output, force)
        return
    from tdxtrace.report.listing import listing

    if output is None:
        screen = outputs.console(no_color)
        screen.print(listing(rows, limit, screen.width))
        return
    plain = outputs.console(no_color=True)
    with plain.capture() as text:
        plain.print(listing(rows, limit, plain.width))
    outputs.write_file(output, text.get().encode(), force)
