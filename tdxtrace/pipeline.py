"""The composition: a Trace in, Findings out; only here do the rooms meet."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import polars as pl

from tdxtrace.analysis.abandoned_requests import abandoned_requests
from tdxtrace.analysis.attempts import attempts
from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.causes.busy_causes import broken_rules, busy_causes
from tdxtrace.analysis.causes.cause_counts import cause_shares, td_conflicts
from tdxtrace.analysis.causes.evidence import BusyEvidence, gather_evidence
from tdxtrace.analysis.causes.generation import chosen_generations
from tdxtrace.analysis.causes.lock_effects import entry_waits, lock_values
from tdxtrace.analysis.comparisons import comparisons
from tdxtrace.analysis.latencies import latencies
from tdxtrace.analysis.progress_loops import progress_loops
from tdxtrace.analysis.related_messages import module_release
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.analysis.selection import Selection
from tdxtrace.analysis.stats import leaf_stats, vcpu_stats, vm_stats
from tdxtrace.analysis.step_thresholds import step_thresholds
from tdxtrace.analysis.time_shares import time_shares
from tdxtrace.analysis.verdicts.verdicts import verdicts
from tdxtrace.analysis.zero_step_causes import zero_step_causes
from tdxtrace.analysis.zero_steps import zero_steps
from tdxtrace.recommend.limits import limits, observed_seconds
from tdxtrace.recommend.replay import policies
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.sql import ask
from tdxtrace.tables.trace import Findings, Trace
from tdxtrace.tdx.locks import generation_of

Question = Callable[[Findings], pl.DataFrame]


def analyze(
    trace: Trace,
    selection: Selection | None = None,
    *,
    module: str | None = None,
    generation: str | None = None,
) -> Findings:
    """Answer every question that ``trace`` can answer.

    Chains and episodes are always found over the whole trace, since what a thread
    did in between decides what belongs together; ``selection`` then picks among
    the findings.

    Args:
        trace: What was recorded.
        selection: Which TDs, leaves and times to keep; all by default.
        module: Release of the TDX module, such as 1.5.16, where it is known.
        generation: Its lock generation, A, B or C, instead.

    Returns:
        One finding table per question, and the losses that bound the answers.

    Raises:
        QueryError: If the selection names a TD or leaf that the trace does not have, or
            the locks of the module are not known.
        TableError: If a table of ``trace`` is not what it is declared to be.

    Example:
        >>> import tdxtrace
        >>> findings = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> findings.retry_chains["n_attempts"].max()
        64
    """
    chosen = selection or Selection()
    trace.defragment()
    known = _generation(trace, module, generation)
    mask = chosen_generations(module, known if generation is None else generation)
    said = {n: v for n, v in (("module", module), ("generation", generation)) if v is not None}
    every = retry_chains(trace.seamcalls, trace.losses)
    chains = chosen.filter(every, trace)
    steps = zero_steps(trace.seamcalls, trace.vm_entries, trace.page_faults, trace.host_events)
    steps = chosen.filter(steps, trace)
    entries = chosen.filter(trace.vm_entries, trace)
    calls = chosen.filter(trace.seamcalls, trace)
    return Findings(
        retry_chains=chains,
        leaf_stats=leaf_stats(chains),
        zero_steps=steps,
        vm_stats=vm_stats(chains, steps),
        vcpu_stats=vcpu_stats(calls, entries, steps),
        threads=trace.threads,
        losses=trace.losses,
        provenance=trace.provenance,
        options=chosen.to_dict() | said,
        kernel_messages=trace.kernel_messages,
        _questions=_causes(trace, chosen, every, mask)
        | _aftermath(trace, chosen, known)
        | _retries(trace, every),
    )


def query(trace: Trace, statement: str, selection: Selection | None = None) -> pl.DataFrame:
    """Answer a question in SQL, over every event and finding table of ``trace``.

    Args:
        trace: What was recorded; it is analysed only if the statement names a finding.
        statement: One SELECT in the dialect of polars.
        selection: Which TDs, leaves and times the tables hold; all by default.

    Raises:
        QueryError: If the statement is not understood, or the selection names a TD or
            leaf that the trace does not have.

    Example:
        >>> import tdxtrace
        >>> trace = tdxtrace.read_trace("sample_traces/contended.txt")
        >>> tdxtrace.query(trace, "select count(*) from seamcalls").item()
        2011
    """
    chosen = selection or Selection()
    findings: list[Findings] = []

    def find(name: str) -> pl.DataFrame:
        if name in _EVENTS:
            return chosen.filter(getattr(trace, name), trace)
        if not findings:
            findings.append(analyze(trace, chosen))
        found: pl.DataFrame = getattr(findings[0], name)
        return found

    return ask(statement, _EVENTS | {table.name: table for table in FINDING_TABLES}, find)


def compare(before: Findings, after: Findings) -> pl.DataFrame:
    """Say which differences between two traces the data supports.

    Args:
        before: What was found in the one.
        after: In the other.

    Returns:
        The ``comparisons`` table.

    Example:
        >>> import tdxtrace
        >>> found = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> set(tdxtrace.compare(found, found)["change"])
        {'not_told'}
    """
    return comparisons(before.attempts, after.attempts)


_EVENTS = {table.name: table for table in EVENT_TABLES}


def _causes(trace: Trace, chosen: Selection, every: pl.DataFrame, mask: int) -> dict[str, Question]:
    """How the tables about causes are found: what they rest on is looked at once."""

    @cache
    def evidence() -> tuple[BusyEvidence, ...]:
        return tuple(gather_evidence(trace, mask=mask))

    @cache
    def causes() -> pl.DataFrame:
        return busy_causes(evidence())

    return {
        "busy_causes": lambda _: chosen.filter(causes(), trace),
        "cause_shares": lambda findings: cause_shares(findings.busy_causes),
        "broken_rules": lambda _: chosen.filter(broken_rules(evidence()), trace),
        # A queue is made of all that waits in it: the lock is weighed on the whole trace.
        "lock_values": lambda findings: lock_values(evidence(), causes(), every).join(
            findings.retry_chains, on=("source", "td_id", "leaf"), how="semi", nulls_equal=True
        ),
        "entry_waits": lambda _: chosen.filter(entry_waits(evidence()), trace),
    }


def _generation(trace: Trace, module: str | None, generation: str | None) -> str | None:
    """The module's lock generation: as the user says, else as the kernel's log does."""
    if generation is not None or module is not None:
        return generation.upper() if generation is not None else generation_of(module or "")
    release = module_release(trace.kernel_messages)
    return release[1] if release else None


def _aftermath(trace: Trace, chosen: Selection, generation: str | None) -> dict[str, Question]:
    """How the tables about what came of busy answers are found, and the verdicts on all."""
    calls, entries, faults = trace.seamcalls, trace.vm_entries, trace.page_faults

    def asked_for(*tables: pl.DataFrame) -> list[pl.DataFrame]:
        return [chosen.filter(table, trace) for table in tables]

    return {
        "zero_step_causes": lambda f: zero_step_causes(
            f.zero_steps, calls, entries, faults, trace.host_events
        ),
        "step_thresholds": lambda _: step_thresholds(*asked_for(calls, entries, faults)),
        "abandoned_requests": lambda f: abandoned_requests(trace, f.retry_chains),
        "progress_loops": lambda f: progress_loops(trace, f.retry_chains),
        "td_conflicts": lambda f: td_conflicts(f.busy_causes),
        "time_shares": lambda f: time_shares(chosen.filter(calls, trace), f.retry_chains),
        "verdicts": lambda f: verdicts(f, trace, generation=generation),
    }


def _retries(trace: Trace, every: pl.DataFrame) -> dict[str, Question]:
    """How the tables about the number of retries are found."""
    return {
        "busy_answers": lambda found: _answers_of(trace, every, found),
        "attempts": lambda found: attempts(
            found.retry_chains, found.busy_answers, found.busy_causes
        ),
        "latencies": lambda found: latencies(
            trace.seamcalls, found.retry_chains, found.busy_answers
        ),
        "policies": lambda found: policies(found.retry_chains, found.busy_answers),
        "limits": _limits,
    }


def _answers_of(trace: Trace, every: pl.DataFrame, found: Findings) -> pl.DataFrame:
    """The busy answers of the chains that were asked for, placed by all of them."""
    answers = busy_answers(trace.seamcalls, every)
    met = found.retry_chains.filter(pl.col("n_busy") > 0)
    return answers.join(met, on=("source", "first_seq"), how="semi", maintain_order="left")


def _limits(found: Findings) -> pl.DataFrame:
    """The limits for the default target."""
    seconds = observed_seconds(found.provenance)
    return limits(found.attempts, found.retry_chains, found.losses, seconds)
