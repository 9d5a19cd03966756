"""Commands about causes: busy-causes."""

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


@spread
def busy_causes_command(
    request: Request,
    of: ModuleOptions,
    printing: Printing,
    about: Annotated[
        About,
        typer.Option("--about", help="Each attempt, the share of each cause, or broken rules."),
    ] = About.attempts,
    cause: Annotated[
        Cause | None, typer.Option("--cause", help="Only attempts with this answer.")
    ] = None,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Also what else fits, not only the answers.")
    ] = False,
) -> None:
    """Print who made each SEAMCALL busy: a host call, an armed entry, a guest, a kernel bug.

    Example: tdxtrace busy-causes trace.txt --about shares --module 1.5.16
    """
    import polars as pl

    findings = of.analyze(request)
    if about is About.shares:
        printing.show(findings.cause_shares, request)
        return
    if about is About.rules:
        printing.show(findings.broken_rules, request)
        return
    rows = findings.busy_causes
    if cause is not None:
        answered = rows.filter(pl.col("rank") == 1, pl.col("cause") == cause.value)
        rows = rows.join(answered, on=["source", "seq"], how="semi", maintain_order="left")
    if printing.form is OutputFormat.table and not candidates:
        rows = rows.filter(pl.col("rank") == 1)
    printing.show(rows, request)
