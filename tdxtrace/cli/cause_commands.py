"""Commands about causes: busy-causes, explain."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from tdxtrace.cli.groups import spread
from tdxtrace.cli.inputs import Request
from tdxtrace.cli.module_options import ModuleOptions
from tdxtrace.cli.options import OutputFormat
from tdxtrace.cli.printing import Printing


class Cause(StrEnum):
    """Who can make a SEAMCALL busy."""

    host_conflict = "host_conflict"
    armed_entry = "armed_entry"
    guest = "guest"
    kernel_bug = "kernel_bug"
    unexplained = "unexplained"


class About(StrEnum):
    """Tables about causes."""

    attempts = "attempts"
    shares = "shares"
    rules = "rules"
    locks = "locks"
    entries = "entries"


_TABLES = {
    About.shares: "cause_shares",
    About.rules: "broken_rules",
    About.locks: "lock_values",
    About.entries: "entry_waits",
}


@spread
def busy_causes_command(
    request: Request,
    of: ModuleOptions,
    printing: Printing,
    about: Annotated[
        About,
        typer.Option(
            "--about",
            metavar="WHAT",
            help="attempts, shares of causes, rules that were broken, locks and their worth, or "
            "entries refused.",
        ),
    ] = About.attempts,
    cause: Annotated[
        Cause | None,
        typer.Option(
            "--cause",
            metavar="CAUSE",
            help="host_conflict, armed_entry, guest, kernel_bug or unexplained.",
        ),
    ] = None,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Also what else fits, not only the answers.")
    ] = False,
) -> None:
    """Print who made each SEAMCALL busy: a host call, an armed entry, a guest, a kernel bug.

    Example: tdxtrace busy-causes trace.txt --about shares --module 1.5.16
    """
    import polars as pl

    findings = of.analyze(of.read(request), request)
    if about in _TABLES:
        printing.show(getattr(findings, _TABLES[about]), request)
        return
    rows = findings.busy_causes
    if cause is not None:
        answered = rows.filter(pl.col("rank") == 1, pl.col("cause") == cause.value)
        rows = rows.join(answered, on=["source", "seq"], how="semi", maintain_order="left")
    if printing.form is OutputFormat.table and not candidates:
        rows = rows.filter(pl.col("rank") == 1)
    printing.show(rows, request)


@spread
def explain_command(
    request: Request,
    of: ModuleOptions,
    seq: Annotated[int, typer.Option("--seq", metavar="N", min=0, help="Which SEAMCALL: its seq.")],
    source: Annotated[
        int, typer.Option("--source", metavar="N", min=0, help="Of which TRACE, counted from 0.")
    ] = 0,
    chain: Annotated[
        bool, typer.Option("--chain/--attempt", help="The time of its whole chain, or its own.")
    ] = False,
) -> None:
    """Show what happened around one SEAMCALL: threads, locks, and who made it busy.

    Example: tdxtrace explain trace.txt --seq 5374
    """
    from tdxtrace.analysis.causes.surroundings import surroundings
    from tdxtrace.report.timeline import as_text

    trace = of.read(request)
    findings = of.analyze(trace, request)
    typer.echo(as_text(surroundings(trace, findings, seq, source=source, whole_chain=chain)))
