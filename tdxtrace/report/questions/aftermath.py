"""What came of requests that were left busy, and of what was repeated without a lock?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.sections import Grid, Section, grid, more
from tdxtrace.report.units import count, duration, plural
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import ABANDONED_REQUESTS, PROGRESS_LOOPS

_MOST: Final = 12
_CAME: Final = {
    "host_priority_timeout": "the guest ran into host priority's timeout",
    "later_call_failed": "a later call failed for lack of it",
    "kernel_message": "the kernel printed it",
    "settled_later": "another call settled it",
    "none_seen": "nothing that the trace shows",
}
_NO_REQUEST: Final = "No request was captured."


def abandoned(findings: Findings) -> Section:
    """Show what came of requests that were left busy, leaf by leaf."""
    title, about = "What came of requests that were left busy?", definition(ABANDONED_REQUESTS)
    rows = findings.abandoned_requests
    if rows.is_empty():
        none = "No request was left busy in this trace."
        says = [_NO_REQUEST if findings.retry_chains.is_empty() else none]
        return Section("abandoned_requests", title, about, says)
    n = rows.select("source", "first_seq").n_unique()
    counts = dict(rows.group_by("consequence").len().rows())
    told = "; ".join(f"{_CAME[what]}: {count(counts[what])}" for what in _CAME if what in counts)
    says = [f"{plural(n, 'request')} left busy. What came of it: {told}."]
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
        ("TDH.", "requests", "soonest", "latest", "left at rows", "seen at row", "what came of it"),
        [
            (
                leaf_label(row["leaf"]),
                count(row["n"]),
                duration(row["first"]),
                duration(row["last"]),
                row["left"],
                "-" if row["seen"] is None else str(row["seen"]),
                _CAME[row["consequence"]],
            )
            for row in groups.head(_MOST).iter_rows(named=True)
        ],
        right=(1, 2, 3),
        spare=(5, 2),
        caption="Soonest and latest: from the last attempt to what shows it. A request may have "
        "more than one consequence; of the rows the first are named.",
        more=more(groups.height - _MOST, "abandoned-requests"),
    )


def loops(findings: Findings) -> Section:
    """Show what was repeated without a lock being held, and whether it moved on."""
    title, about = "Did anything go round without moving on?", definition(PROGRESS_LOOPS)
    rows = findings.progress_loops
    if rows.is_empty():
        none = "Nothing was repeated without a lock, and no vCPU fell silent after a fault."
        says = [_NO_REQUEST if findings.retry_chains.is_empty() else none]
        return Section("progress_loops", title, about, says)
    counts = dict(rows.group_by("progress").len().rows())
    words = {"seen": "moved on", "not_seen": "did not, as far as is seen", "unknown": "not known"}
    told = ", ".join(f"{count(counts[p])} {words[p]}" for p in words if p in counts)
    says = [f"{plural(rows.height, 'loop')}: {told}."]
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
        ("loop", "TDH.", "loops", "most repeats", "longest", "interrupts", "moved on", "rows"),
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
            for row in groups.head(_MOST).iter_rows(named=True)
        ],
        right=(2, 3, 4, 5),
        spare=(7, 5),
        caption="Local retry: a fault after which the vCPU's thread was silent for long; KVM's own "
        "loop and a thread off its CPU look alike. Interrupts: the most during one loop.",
        more=more(groups.height - _MOST, "progress-loops"),
    )
