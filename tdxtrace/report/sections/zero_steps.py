"""Sections on zero-step episodes, their causes, other thresholds, and on VMs and vCPUs."""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from tdxtrace.report.charts import limits as chart
from tdxtrace.report.counts import counts
from tdxtrace.report.names import Threads, definition
from tdxtrace.report.section import Figure, Grid, Section, grid, more
from tdxtrace.report.units import count, duration, plural, seconds, share, total, word
from tdxtrace.tables.findings import STEP_THRESHOLDS, VCPU_STATS, ZERO_STEP_CAUSES, ZERO_STEPS
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.exit_reasons import STEPPING_EPF_THRESHOLD

_MAX_ROWS: Final = 20
_UPPER_BOUNDS: Final = "Upper bounds: a trace does not show where the guest's instruction changes."
_NO_ENTRY: Final = "Unknown: no entry of a vCPU was captured."
_REASONS: Final = {
    "memory_fault_ignored": "userspace ignored KVM_EXIT_MEMORY_FAULT and entered again",
    "frozen_spte": "another thread was installing the page",
    "invalidation": "the page was being removed",
    "memslot_change": "a long invalidation, such as that of a memory slot, removed pages",
    "left_loop": "KVM got a busy answer and entered the vCPU with the page still missing",
    "many_pages": "one instruction touched more new pages than the threshold; most were installed",
    "pending_page": "the page was installed, but not yet accepted by the guest",
    "block_churn": "the host blocked the page and unblocked it unchanged, with no other call",
    "block_undone": "the host blocked the page for an operation that failed, and unblocked it",
}


def section(findings: Findings) -> Section:
    """Return the section on the episodes, those with the most refused entries first."""
    steps = findings.zero_steps
    return Section(
        "zero_steps",
        "Zero-step episodes",
        definition(ZERO_STEPS),
        [_sentences(findings)],
        grids=[] if steps.is_empty() else [_episodes(findings)],
    )


def _sentences(findings: Findings) -> str:
    steps = findings.zero_steps
    if findings.vcpu_stats.is_empty():
        return _NO_ENTRY
    if steps.is_empty():
        entries = plural(total(findings.vcpu_stats, "n_entries"), "entry", "entries")
        return f"No episode in {entries} of vCPUs."
    by = {s: steps.filter(pl.col("strength") == s).height for s in ("proof", "strong", "weak")}
    by_strength = ", ".join(f"{count(n)} {strength}" for strength, n in by.items() if n)
    n_vcpus = steps.select("source", "tid", "vp_id", "vcpu_id").n_unique()
    refused = plural(total(steps, "n_refused"), "entry", "entries")
    return (
        f"{plural(steps.height, 'episode')} ({by_strength}) on {plural(n_vcpus, 'vCPU')}; "
        f"refused: {refused}."
    )


