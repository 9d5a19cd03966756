"""Where did zero-step mitigation keep a vCPU from entering?"""

from __future__ import annotations

import polars as pl

from tdxtrace.report.names import Threads, definition
from tdxtrace.report.sections import Grid, Section, grid, more
from tdxtrace.report.units import count, duration, plural, seconds, total, word
from tdxtrace.tables.findings import VCPU_STATS, ZERO_STEPS
from tdxtrace.tables.trace import Findings

_MOST = 20


def section(findings: Findings) -> Section:
    """Show the episodes, the most refused entries first."""
    steps = findings.zero_steps
    return Section(
        "zero_steps",
        "Where did zero-step mitigation strike?",
        definition(ZERO_STEPS),
        [_says(findings)],
        grids=[] if steps.is_empty() else [_episodes(findings)],
    )


def _says(findings: Findings) -> str:
    steps = findings.zero_steps
    if findings.vcpu_stats.is_empty():
        return "Cannot be told: no entry of a vCPU was captured."
    if steps.is_empty():
        entries = plural(total(findings.vcpu_stats, "n_entries"), "entry", "entries")
        return f"Nowhere: no episode was found in {entries} of vCPUs."
    by = {s: steps.filter(pl.col("strength") == s).height for s in ("proof", "strong", "weak")}
    sure = ", ".join(f"{count(n)} {strength}" for strength, n in by.items() if n)
    n_vcpus = steps.select("source", "tid", "vp_id", "vcpu_id").n_unique()
    refused = plural(total(steps, "n_refused"), "entry", "entries")
    return (
        f"{plural(steps.height, 'episode')} ({sure}) on {plural(n_vcpus, 'vCPU')}; "
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
            for row in steps.head(_MOST).iter_rows(named=True)
        ],
        right=(1, 2, 3, 4, 7),
        spare=(5, 1, 4),
        caption="The most refused entries first; rows are lines or records of the input.",
        more=more(steps.height - _MOST, "zero-steps"),
    )


def vcpus(findings: Findings) -> Section:
    """Show entries and refusals of each vCPU, and each TD's counters."""
    stats = findings.vcpu_stats.sort(
        "n_refused", "n_entries", "source", "tid", descending=[True, True, False, False]
    )
    says = ["No entry of a vCPU was captured."]
    if stats.height:
        entries, refused = total(stats, "n_entries"), total(stats, "n_refused")
        n_vms = findings.vm_stats.height
        vms = f" of {plural(n_vms, 'VM')}" if n_vms else ""
        of = plural(entries, "entry", "entries")
        says = [f"{plural(stats.height, 'vCPU')}{vms}: {count(refused)} of {of} refused."]
    return Section(
        "vcpu_stats",
        "Which VMs and vCPUs are concerned?",
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
            ("vCPU", "TD", "entries", "refused", "zero-step", "weak signs"),
            [
                (
                    threads.label(row["source"], row["tid"]),
                    word(row["td_id"]),
                    count(row["n_entries"]),
                    count(row["n_refused"]),
                    count(row["zero_steps"]),
                    count(row["zero_steps_weak"]),
                )
                for row in stats.head(_MOST).iter_rows(named=True)
            ],
            right=(2, 3, 4, 5),
            more=f"{count(stats.height - _MOST)} more vCPUs" if stats.height > _MOST else "",
        )
    ]


def _vms(findings: Findings) -> list[Grid]:
    stats = findings.vm_stats
    if stats.is_empty():
        return []
    return [
        grid(
            ("TD", "process", "SEAMCALLs", "requests", "retried", "most attempts", "zero-step"),
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
                for row in stats.head(_MOST).iter_rows(named=True)
            ],
            right=(2, 3, 4, 5, 6),
            spare=(5,),
            more=f"{count(stats.height - _MOST)} more TDs" if stats.height > _MOST else "",
        )
    ]
