"""Composition of all analyses: a Trace in, Findings out; only here do the rooms meet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Final

import polars as pl

from tdxtrace.analysis.abandoned_requests import abandoned_requests
from tdxtrace.analysis.attempts import attempts
from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.causes.busy_causes import (
    broken_rules,
    cause_shares,
    scan_busy_causes,
    td_conflicts,
)
from tdxtrace.analysis.causes.evidence import BusyEvidence, gather_evidence
from tdxtrace.analysis.causes.generation import chosen_generations, module_release
from tdxtrace.analysis.causes.lock_effects import entry_waits, lock_values
from tdxtrace.analysis.comparisons import comparisons
from tdxtrace.analysis.latencies import latencies
from tdxtrace.analysis.progress_loops import progress_loops
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.analysis.selection import Selection
from tdxtrace.analysis.stats import leaf_stats, vcpu_stats, vm_stats
from tdxtrace.analysis.step_thresholds import step_thresholds
from tdxtrace.analysis.time_shares import time_shares
from tdxtrace.analysis.verdicts.verdicts import verdicts
from tdxtrace.analysis.zero_step_causes import zero_step_causes
from tdxtrace.analysis.zero_steps import zero_steps
from tdxtrace.errors import InputError
from tdxtrace.recommend.limits import limits, observed_seconds
from tdxtrace.recommend.replay import policies
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.memory import free_bytes, shown_size
from tdxtrace.tables.sql import run_query
from tdxtrace.tables.trace import Findings, Trace
from tdxtrace.tdx.releases import generation_of

Finder = Callable[[Findings], pl.DataFrame | pl.LazyFrame]
Step = Callable[[str, int], AbstractContextManager[None]]


def _untold(_name: str, _n_events: int) -> AbstractContextManager[None]:
    return nullcontext()


def analyze(
    trace: Trace,
    selection: Selection | None = None,
    *,
    module: str | None = None,
    generation: str | None = None,
    memory: int | None = None,
    step: Step = _untold,
) -> Findings:
    """Run every analysis of ``trace``.

    Chains and episodes are always found over the whole trace, since the other calls of a
    thread decide what belongs together; ``selection`` then filters the findings.

    Args:
        trace: The recorded events.
        selection: TDs, leaves and times to keep; all by default.
        module: Release of the TDX module, such as 1.5.16, where it is known.
        generation: Its lock generation, A, B or C, instead.
        memory: Bytes of memory that may be taken; None: what is free.
        step: Called with the name of each step and its number of events; its result is a context
            in which the step runs.

    Returns:
        One finding table per analysis, and the losses that bound the answers.

    Raises:
        QueryError: If the selection names a TD or leaf that the trace does not have, or
            the locks of the module are not known.
        InputError: If the analysis needs more memory; so does the access to a table that does.
        TableError: If a table of ``trace`` does not match its declaration.

    Example:
        >>> import tdxtrace
        >>> findings = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> findings.retry_chains["n_attempts"].max()
        64
    """
    selected = selection or Selection()
    begin = partial(_begin, trace, memory, step)
    known_generation = _generation(trace, module, generation)
    mask = chosen_generations(module, known_generation if generation is None else generation)
    given = {n: v for n, v in (("module", module), ("generation", generation)) if v is not None}
    with begin("retry_chains"):
        trace.defragment()
        all_chains = retry_chains(trace.seamcalls, trace.losses)
        chains = selected.filter(all_chains, trace)
        steps = zero_steps(
            trace.seamcalls, trace.vm_entries, trace.page_faults, trace.host_events, trace.losses
        )
        steps = selected.filter(steps, trace)
        entries = selected.filter(trace.vm_entries, trace)
        calls = selected.filter(trace.seamcalls, trace)
    return Findings(
        retry_chains=chains,
        leaf_stats=leaf_stats(chains),
        zero_steps=steps,
        vm_stats=vm_stats(chains, steps),
        vcpu_stats=vcpu_stats(calls, entries, steps),
        threads=trace.threads,
        losses=trace.losses,
        provenance=trace.provenance,
        options=selected.to_dict() | given,
        kernel_messages=trace.kernel_messages,
        loader_calls=selected.of_host(trace.loader_calls, trace),
        _analyses={
            name: partial(_found, begin, name, find)
            for name, find in (
                _cause_finders(trace, selected, all_chains, mask)
                | _outcome_finders(trace, selected, known_generation)
                | _retry_finders(trace, all_chains)
            ).items()
        },
    )


# Bytes that finding a table takes for each attempt and vCPU entry, beyond the tables before it:
# python tests/bench/memory.py, of 12 M events with 4.2 M busy answers.
_BYTES_PER_EVENT: Final = {"retry_chains": 230, "busy_causes": 400}
# Reading the tables from a store, before any is found.
_BYTES_READ: Final = 100


def _found(
    begin: Callable[[str], AbstractContextManager[None]],
    name: str,
    find: Finder,
    findings: Findings,
) -> pl.DataFrame | pl.LazyFrame:
    with begin(name):
        return find(findings)


def _begin(
    trace: Trace, memory: int | None, step: Step, table: str
) -> AbstractContextManager[None]:
    """Check that finding a table fits in memory, and return the context in which it is found."""
    _check_fits(trace, memory, table)
    return step(table, trace.n_rows("seamcalls") + trace.n_rows("vm_entries"))


def _check_fits(trace: Trace, memory: int | None, table: str) -> None:
    """Refuse to find a table for which the memory will not do, before the system ends the process.

    Raises:
        InputError: With what is free, what it takes, and how to ask for a part of the trace.
    """
    n_calls = trace.n_rows("seamcalls")
    n_events = n_calls + trace.n_rows("vm_entries")
    wanted = n_events * _BYTES_PER_EVENT.get(table, 0)
    if table == "retry_chains" and not trace.is_in_memory("seamcalls"):
        wanted += n_events * _BYTES_READ
    if wanted < _ALWAYS_THERE:
        return
    free = free_bytes() if memory is None else memory
    if wanted > free:
        raise InputError(
            f"{table} of {n_calls:,} SEAMCALLs take about {shown_size(wanted)} of memory, "
            f"{shown_size(free)} may be taken (--memory SIZE: try it anyway); cut a part out: "
            "tdxtrace convert TRACE -o part --since +0 --until +10"
        )


# Less than this is not worth a look at what is free.
_ALWAYS_THERE: Final = 128 << 20


def query(trace: Trace, statement: str, selection: Selection | None = None) -> pl.DataFrame:
    """Run an SQL statement over every event and finding table of ``trace``.

    Args:
        trace: The recorded events; analysed only if the statement names a finding table.
        statement: One SELECT in the dialect of polars.
        selection: TDs, leaves and times that the tables hold; all by default.

    Raises:
        QueryError: If the statement is not understood, or the selection names a TD or
            leaf that the trace does not have.

    Example:
        >>> import tdxtrace
        >>> trace = tdxtrace.read_trace("sample_traces/contended.txt")
        >>> tdxtrace.query(trace, "select count(*) from seamcalls").item()
        2011
    """
    selected = selection or Selection()
    findings: list[Findings] = []

    def find(name: str) -> pl.DataFrame | pl.LazyFrame:
        if name in _EVENTS:
            return selected.scan(name, trace)
        if not findings:
            findings.append(analyze(trace, selected))
        found: pl.DataFrame = getattr(findings[0], name)
        return found

    return run_query(statement, _EVENTS | {table.name: table for table in FINDING_TABLES}, find)


def compare(before: Findings, after: Findings) -> pl.DataFrame:
    """Compare two traces, and return the differences that the data supports.

    Args:
        before: Findings of the one.
        after: Findings of the other.

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


