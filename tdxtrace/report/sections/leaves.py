"""Section on retries by leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import polars as pl

from tdxtrace.report.charts import leaves as charts
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.section import Figure, Grid, Section, grid
from tdxtrace.report.units import count, duration, plural, share, total
from tdxtrace.tables.findings import LEAF_STATS, OUTCOMES
from tdxtrace.tables.trace import Findings

_SHORT: Final = {"succeeded": "ok", "resolved_elsewhere": "elsewhere"}


def section(findings: Findings) -> Section:
    """Return the section on attempts, times and outcomes of requests, by leaf."""
    stats = findings.leaf_stats
    about = definition(LEAF_STATS)
    title = "Retries by leaf"
    if stats.is_empty():
        says = ["No SEAMCALL was captured. Probe the kernel's wrappers to see them."]
        return Section("leaf_stats", title, about, says)
    figure = Figure(
        "leaf_stats",
        "Attempts per request, by leaf",
        f"Requests that are cut count with the attempts recorded. {_sum(stats)} in all.",
        lambda: charts.attempts_by_leaf(stats),
    )
    is_retried = stats["max_attempts"].max() != 1
    figures = [figure] if is_retried else []
    return Section("leaf_stats", title, about, _sentences(stats), figures, [_table(stats)])


def _sum(stats: pl.DataFrame) -> str:
    return plural(total(stats, "n_requests"), "request")


def _sentences(stats: pl.DataFrame) -> list[str]:
    retried = stats.filter(pl.col("retried_seamcalls") > 0)
    if retried.is_empty():
        return [f"Retried: none of {_sum(stats)}."]
    sentences = [
        f"TDH.{leaf_label(row['leaf'])}: retried {count(row['retried_seamcalls'])} of "
        f"{plural(row['n_requests'], 'request')} "
        f"({share(row['retried_seamcalls'], row['n_requests'])}), up to "
        f"{plural(row['max_attempts'], 'attempt')}."
        for row in retried.head(3).iter_rows(named=True)
    ]
    if retried.height > len(sentences):
        others = [leaf_label(leaf) for leaf in retried["leaf"][len(sentences) :]]
        sentences.append(f"Retried, too: {', '.join(others)}.")
    never = stats.height - retried.height
    if never:
        sentences.append(f"{plural(never, 'leaf', 'leaves')} never answered busy.")
    return sentences


def _table(stats: pl.DataFrame) -> Grid:
    ends = [name for name in OUTCOMES if total(stats, name)]
    shown = ("TDH.", "requests", "retried", "p50", "p99", "max", "p99 time", "max time")
    n = len(shown)
    # Columns to drop first on a narrow page: requests completed, or completed by other threads.
    droppable_ends = [n + place for place, name in enumerate(ends) if name in _SHORT]
    return grid(
        (*shown, *(_SHORT.get(name, name) for name in ends)),
        [
            (
                leaf_label(row["leaf"]),
                count(row["n_requests"]),
                _retried(row),
                count(row["p50_attempts"]),
                count(row["p99_attempts"]),
                count(row["max_attempts"]),
                duration(row["p99_ns"]),
                duration(row["max_ns"]),
                *(count(row[name]) for name in ends),
            )
            for row in stats.iter_rows(named=True)
        ],
        right=range(1, n + len(ends)),
        droppable=(6, *droppable_ends, 3, 4),
        caption="p50, p99 and max count attempts; times are from the first attempt to the last; "
        "the columns after them are the requests by how they ended"
        + (" (elsewhere: completed by another thread)." if "resolved_elsewhere" in ends else "."),
    )


def _retried(row: Mapping[str, Any]) -> str:
    n, of = row["retried_seamcalls"], row["n_requests"]
    return f"{count(n)} ({share(n, of)})"


def brief_table(stats: pl.DataFrame, max_leaves: int) -> Grid:
    """Return the retried leaves in a table that is narrow enough for a mail.

    Args:
        stats: The ``leaf_stats`` table.
        max_leaves: Maximum number of leaves.
    """
    retried = stats.filter(pl.col("retried_seamcalls") > 0)
    rest = stats.height - min(retried.height, max_leaves)
    return grid(
        ("TDH.", "requests", "retried", "p50/p99/max", "max time", "not ok"),
        [
            (
                leaf_label(row["leaf"]),
                count(row["n_requests"]),
                _retried(row),
                "/".join(count(row[f"{name}_attempts"]) for name in ("p50", "p99", "max")),
                duration(row["max_ns"]),
                count(row["n_requests"] - row["succeeded"] - row["resolved_elsewhere"]),
            )
            for row in retried.head(max_leaves).iter_rows(named=True)
        ],
        right=range(1, 6),
        more=f"{plural(rest, 'other leaf', 'other leaves')} in the report" if rest else "",
    )
