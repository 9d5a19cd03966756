"""Commands that explain busy answers and status words: busy-causes, explain, decode."""

from __future__ import annotations

from typing import Annotated

import typer

from tdxtrace.cli.option_groups import expand_option_groups
from tdxtrace.cli.options import ABOUT_TABLES, About, OutputFormat, parse_count
from tdxtrace.cli.query_options import ModuleOptions, PrintOptions, QueryOptions
from tdxtrace.tables.enums import Cause, listed


@expand_option_groups
def busy_causes_command(
    query: QueryOptions,
    of: ModuleOptions,
    printing: PrintOptions,
    about: Annotated[
        About,
        typer.Option(
            "--about",
            metavar="WHAT",
            help="attempts, shares, (broken) rules, locks or (refused) entries.",
        ),
    ] = About.attempts,
    cause: Annotated[
        Cause | None,
        typer.Option(
            "--cause",
            metavar="CAUSE",
            help=f"{listed(Cause)}.",
        ),
    ] = None,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="All candidates, not only the most likely.")
    ] = False,
) -> None:
    """Print who made each SEAMCALL busy: a host call, an armed entry, a guest, a kernel bug.

    Example: tdxtrace busy-causes trace.txt --about shares --module 1.5.16
    """
    import polars as pl

    findings = of.analyze(of.read(query), query)
    if about is not About.attempts:
        printing.show(getattr(findings, ABOUT_TABLES[about]), query)
        return
    rows = findings.busy_causes
    if cause is not None:
        answered = rows.filter(pl.col("rank") == 1, pl.col("cause") == cause.value)
        rows = rows.join(answered, on=["source", "seq"], how="semi", maintain_order="left")
    if printing.form is OutputFormat.table and not candidates:
        rows = rows.filter(pl.col("rank") == 1)
    printing.show(rows, query)


@expand_option_groups
def explain_command(
    query: QueryOptions,
    of: ModuleOptions,
    seq: Annotated[
        int,
        typer.Option(
            "--seq", metavar="N", parser=parse_count, help="seq of the SEAMCALL: 3797 or 3,797."
        ),
    ],
    source: Annotated[
        int, typer.Option("--source", metavar="N", min=0, help="Number of the TRACE, from 0.")
    ] = 0,
    chain: Annotated[
        bool, typer.Option("--chain/--attempt", help="Show the time of its chain, or its own.")
    ] = False,
) -> None:
    """Show what happened around one SEAMCALL: threads, locks, and who made it busy.

    Example: tdxtrace explain trace.txt --seq 5374
    """
    from tdxtrace.analysis.causes.surroundings import surroundings
    from tdxtrace.report.attempt_text import attempt_text

    trace = of.read(query)
    findings = of.analyze(trace, query)
    typer.echo(attempt_text(surroundings(trace, findings, seq, source=source, whole_chain=chain)))


def decode_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="STATUS...",
            help="Status words: hex or decimal, signed or not.",
            show_default=False,
        ),
    ],
    leaf: Annotated[
        str | None,
        typer.Option("--leaf", metavar="LEAF", help="Leaf that returned it: name or number."),
    ] = None,
) -> None:
    """Explain a SEAMCALL's completion status (RAX).

    Example: tdxtrace decode 0x8000020000000092 --leaf TDH.VP.ENTER
    """
    from tdxtrace.errors import QueryError
    from tdxtrace.tdx.explain import as_text, explain, explain_loader, parse_status
    from tdxtrace.tdx.leaves import parse_leaf
    from tdxtrace.tdx.loader import parse_loader_leaf

    loader = None if leaf is None else parse_loader_leaf(leaf)
    try:
        number, version = (None, 0) if leaf is None or loader is not None else parse_leaf(leaf)
        statuses = [parse_status(word) for word in words]
    except ValueError as error:
        raise QueryError(str(error)) from None
    explained = (
        explain(status, number, version) if loader is None else explain_loader(status, loader)
        for status in statuses
    )
    typer.echo("\n\n".join(map(as_text, explained)))
