"""Sections on abandoned requests and on loops without progress."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.section import Grid, Section, grid, more
from tdxtrace.report.units import count, duration, plural
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import ABANDONED_REQUESTS, PROGRESS_LOOPS

_MAX_ROWS: Final = 12
_CONSEQUENCES: Final = {
    "host_priority_timeout": "the guest hit the host priority timeout",
    "later_call_failed": "a later call failed because of it",
    "kernel_message": "the kernel printed a message",
    "settled_later": "another call completed it",
    "none_seen": "no consequence in the trace",
}
_NO_REQUEST: Final = "No request was captured."


def abandoned(findings: Findings) -> Section:
    """Return the section on the consequences of abandoned requests, by leaf."""
    title, about = "What happened to abandoned requests", definition(ABANDONED_REQUESTS)
    rows = findings.abandoned_requests
    if rows.is_empty():
        none = "No request was abandoned in this trace."
        says = [_NO_REQUEST if findings.retry_chains.is_empty() else none]
        return Section("abandoned_requests", title, about, says)
    n = rows.select("source", "first_seq").n_unique()
    counts = dict(rows.group_by("consequence").len().rows())
    parts = [f"{text}: {count(counts[c])}" for c, text in _CONSEQUENCES.items() if c in counts]
    says = [f"{plural(n, 'request')} abandoned. Consequences: {'; '.join(parts)}."]
    return Section("abandoned_requests", title, about, says, grids=[_abandoned(rows)])


def _abandoned(rows: pl.DataFrame) -> Grid:
    groups = (
        rows.group_by("consequence", "leaf")
        .agg(
            n=pl.len(),
            first=pl.col("after_ns").min(),
            last=pl.col("after_ns").max(),
            left=pl.col("first_seq").sort().head(3).cast(pl.String).implode().list.join(", "),
            seen=pl.col("effect_seq").drop_nulls().sort().first(),
        )
        .sort("consequence", "n", "leaf", descending=[False, True, False])
    )
    return grid(
        ("TDH.", "requests", "earliest", "latest", "rows", "evidence row", "consequence"),
        [
            (
                leaf_label(row["leaf"]),
                count(row["n"]),
                duration(row["first"]),
                duration(row["last"]),
                row["left"],
                "-" if row["seen"] is None else str(row["seen"]),
                _CONSEQUENCES[row["consequence"]],
            )
            for row in groups.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=(1, 2, 3),
        droppable=(5, 2),
        caption="Earliest and latest: time from the last attempt to the consequence. A request "
        "may have more than one consequence; rows lists the first ones.",
        more=more(groups.height - _MAX_ROWS, "abandoned-requests"),
    )


def loops(findings: Findings) -> Section:
    """Return the section on loops without lock conflicts, and whether they made progress."""
    title, about = "Loops without progress", definition(PROGRESS_LOOPS)
    rows = findings.progress_loops
    if rows.is_empty():
        none = "Nothing was repeated without a lock conflict; no vCPU was idle after a fault."
        says = [_NO_REQUEST if findings.retry_chains.is_empty() else none]
        return Section("progress_loops", title, about, says)
    counts = dict(rows.group_by("progress").len().rows())
    texts = {"seen": "with progress", "not_seen": "without progress", "unknown": "unknown"}
    parts = ", ".join(f"{count(counts[p])} {text}" for p, text in texts.items() if p in counts)
    says = [f"{plural(rows.height, 'loop')}: {parts}."]
    return Section("progress_loops", title, about, says, grids=[_loops(rows)])


def _loops(rows: pl.DataFrame) -> Grid:
    groups = (
        rows.group_by("loop", "leaf", "progress")
        .agg(
            n=pl.len(),
            repeats=pl.col("n_repeats").max(),
            longest=pl.col("took_ns").max(),
            interrupts=pl.col("n_interrupts").max(),
            rows=pl.col("first_seq").sort().head(3).cast(pl.String).implode().list.join(", "),
        )
        .sort("n", "loop", "leaf", "progress", descending=[True, False, False, False])
    )
    return grid(
        ("loop", "TDH.", "loops", "max repeats", "longest", "interrupts", "progress", "rows"),
        [
            (
                row["loop"].replace("_", " "),
                "-" if row["leaf"] is None else leaf_label(row["leaf"]),
                count(row["n"]),
                "-" if row["loop"] == "local_retry" else count(row["repeats"]),
                duration(row["longest"]),
                count(row["interrupts"]),
                row["progress"].replace("_", " "),
                row["rows"],
            )
            for row in groups.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=(2, 3, 4, 5),
        droppable=(7, 5),
        caption="Local retry: a fault after which the vCPU's thread had no event for long, because "
        "of KVM's own loop or because it was not scheduled. Interrupts: maximum during one loop.",
        more=more(groups.height - _MAX_ROWS, "progress-loops"),
    )
