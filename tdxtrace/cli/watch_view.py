"""Terminal view of ``tdxtrace watch``: a few tables in 80 columns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tdxtrace.report.units import duration
from tdxtrace.tables.text import one_line
from tdxtrace.watch.totals import RunningTotals

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_ROWS = 8


def view(totals: RunningTotals) -> Group:
    """Return the screen: rates, leaves, longest chains, refused vCPUs, busy resources."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(line) for line in _head(totals)), *_tables(totals))


def _head(totals: RunningTotals) -> Iterator[str]:
    rates, chains = totals.rates, totals.chains
    seconds = time.monotonic() - totals.began
    yield (
        f"{seconds:,.0f} s  {totals.n_events:,} events  {rates.get('events', 0):,.0f}/s  "
        f"{rates.get('seamcalls', 0):,.0f} SEAMCALLs/s  {rates.get('busy', 0):,.0f} busy/s"
    )
    in_flight = f"chains in flight: {chains.n_in_flight}"
    if chains.max_attempts_in_flight > 1:
        in_flight += f", the longest with {chains.max_attempts_in_flight:,} attempts so far"
    if chains.n_given_up:
        in_flight += f"; {chains.n_given_up:,} lost sight of"
    yield in_flight
    if totals.n_lost:
        yield f"lost: {totals.n_lost:,} events; chains across a loss are cut"


def _tables(totals: RunningTotals) -> Iterator[Table]:
    if totals.leaves:
        yield _leaves(totals)
    if totals.worst:
        yield _worst(totals)
    kept_out = [(tid, v) for tid, v in totals.vcpus.items() if v.n_refused or v.n_failed]
    if kept_out:
        table = _table("zero-step", "refused", "episodes", "failed entries")
        kept_out.sort(key=lambda one: (-one[1].n_refused, -one[1].n_failed))
        for tid, one in kept_out[:_ROWS]:
            _row(table, _thread(totals, tid), one.n_refused, one.episodes, one.n_failed)
        yield table
    if totals.busy:
        table = _table("busy", "leaf", "answers")
        for (leaf, what), n in totals.busy.most_common(_ROWS):
            _row(table, what, leaf.removeprefix("TDH."), n)
        yield table


def _leaves(totals: RunningTotals) -> Table:
    table = _table("TDH.", "requests", "retried", "p50", "p99", "max", "longest")
    ranked = sorted(totals.leaves.items(), key=lambda one: -one[1].n_busy)
    for name, one in ranked[:_ROWS]:
        _row(
            table,
            name.removeprefix("TDH."),
            one.n_requests,
            one.n_retried,
            one.quantile(0.5),
            one.quantile(0.99),
            one.max_attempts,
            duration(one.max_ns),
        )
    return table


def _worst(totals: RunningTotals) -> Table:
    table = _table("worst chains", "thread", "gpa", "attempts", "time", "outcome")
    for one in totals.worst:
        gpa = "-" if one["gpa"] is None else f"{one['gpa']:#x}"
        took = "-" if one["took_ns"] is None else duration(one["took_ns"])
        name = one["leaf"].removeprefix("TDH.")
        _row(table, name, _thread(totals, one["tid"]), gpa, one["attempts"], took, one["outcome"])
    return table


def _thread(totals: RunningTotals, tid: int) -> str:
    return one_line(f"{totals.comms.get(tid, '')}-{tid}", 24)


def _table(first: str, *others: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column(Text(first, "bold"))
    for name in others:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table


def _row(table: Table, *cells: Any) -> None:  # noqa: ANN401 - numbers and text
    from rich.text import Text

    table.add_row(*(Text(f"{c:,}" if isinstance(c, int) else str(c)) for c in cells))
