"""Commands that print one table: events, retry-chains, zero-steps, verdicts and their parts."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from tdxtrace.cli.groups import spread
from tdxtrace.cli.inputs import Request
from tdxtrace.cli.module_options import ModuleOptions
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
    table: Annotated[
        EventTable,
        typer.Option(
            "--table",
            metavar="TABLE",
            help="vm_entries, page_faults, host_events, kernel_messages, threads or losses.",
        ),
    ] = EventTable.seamcalls,
) -> None:
    """Print the events that were read: SEAMCALLs, vCPU entries, faults, losses.

    Example: tdxtrace events trace.txt --table losses
    """
    trace = request.read()
    printing.show(request.selection.filter(getattr(trace, table), trace), request)


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


@spread
def zero_step_causes_command(request: Request, printing: Printing) -> None:
    """Print what made each zero-step episode's vCPU fault so often.

    Example: tdxtrace zero-step-causes trace.txt --format csv
    """
    printing.show(request.analyze().zero_step_causes, request)


@spread
def step_thresholds_command(request: Request, printing: Printing) -> None:
    """Print how many zero-step episodes each threshold would have made.

    Example: tdxtrace step-thresholds trace.txt
    """
    printing.show(request.analyze().step_thresholds, request)


@spread
def abandoned_requests_command(request: Request, printing: Printing) -> None:
    """Print the requests that were left busy, and what came of each.

    Example: tdxtrace abandoned-requests trace.txt --dmesg dmesg.txt
    """
    printing.show(request.analyze().abandoned_requests, request)


@spread
def progress_loops_command(request: Request, printing: Printing) -> None:
    """Print what was repeated though nothing held a lock, and whether it moved on.

    Example: tdxtrace progress-loops trace.txt
    """
    printing.show(request.analyze().progress_loops, request)


@spread
def td_conflicts_command(request: Request, printing: Printing) -> None:
    """Print whether TDs made each other's SEAMCALLs busy.

    Example: tdxtrace td-conflicts trace.txt
    """
    printing.show(request.analyze().td_conflicts, request)


@spread
def time_shares_command(request: Request, printing: Printing) -> None:
    """Print where threads' time went while each TD was built, ran, was torn down.

    Example: tdxtrace time-shares trace.txt
    """
    printing.show(request.analyze().time_shares, request)


@spread
def verdicts_command(request: Request, of: ModuleOptions, printing: Printing) -> None:
    """Print whose fault it is: BUG, HOSTILE, UNDECIDED or EXPECTED, with evidence and rule.

    Example: tdxtrace verdicts trace.txt --dmesg dmesg.txt
    """
    rows = of.analyze(of.read(request), request).verdicts
    if printing.form is not OutputFormat.table or printing.output is not None:
        printing.show(rows, request)
        return
    from tdxtrace.cli import outputs
    from tdxtrace.report.verdict_text import verdict_text

    outputs.print_screen(verdict_text(rows, printing.limit), request.no_color)
