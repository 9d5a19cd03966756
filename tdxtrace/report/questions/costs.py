"""What do busy answers cost: beside a success, and of a TD's time?"""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from tdxtrace.report.charts import shares as chart
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.sections import Figure, Grid, Section, grid, more
from tdxtrace.report.units import count, duration, share, total
from tdxtrace.tables.limits import LATENCIES
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import TIME_SHARES

_MOST: Final = 12
# Rows that a table tells better than a picture.
_FEW: Final = 3


def latencies(findings: Findings) -> Section:
    """Show what a busy answer takes beside a success, and how long callers pause."""
    title, about = "What does a busy answer cost?", definition(LATENCIES)
    rows = findings.latencies
    if rows.is_empty():
        return Section("latencies", title, about, ["Nothing: nothing was answered busy."])
    return Section("latencies", title, about, _costs(rows), grids=[_latencies(rows)])


def _costs(rows: pl.DataFrame) -> list[str]:
    known = rows.drop_nulls("busy_ratio").sort("n_busy", "leaf", descending=[True, False])
    said = [
        f"TDH.{leaf_label(row['leaf'])}: a success takes {1 / row['busy_ratio']:.3g} times as long "
        f"as a busy answer{_between(row)}."
        for row in known.head(3).iter_rows(named=True)
    ]
    return said or ["No leaf has both busy answers and successes that can be compared."]


def _between(row: dict[str, Any]) -> str:
    low, high = row["busy_ratio_low"], row["busy_ratio_high"]
    if low is None or high is None:
        return ""
    return f" (95 % interval: {1 / high:.3g} to {1 / low:.3g})"


def _latencies(rows: pl.DataFrame) -> Grid:
    ordered = rows.sort("n_busy", "leaf", descending=[True, False])
    return grid(
        ("TDH.", "busy", "busy takes", "success takes", "p50 pause", "p99 pause", "max pause")
        + ("beware",),
        [
            (
                leaf_label(row["leaf"]),
                count(row["n_busy"]),
                _time(row["busy_ns"]),
                _time(row["succeeded_ns"]),
                duration(row["p50_gap_ns"]),
                duration(row["p99_gap_ns"]),
                duration(row["max_gap_ns"]),
                row["withheld"] or "",
            )
            for row in ordered.head(_MOST).iter_rows(named=True)
        ],
        right=range(1, 7),
        spare=(7, 5),
        caption="Medians of the calls whose beginning and end were seen. Pauses: from a busy "
        "answer to the next attempt.",
        more=more(ordered.height - _MOST, "attempts --latencies"),
    )


def _time(ns: float | None) -> str:
    return duration(None if ns is None else round(ns))


def time_shares(findings: Findings) -> Section:
    """Show where threads' time went while each TD was built, ran and was torn down."""
    title, about = "How much of a TD's time is retrying?", definition(TIME_SHARES)
    rows = chart.spent(findings.time_shares)
    if rows.is_empty():
        return Section("time_shares", title, about, ["No SEAMCALL was captured."])
    figures = []
    if rows.height > _FEW:
        figures = [
            Figure(
                "time_shares",
                "Where the time of a TD's threads went",
                f"Time of the threads that made SEAMCALLs, summed; {chart.drawn(rows)}.",
                lambda: chart.where_time_went(findings.time_shares),
            )
        ]
    return Section("time_shares", title, about, _spent(rows), figures, [_time_shares(rows)])


def _spent(rows: pl.DataFrame) -> list[str]:
    said = []
    for phase, part in rows.group_by("phase", maintain_order=True):
        retry, wait, all_ = (total(part, name) for name in ("retry_ns", "wait_ns", "all_ns"))
        said.append(
            f"{str(phase[0]).capitalize()}: {share(retry, all_)} of the threads' time in calls "
            f"that did not settle their request, {share(wait, all_)} between attempts."
        )
    return sorted(said)


def _time_shares(rows: pl.DataFrame) -> Grid:
    titles = ("TD", "phase", "length", "SEAMCALLs", "retries", "settling", "retrying", "between")
    return grid(
        (*titles, "in the guest", "else"),
        [
            (
                chart.td_label(row["td_id"]),
                row["phase"],
                duration(row["end_ns"] - row["start_ns"]),
                count(row["n_calls"]),
                count(row["n_retries"]),
                *(duration(row[name]) for name in chart.PARTS),
            )
            for row in rows.head(_MOST).iter_rows(named=True)
        ],
        right=range(2, 10),
        spare=(9, 2, 8),
        caption="SEAMCALLs but VP.ENTER; times are summed over threads. The TDs that spent most on "
        "retrying first.",
        more=more(rows.height - _MOST, "time-shares"),
    )
