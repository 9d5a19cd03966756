"""The composition: a Trace in, Findings out; only here do the rooms meet."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from tdxtrace.analysis.abandoned_requests import abandoned_requests
from tdxtrace.analysis.leaf_stats import leaf_stats
from tdxtrace.analysis.progress_loops import progress_loops
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.analysis.selection import Selection
from tdxtrace.analysis.step_thresholds import step_thresholds
from tdxtrace.analysis.td_conflicts import td_conflicts
from tdxtrace.analysis.time_shares import time_shares
from tdxtrace.analysis.vcpu_stats import vcpu_stats
from tdxtrace.analysis.verdicts.verdicts import verdicts
from tdxtrace.analysis.vm_stats import vm_stats
from tdxtrace.analysis.zero_step_causes import zero_step_causes
from tdxtrace.analysis.zero_steps import zero_steps
from tdxtrace.tables.causes import BROKEN_RULES, BUSY_CAUSES
from tdxtrace.tables.trace import Findings, Trace


def analyze(trace: Trace, selection: Selection | None = None) -> Findings:
    """Answer every question that ``trace`` can answer.

    Chains and episodes are always found over the whole trace, since what a thread
    did in between decides what belongs together; ``selection`` then picks among
    the findings.

    Args:
        trace: What was recorded.
        selection: Which TDs, leaves and times to keep; all by default.

    Returns:
        One finding table per question, and the losses that bound the answers.

    Raises:
        QueryError: If the selection names a TD or leaf that the trace does not have.
        TableError: If a table of ``trace`` is not what it is declared to be.

    Example:
        >>> import tdxtrace
        >>> findings = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> findings.retry_chains["n_attempts"].max()
        64
    """
    chosen = selection or Selection()
    chains = chosen.of(retry_chains(trace.seamcalls, trace.losses), trace)
    steps = zero_steps(trace.seamcalls, trace.vm_entries, trace.page_faults, trace.host_events)
    steps = chosen.of(steps, trace)
    entries = chosen.of(trace.vm_entries, trace)
    calls = chosen.of(trace.seamcalls, trace)
    return Findings(
        _questions=_questions(trace),
        retry_chains=chains,
        leaf_stats=leaf_stats(chains),
        zero_steps=steps,
        vm_stats=vm_stats(chains, steps),
        vcpu_stats=vcpu_stats(calls, entries, steps),
        threads=trace.threads,
        losses=trace.losses,
        provenance=trace.provenance,
        options=chosen.to_dict(),
        kernel_messages=trace.kernel_messages,
    )


def _questions(trace: Trace) -> dict[str, Callable[[Findings], pl.DataFrame]]:
    """How answers are found that are not found until somebody asks."""
    calls, entries, faults = trace.seamcalls, trace.vm_entries, trace.page_faults
    return {
        "zero_step_causes": lambda f: zero_step_causes(
            f.zero_steps, calls, entries, faults, trace.host_events
        ),
        "step_thresholds": lambda _: step_thresholds(calls, entries, faults),
        "abandoned_requests": lambda f: abandoned_requests(trace, f.retry_chains),
        "progress_loops": lambda f: progress_loops(trace, f.retry_chains),
        "td_conflicts": lambda f: td_conflicts(_causes(f)),
        "time_shares": lambda f: time_shares(calls, f.retry_chains),
        "verdicts": lambda f: verdicts(f, trace, _causes(f), BROKEN_RULES.empty()),
    }


def _causes(findings: Findings) -> pl.DataFrame:
    known = "busy_causes" in findings._questions
    return findings._answer("busy_causes") if known else BUSY_CAUSES.empty()
