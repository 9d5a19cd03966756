"""Commands that print one table: events, retry-chains, zero-steps."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from tdxtrace.cli.groups import spread
from tdxtrace.cli.inputs import Request
from tdxtrace.cli.options import OutputFormat
from tdxtrace.cli.printing import Printing


class EventTable(StrEnum):
    """Tables of a Trace."""

    seamcalls = "seamcalls"
    vm_entries = "vm_entries"
    page_faults = "page_faults"
    host_events = "host_events"
    kernel_messages = "kernel_messages"
    threads = "threads"
    losses = "losses"


class Outcome(StrEnum):
    """How a chain can end."""

    succeeded = "succeeded"
    failed = "failed"
    resolved_elsewhere = "resolved_elsewhere"
    abandoned = "abandoned"
    cut = "cut"


@spread
def events_command(
    request: Request,
    printing: Printing,
    table: Annotated[EventTable, typer.Option("--table", help="Which.")] = EventTable.seamcalls,
) -> None:
    """Print the events that were read: SEAMCALLs, vCPU entries, faults, losses.

    Example: tdxtrace events trace.txt --table losses
    """
    trace = request.read()
    printing.show(request.selection.of(getattr(trace, table), trace), request)


@spread
def retry_chains_command(
    request: Request,
    printing: Printing,
    outcome: Annotated[
        Outcome | None, typer.Option("--outcome", help="Only chains that ended so.")
    ] = None,
    retried: Annotated[
        bool, typer.Option("--retried/--all", help="Only requests that met busy, or all.")
    ] = True,
) -> None:
    """Print the retry chains, those with most attempts first.

    Example: tdxtrace retry-chains trace.txt --leaf TDH.MEM.PAGE.AUG --format csv
    """
    import polars as pl

    rows = request.analyze().retry_chains
    as_table = printing.form is OutputFormat.table
    if outcome is not None:
        rows = rows.filter(pl.col("outcome") == outcome.value)
    elif retried and as_table:
        rows = rows.filter(pl.col("n_busy") > 0)
    if as_table:
        rows = rows.sort("n_attempts", "first_seq", descending=[True, False])
    printing.show(rows, request)


@spread
def zero_steps_command(request: Request, printing: Printing) -> None:
    """Print the zero-step episodes: where a vCPU was kept from entering.

    Example: tdxtrace zero-steps trace.txt --format json
    """
    printing.show(request.analyze().zero_steps, request)