def _episodes(findings: Findings) -> Grid:
    threads = Threads(findings)
    steps = findings.zero_steps.sort("n_refused", "first_seq", descending=[True, False])
    return grid(
        ("vCPU", "from, s", "lasted", "refused", "faults before", "page", "form", "rows", "ended"),
        [
            (
                threads.label(row["source"], row["tid"]),
                seconds(row["start_ns"]),
                duration(row["end_ns"] - row["start_ns"]),
                count(row["n_refused"]),
                count(row["n_faults_before"]),
                word(row["gpa"]),
                f"{row['form']} ({row['strength']})",
                f"{row['first_seq']} to {row['last_seq']}",
                row["ended"],
            )
            for row in steps.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=(1, 2, 3, 4, 7),
        droppable=(5, 1, 4),
        caption="Sorted by refused entries; rows are lines or records of the input.",
        more=more(steps.height - _MAX_ROWS, "zero-steps"),
    )


def vcpus(findings: Findings) -> Section:
    """Return the section on entries and refusals of each vCPU, and counters of each TD."""
    stats = findings.vcpu_stats.sort(
        "n_refused", "n_entries", "source", "tid", descending=[True, True, False, False]
    )
    says = ["No entry of a vCPU was captured."]
    if stats.height:
        entries, refused = total(stats, "n_entries"), total(stats, "n_refused")
        found = counts(findings)
        of = plural(entries, "entry", "entries")
        vms = f" of {found.vms}" if found.n_vms else ""
        says = [f"{plural(found.vcpus, 'vCPU')}{vms}: {count(refused)} of {of} refused."]
    return Section(
        "vcpu_stats",
        "VMs and vCPUs",
        definition(VCPU_STATS),
        says,
        grids=[*_vms(findings), *_vcpus(findings, stats)],
    )


def _vcpus(findings: Findings, stats: pl.DataFrame) -> list[Grid]:
    if stats.is_empty():
        return []
    threads = Threads(findings)
    return [
        grid(
            ("vCPU", "TD", "entries", "refused", "zero-step", "weak evidence"),
            [
                (
                    threads.label(row["source"], row["tid"]),
                    word(row["td_id"]),
                    count(row["n_entries"]),
                    count(row["n_refused"]),
                    count(row["zero_steps"]),
                    count(row["zero_steps_weak"]),
                )
                for row in stats.head(_MAX_ROWS).iter_rows(named=True)
            ],
            right=(2, 3, 4, 5),
            more=f"{count(stats.height - _MAX_ROWS)} more vCPUs"
            if stats.height > _MAX_ROWS
            else "",
        )
    ]


def _vms(findings: Findings) -> list[Grid]:
    stats = findings.vm_stats
    if stats.is_empty():
        return []
    return [
        grid(
            ("TD", "process", "SEAMCALLs", "requests", "retried", "max attempts", "zero-step"),
            [
                (
                    word(row["td_id"]),
                    "-" if row["tgid"] is None else str(row["tgid"]),
                    count(row["n_seamcalls"]),
                    count(row["n_requests"]),
                    count(row["retried_seamcalls"]),
                    count(row["max_attempts"]),
                    count(row["zero_steps"]),
                )
                for row in stats.head(_MAX_ROWS).iter_rows(named=True)
            ],
            right=(2, 3, 4, 5, 6),
            droppable=(5,),
            more=f"{count(stats.height - _MAX_ROWS)} more TDs" if stats.height > _MAX_ROWS else "",
        )
    ]


def causes(findings: Findings) -> Section:
    """Return the section on the causes of the zero-step episodes, the most frequent first."""
    title, about = "Causes of zero-step episodes", definition(ZERO_STEP_CAUSES)
    if findings.vcpu_stats.is_empty():
        return Section("zero_step_causes", title, about, [_NO_ENTRY])
    rows = findings.zero_step_causes
    if rows.is_empty():
        says = ["There is no zero-step episode in this trace."]
        return Section("zero_step_causes", title, about, says)
    groups = _grouped(rows)
    parts = "; ".join(
        f"{cause.replace('_', ' ')} {count(n)} ({share(n, rows.height)})"
        for cause, n in groups.select("cause", "n").rows()
    )
    says = [f"{plural(rows.height, 'episode')}: {parts}."]
    return Section("zero_step_causes", title, about, says, grids=[_causes(groups)])


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
        ("cause", "episodes", "vCPUs", "faults", "explained", "rows", "reason or advice"),
        [
            (
                row["cause"].replace("_", " "),
                count(row["n"]),
                count(row["n_vcpus"]),
                count(row["n_faults"]),
                share(row["n_explained"], row["n_faults"]),
                row["evidence"],
                _REASONS.get(row["cause"]) or row["advice"] or "",
            )
            for row in groups.iter_rows(named=True)
        ],
        right=(1, 2, 3, 4),
        droppable=(2, 5),
        caption="Explained: share of the faults with this cause; rows are the first rows of "
        "episodes.",
    )


def thresholds(findings: Findings) -> Section:
    """Return the section on the runs of faults that exceed each threshold."""
    title, about = "Effect of other zero-step thresholds", definition(STEP_THRESHOLDS)
    rows = chart.threshold_rows(findings.step_thresholds)
    if rows.is_empty():
        return Section("step_thresholds", title, about, [_NO_ENTRY])
    longest = plural(rows["max_run"][0], "fault")
    lowest = rows.row(0, named=True)
    if not lowest["n_runs"]:
        says = [
            f"No run of faults exceeds {lowest['threshold']}, the lowest threshold tried: the "
            f"longest has {longest}."
        ]
        return Section("step_thresholds", title, about, says)
    own = rows.filter(pl.col("threshold") == STEPPING_EPF_THRESHOLD).row(0, named=True)
    says = [
        f"Above the module's threshold of {STEPPING_EPF_THRESHOLD}: at most {_runs(own)}; the "
        f"longest run has {longest}.",
        *_enough(rows),
    ]
    figures, grids = [], []
    if rows.filter(pl.col("n_runs") > 0)["n_runs"].n_unique() > 2:
        figures = [
            Figure(
                "step_thresholds",
                "Runs of faults that exceed a threshold",
                f"Dark: the module's threshold, {STEPPING_EPF_THRESHOLD}. {_UPPER_BOUNDS}",
                lambda: chart.runs_above(findings.step_thresholds),
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
        return [f"Above {last['threshold']}, the highest threshold tried: still {_runs(last)}."]
    return [f"With a threshold of {none['threshold'][0]} there would be none."]


def _thresholds(rows: pl.DataFrame) -> Grid:
    some = rows.filter(pl.col("n_runs") > 0)
    shown = rows.head(some.height + 1)
    return grid(
        ("threshold", "runs above", "faults above", "vCPUs"),
        [
            tuple(map(count, row))
            for row in shown.select("threshold", "n_runs", "n_faults", "n_vcpus").rows()
        ],
        right=range(4),
        caption=_UPPER_BOUNDS,
    )
