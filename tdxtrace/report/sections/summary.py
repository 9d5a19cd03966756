"""Summary section: counts, verdicts and recommendation in a few sentences."""

from __future__ import annotations

import polars as pl

from tdxtrace.report.counts import n_cut_by_losses
from tdxtrace.report.findings_text import next_steps
from tdxtrace.report.limits_text import supported_line
from tdxtrace.report.names import leaf_label
from tdxtrace.report.section import Section
from tdxtrace.report.sections import verdicts
from tdxtrace.report.units import count, duration, plural, share, total
from tdxtrace.tables.trace import Findings


def section(findings: Findings) -> Section:
    """Return the summary: problems, calls and retries, limits, losses, and the next command."""
    return Section(
        name="short",
        title="Summary",
        definition="",
        says=[
            *_problems(findings),
            *retried(findings),
            *_zero_steps(findings),
            *limit(findings),
            *_lost(findings),
            *_next(findings),
        ],
        is_always_shown=True,
    )


def retried(findings: Findings) -> list[str]:
    """Return the number of retried requests, and the most attempts that one needed."""
    stats = findings.leaf_stats
    if stats.is_empty():
        has_vcpus = findings.vcpu_stats.height > 0
        seen = "only KVM's own events" if has_vcpus else "and no entry of a vCPU"
        return [f"No SEAMCALL was captured, {seen}: retries cannot be analyzed."]
    n, n_retried = total(stats, "n_requests"), total(stats, "retried_seamcalls")
    calls = total(stats, "n_seamcalls")
    seen = f"{plural(calls, 'SEAMCALL')} served {plural(n, 'request')}"
    if not n_retried:
        return [f"{seen}; none was answered busy."]
    worst = stats.sort("max_attempts", "leaf", descending=[True, False]).row(0, named=True)
    longest = stats.drop_nulls("max_ns").sort("max_ns", "leaf", descending=[True, False]).head(1)
    sentences = [
        f"{seen}; retried: {count(n_retried)} ({share(n_retried, n)}).",
        f"Maximum attempts of one request: {count(worst['max_attempts'])} "
        f"(TDH.{leaf_label(worst['leaf'])}).",
    ]
    for row in longest.iter_rows(named=True):
        leaf = leaf_label(row["leaf"])
        sentences.append(f"The longest request took {duration(row['max_ns'])} (TDH.{leaf}).")
    abandoned = total(stats, "abandoned")
    if abandoned:
        sentences.append(
            f"{plural(abandoned, 'request')} {'was' if abandoned == 1 else 'were'} abandoned busy, "
            "and not completed by another thread."
        )
    return sentences


def _zero_steps(findings: Findings) -> list[str]:
    if findings.vcpu_stats.is_empty():
        return []
    steps = findings.zero_steps
    n_certain = steps.filter(pl.col("strength") != "weak").height
    n_weak = steps.height - n_certain
    if not steps.height:
        return ["Zero-step mitigation refused no vCPU entry."]
    if not n_certain:
        signs = plural(n_weak, "weak sign")
        return [f"No vCPU entry was certainly refused by zero-step mitigation; {signs}."]
    text = f"Zero-step mitigation refused entries of a vCPU in {plural(n_certain, 'episode')}"
    return [text + (f"; {count(n_weak)} more have weak evidence." if n_weak else ".")]


def _problems(findings: Findings) -> list[str]:
    is_empty = findings.leaf_stats.is_empty() and findings.verdicts.is_empty()
    return [] if is_empty else [verdicts.headline(findings)]


def limit(findings: Findings) -> list[str]:
    """Return the limit that the trace supports, if a SEAMCALL was captured."""
    if findings.leaf_stats.is_empty():
        return []
    line = supported_line(findings)
    return [f"{line[0].upper()}{line[1:]}."]


def _lost(findings: Findings) -> list[str]:
    data_losses = findings.losses.filter(pl.col("severity") != "info")
    if data_losses.is_empty():
        return []
    cut = n_cut_by_losses(findings)
    return [f"Events were lost: {plural(cut, 'request')} cut by it (see Data quality)."]


def _next(findings: Findings) -> list[str]:
    return [f"Next: {step}" for step in next_steps(findings)[:1]]