def _cause_finders(
    trace: Trace, selected: Selection, all_chains: pl.DataFrame, mask: int
) -> dict[str, Finder]:
    """Functions for the tables about causes, which share one collection of evidence."""

    @cache
    def evidence() -> tuple[BusyEvidence, ...]:
        return tuple(gather_evidence(trace, mask=mask))

    @cache
    def causes() -> pl.LazyFrame:
        return scan_busy_causes(evidence())

    def selected_causes() -> pl.DataFrame | pl.LazyFrame:
        return selected.filter(causes().collect(), trace) if selected.to_dict() else causes()

    return {
        "busy_causes": lambda _: selected_causes(),
        "cause_shares": lambda findings: cause_shares(findings.scan("busy_causes")),
        "broken_rules": lambda _: selected.filter(broken_rules(evidence()), trace),
        # Queues consist of all requests, so the lock is evaluated on the whole trace.
        "lock_values": lambda findings: lock_values(evidence(), causes(), all_chains).join(
            findings.retry_chains, on=("source", "td_id", "leaf"), how="semi", nulls_equal=True
        ),
        "entry_waits": lambda _: selected.filter(entry_waits(evidence()), trace),
    }


def _generation(trace: Trace, module: str | None, generation: str | None) -> str | None:
    """The module's lock generation: as given by the user, else by the kernel's log."""
    if generation is not None or module is not None:
        return generation.upper() if generation is not None else generation_of(module or "")
    release = module_release(trace.kernel_messages)
    return release[1] if release else None


def _outcome_finders(
    trace: Trace, selected: Selection, generation: str | None
) -> dict[str, Finder]:
    """Functions for the tables about outcomes of busy answers, and the verdicts."""
    calls, entries, faults = trace.seamcalls, trace.vm_entries, trace.page_faults

    def select(*tables: pl.DataFrame) -> list[pl.DataFrame]:
        return [selected.filter(table, trace) for table in tables]

    return {
        "zero_step_causes": lambda f: zero_step_causes(f.zero_steps, trace),
        "step_thresholds": lambda _: step_thresholds(*select(calls, entries, faults)),
        "abandoned_requests": lambda f: abandoned_requests(
            trace, f.retry_chains, generation=generation
        ),
        "progress_loops": lambda f: progress_loops(trace, f.retry_chains, f.busy_answers),
        "td_conflicts": lambda f: td_conflicts(f.scan("busy_causes")),
        "time_shares": lambda f: time_shares(calls, f.retry_chains, f.busy_answers),
        "verdicts": lambda f: verdicts(f, trace, generation=generation),
    }


def _retry_finders(trace: Trace, all_chains: pl.DataFrame) -> dict[str, Finder]:
    """Functions for the tables about the number of retries."""
    return {
        "busy_answers": lambda found: _selected_answers(trace, all_chains, found),
        "attempts": lambda found: attempts(
            found.retry_chains, found.busy_answers, found.scan("busy_causes")
        ),
        "latencies": lambda found: latencies(
            trace.seamcalls, found.retry_chains, found.busy_answers
        ),
        "policies": lambda found: policies(found.retry_chains, found.busy_answers),
        "limits": _limits,
    }


def _selected_answers(trace: Trace, all_chains: pl.DataFrame, found: Findings) -> pl.DataFrame:
    """Busy answers of the selected chains, numbered over all chains."""
    answers = busy_answers(trace.seamcalls, all_chains)
    retried = found.retry_chains.filter(pl.col("n_busy") > 0)
    return answers.join(retried, on=("source", "first_seq"), how="semi", maintain_order="left")


def _limits(found: Findings) -> pl.DataFrame:
    """Limits for the default target."""
    seconds = observed_seconds(found.provenance)
    return limits(found.attempts, found.retry_chains, found.losses, seconds)
