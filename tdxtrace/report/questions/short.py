"""What is the answer in short?"""

from __future__ import annotations

import polars as pl

from tdxtrace.report import advice
from tdxtrace.report.names import leaf_label
from tdxtrace.report.questions import limits, verdicts
from tdxtrace.report.sections import Section
from tdxtrace.report.units import count, duration, plural, share, total
from tdxtrace.tables.trace import Findings


def section(findings: Findings) -> Section:
    """Say how much was seen, how often it was retried, and what to look at next."""
    return Section(
        name="short",
        title="In short",
        definition="",
        says=[
            *_retried(findings),
            *_zero_steps(findings),
            *_judged(findings),
            *_lost(findings),
            *_next(findings),
        ],
    )


def _retried(findings: Findings) -> list[str]:
    stats = findings.leaf_stats
    if stats.is_empty():
        has_vcpus = findings.vcpu_stats.height > 0
        seen = "only KVM's own events" if has_vcpus else "and no entry of a vCPU"
        return [f"No SEAMCALL was captured, {seen}: nothing can be said of retries."]
    n, retried = total(stats, "n_requests"), total(stats, "retried_seamcalls")
    calls = total(stats, "n_seamcalls")
    seen = f"{plural(calls, 'SEAMCALL')} served {plural(n, 'request')}"
    if not retried:
        return [f"{seen}; nothing was answered busy."]
    worst = stats.sort("max_attempts", "leaf", descending=[True, False]).row(0, named=True)
    longest = stats.drop_nulls("max_ns").sort("max_ns", "leaf", descending=[True, False]).head(1)
    said = [
        f"{seen}; retried: {count(retried)} ({share(retried, n)}).",
        f"The most attempts one request took: {count(worst['max_attempts'])} "
        f"(TDH.{leaf_label(worst['leaf'])}).",
    ]
    for row in longest.iter_rows(named=True):
        leaf = leaf_label(row["leaf"])
        said.append(f"The longest request took {duration(row['max_ns'])} (TDH.{leaf}).")
    abandoned = total(stats, "abandoned")
    if abandoned:
        said.append(
            f"{plural(abandoned, 'request')} met busy and nobody settled "
            f"{'it' if abandoned == 1 else 'them'} afterwards."
        )
    return said


def _zero_steps(findings: Findings) -> list[str]:
    if findings.vcpu_stats.is_empty():
        return []
    steps = findings.zero_steps
    sure = steps.filter(pl.col("strength") != "weak").height
    weak = steps.height - sure
    if not steps.height:
        return ["Zero-step mitigation kept no vCPU from entering."]
    text = f"Zero-step mitigation kept a vCPU out in {plural(sure, 'episode')}"
    return [text + (f"; {count(weak)} more are weak signs." if weak else ".")]


def _judged(findings: Findings) -> list[str]:
    """Verdicts and the recommendation, where there is something to judge."""
    if findings.leaf_stats.is_empty():
        return []
    return [*verdicts.says(findings), *limits.says(findings)]


def _lost(findings: Findings) -> list[str]:
    bad = findings.losses.filter(pl.col("severity") != "info")
    if bad.is_empty():
        return []
    cut = findings.retry_chains.filter(pl.col("cut_by") == "lost_events").height
    return [f"Events were lost: {plural(cut, 'request')} cannot be told whole (see Data quality)."]


def _next(findings: Findings) -> list[str]:
    return [f"Next: {step}" for step in advice.next_steps(findings)[:1]]
