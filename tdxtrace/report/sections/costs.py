"""Sections on the duration of busy answers, and on the time that TDs spend retrying."""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from tdxtrace.report.charts import time_shares as chart
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.section import Figure, Grid, Section, grid, more
from tdxtrace.report.units import count, duration, share, total
from tdxtrace.tables.limits import LATENCIES
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import TIME_SHARES

_MAX_ROWS: Final = 12
# Rows up to which there is no chart, only the table.
_FEW: Final = 3


def latencies(findings: Findings) -> Section:
    """Return the section on durations of busy answers and successes, and pauses of callers."""
    title, about = "Duration of busy answers", definition(LATENCIES)
    rows = findings.latencies
    if rows.is_empty():
        return Section("latencies", title, about, ["No SEAMCALL was answered busy."])
    return Section("latencies", title, about, _costs(rows), grids=[_latencies(rows)])


def _costs(rows: pl.DataFrame) -> list[str]:
    known = rows.drop_nulls("busy_ratio").sort("n_busy", "leaf", descending=[True, False])
    sentences = [
        f"TDH.{leaf_label(row['leaf'])}: a success takes {1 / row['busy_ratio']:.3g} times as long "
        f"as a busy answer{_between(row)}."
        for row in known.head(3).iter_rows(named=True)
    ]
    return sentences or ["No leaf has both busy answers and successes to compare."]


def _between(row: dict[str, Any]) -> str:
    low, high = row["busy_ratio_low"], row["busy_ratio_high"]
    if low is None or high is None:
        return ""
    return f" (95 % interval: {1 / high:.3g} to {1 / low:.3g})"


def _latencies(rows: pl.DataFrame) -> Grid:
    ordered = rows.sort("n_busy", "leaf", descending=[True, False])
    return grid(
        ("TDH.", "busy", "busy takes", "success takes", "p50 pause", "p99 pause", "max pause")
        + ("note",),
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
            for row in ordered.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=range(1, 7),
        droppable=(7, 5),
        caption="Medians of the calls with entry and return recorded. Pause: time from a busy "
        "answer to the next attempt.",
        more=more(ordered.height - _MAX_ROWS, "attempts --latencies"),
    )


def _time(ns: float | None) -> str:
    return duration(None if ns is None else round(ns))


def time_shares(findings: Findings) -> Section:
    """Return the section on the time of each TD's threads, by phase and activity."""
    title, about = "Time spent retrying, by TD", definition(TIME_SHARES)
    rows = chart.with_total(findings.time_shares)
    if rows.is_empty():
        return Section("time_shares", title, about, ["No SEAMCALL was captured."])
    figures = []
    if rows.height > _FEW:
        figures = [
            Figure(
                "time_shares",
                "Time of a TD's threads, by activity",
                f"Time of the threads that made SEAMCALLs, summed; {chart.drawn_rows(rows)}.",
                lambda: chart.time_by_activity(findings.time_shares),
            )
        ]
    return Section("time_shares", title, about, _spent(rows), figures, [_time_shares(rows)])


def _spent(rows: pl.DataFrame) -> list[str]:
    sentences = []
    for phase, part in rows.group_by("phase", maintain_order=True):
        retry, wait, all_ = (total(part, name) for name in ("retry_ns", "wait_ns", "all_ns"))
        sentences.append(
            f"{str(phase[0]).capitalize()}: {share(retry, all_)} of the threads' time in calls "
            f"that did not complete their request, {share(wait, all_)} between attempts."
        )
    return sorted(sentences)


def _time_shares(rows: pl.DataFrame) -> Grid:
    titles = ("TD", "phase", "length", "SEAMCALLs", "retries", "completing", "retrying", "between")
    return grid(
        (*titles, "in the guest", "other"),
        [
            (
                chart.td_label(row["td_id"]),
                row["phase"],
                duration(row["end_ns"] - row["start_ns"]),
                count(row["n_calls"]),
                count(row["n_retries"]),
                *(duration(row[name]) for name in chart.PARTS),
            )
            for row in rows.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=range(2, 10),
        droppable=(9, 2, 8),
        caption="SEAMCALLs without VP.ENTER; times are summed over threads. Sorted by time spent "
        "retrying.",
        more=more(rows.height - _MAX_ROWS, "time-shares"),
    )
