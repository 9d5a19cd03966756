"""The composition: a Trace in, Findings out; only here do the rooms meet."""

from __future__ import annotations

import polars as pl

from tdxtrace.analysis.attempts import attempts
from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.latencies import latencies
from tdxtrace.analysis.leaf_stats import leaf_stats
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.analysis.selection import Selection
from tdxtrace.analysis.vcpu_stats import vcpu_stats
from tdxtrace.analysis.vm_stats import vm_stats
from tdxtrace.analysis.zero_steps import zero_steps
from tdxtrace.recommend.limits import limits, observed_seconds
from tdxtrace.recommend.replay import policies
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
    every = retry_chains(trace.seamcalls, trace.losses)
    chains = chosen.of(every, trace)
    steps = zero_steps(trace.seamcalls, trace.vm_entries, trace.page_faults, trace.host_events)
    steps = chosen.of(steps, trace)
    entries = chosen.of(trace.vm_entries, trace)
    calls = chosen.of(trace.seamcalls, trace)
    return Findings(
        retry_chains=chains,
        leaf_stats=leaf_stats(chains),
        zero_steps=steps,
        vm_stats=vm_stats(chains, steps),
        vcpu_stats=vcpu_stats(calls, entries, steps),
        threads=trace.threads,
        losses=trace.losses,
        provenance=trace.provenance,
        options=chosen.to_dict(),
        _questions={
            "busy_answers": lambda found: _answers_of(trace, every, found),
            "attempts": lambda found: attempts(found.retry_chains, found.busy_answers),
            "latencies": lambda found: latencies(calls, found.retry_chains, found.busy_answers),
            "policies": lambda found: policies(found.retry_chains, found.busy_answers),
            "limits": _limits,
        },
    )


def _answers_of(trace: Trace, every: pl.DataFrame, found: Findings) -> pl.DataFrame:
    """The busy answers of the chains that were asked for, placed by all of them."""
    answers = busy_answers(trace.seamcalls, every)
    return answers.join(
        found.retry_chains, on=("source", "first_seq"), how="semi", maintain_order="left"
    )


def _limits(found: Findings) -> pl.DataFrame:
    """The limits for the default target."""
    seconds = observed_seconds(found.provenance)
    return limits(found.attempts, found.retry_chains, found.losses, seconds)
