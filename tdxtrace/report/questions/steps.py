"""Why did vCPUs fault so often at one instruction, and what would other thresholds do?"""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from tdxtrace.report.charts import thresholds as chart
from tdxtrace.report.names import definition
from tdxtrace.report.sections import Figure, Grid, Section, grid
from tdxtrace.report.units import count, plural, share
from tdxtrace.tables.findings import STEP_THRESHOLDS, ZERO_STEP_CAUSES
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.exit_reasons import STEPPING_EPF_THRESHOLD

_NO_ENTRY: Final = "Cannot be told: no entry of a vCPU was captured."
_BECAUSE: Final = {
    "memory_fault_ignored": "userspace let KVM_EXIT_MEMORY_FAULT pass and entered again",
    "frozen_spte": "another thread was installing the page",
    "invalidation": "the page was being taken away",
    "memslot_change": "a long invalidation, such as a memory slot's, took pages away",
    "left_loop": "KVM met busy and entered the vCPU again with the page still missing",
    "many_pages": "one instruction touched more new pages than the threshold; most were served",
    "pending_page": "the page was there, and not yet accepted by the guest",
    "block_churn": "the host blocked the page and unblocked it as it was",
}


def causes(findings: Findings) -> Section:
    """Show what led to the zero-step episodes, the most frequent cause first."""
    title, about = "What led to zero-step episodes?", definition(ZERO_STEP_CAUSES)
    if findings.vcpu_stats.is_empty():
        return Section("zero_step_causes", title, about, [_NO_ENTRY])
    rows = findings.zero_step_causes
    if rows.is_empty():
        says = ["Nothing did: there is no zero-step episode in this trace."]
        return Section("zero_step_causes", title, about, says)
    groups = _grouped(rows)
    told = "; ".join(
        f"{_named(cause)} {count(n)} ({share(n, rows.height)})"
        for cause, n in groups.select("cause", "n").rows()
    )
    says = [f"{plural(rows.height, 'episode')}: {told}."]
    return Section("zero_step_causes", title, about, says, grids=[_causes(groups)])


def _named(cause: str) -> str:
    return "not known" if cause == "unknown" else cause.replace("_", " ")


def _grouped(rows: pl.DataFrame) -> pl.DataFrame:
    return (
        rows.with_columns(pl.col("cause").cast(pl.String))
        .group_by("cause", maintain_order=True)
        .agg(
            n=pl.len(),
            n_vcpus=pl.struct("source", "tid").n_unique(),
            n_faults=pl.col("n_faults").sum(),
            n_explained=(pl.col("share") * pl.col("n_faults")).sum().round().cast(pl.Int64),
            evidence=pl.col("first_seq").head(3).cast(pl.String).implode().list.join(", "),
            advice=pl.col("advice").drop_nulls().first(),
        )
        .sort("n", "cause", descending=[True, False])
    )


def _causes(groups: pl.DataFrame) -> Grid:
    return grid(
        ("cause", "episodes", "vCPUs", "faults", "explained", "rows", "why, or what would tell"),
        [
            (
                _named(row["cause"]),
                count(row["n"]),
                count(row["n_vcpus"]),
                count(row["n_faults"]),
                share(row["n_explained"], row["n_faults"]),
                row["evidence"],
                _BECAUSE.get(row["cause"]) or row["advice"] or "",
            )
            for row in groups.iter_rows(named=True)
        ],
        right=(1, 2, 3, 4),
        spare=(2, 5),
        caption="Explained: the share of the faults that have this cause; rows are the first that "
        "open an episode.",
    )


def thresholds(findings: Findings) -> Section:
    """Show how many runs of faults go beyond each threshold."""
    title, about = "Would another zero-step threshold do?", definition(STEP_THRESHOLDS)
    rows = chart.threshold_rows(findings.step_thresholds)
    if rows.is_empty():
        return Section("step_thresholds", title, about, [_NO_ENTRY])
    longest = plural(rows["max_run"][0], "fault")
    lowest = rows.row(0, named=True)
    if not lowest["n_runs"]:
        says = [
            f"No run of faults goes beyond {lowest['threshold']}, the lowest that was tried: the "
            f"longest has {longest}."
        ]
        return Section("step_thresholds", title, about, says)
    own = rows.filter(pl.col("threshold") == STEPPING_EPF_THRESHOLD).row(0, named=True)
    says = [
        f"Beyond the module's {STEPPING_EPF_THRESHOLD}: at most {_runs(own)}; the longest run has "
        f"{longest}.",
        *_enough(rows),
    ]
    figures, grids = [], []
    if rows.filter(pl.col("n_runs") > 0)["n_runs"].n_unique() > 2:
        figures = [
            Figure(
                "step_thresholds",
                "Runs of faults that go beyond a threshold",
                f"Dark: the module's own, {STEPPING_EPF_THRESHOLD}. Upper bounds: a trace does not "
                "show where the guest's instruction changes.",
                lambda: chart.runs_beyond(findings.step_thresholds),
            )
        ]
    else:
        grids = [_thresholds(rows)]
    return Section("step_thresholds", title, about, says, figures, grids)


def _runs(row: dict[str, Any]) -> str:
    vcpus = plural(row["n_vcpus"], "vCPU")
    return f"{plural(row['n_runs'], 'run')} on {vcpus}" if row["n_runs"] else "no run"


def _enough(rows: pl.DataFrame) -> list[str]:
    none = rows.filter(pl.col("n_runs") == 0)
    if none.is_empty():
        last = rows.row(-1, named=True)
        return [f"Even beyond {last['threshold']}, the highest that was tried: {_runs(last)}."]
    return [f"With a threshold of {none['threshold'][0]} there would be none."]


def _thresholds(rows: pl.DataFrame) -> Grid:
    some = rows.filter(pl.col("n_runs") > 0)
    shown = rows.head(some.height + 1)
    return grid(
        ("threshold", "runs beyond", "faults beyond", "vCPUs"),
        [
            tuple(map(count, row))
            for row in shown.select("threshold", "n_runs", "n_faults", "n_vcpus").rows()
        ],
        right=range(4),
        caption="Upper bounds: a trace does not show where the guest's instruction changes.",
    )
