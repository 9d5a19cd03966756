"""Composition of all analyses: a Trace in, Findings out.

This module connects the rooms, which exchange only tables. Modules that few commands need are
imported inside functions: importing all of them takes longer than analysing a small trace.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.analysis.call_order import TIMES
from tdxtrace.analysis.retry_chains import chains_and_answers
from tdxtrace.analysis.selection import Selection
from tdxtrace.analysis.stats import VCPU_COLUMNS, leaf_stats, vcpu_stats, vm_stats
from tdxtrace.analysis.zero_steps import needed_rows, zero_steps
from tdxtrace.errors import InputError
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.memory import format_size, free_bytes
from tdxtrace.tables.sql import run_query
from tdxtrace.tables.trace import Findings, Trace
from tdxtrace.tdx.releases import generation_of

if TYPE_CHECKING:
    from tdxtrace.analysis.causes.evidence import BusyEvidence

Finder = Callable[[Findings], pl.DataFrame | pl.LazyFrame]
Step = Callable[[str, int], AbstractContextManager[None]]


def _no_step(_name: str, _n_events: int) -> AbstractContextManager[None]:
    return nullcontext()


def analyze(
    trace: Trace,
    selection: Selection | None = None,
    *,
    module: str | None = None,
    generation: str | None = None,
    memory: int | None = None,
    step: Step = _no_step,
) -> Findings:
    """Run every analysis of ``trace``.

    Chains and episodes are always computed over the whole trace, because chain linking depends
    on the other calls of a thread; ``selection`` then filters the findings.

    Args:
        trace: The recorded events.
        selection: TDs, leaves and times to keep; all by default.
        module: Release of the TDX module, such as 1.5.16, if it is known.
        generation: Lock generation of the module, A, B or C, instead of a release.
        memory: Memory limit in bytes; None: the free memory.
        step: Called with the name of each step and its number of events; returns the context
            manager in which the step runs.

    Returns:
        One finding table per analysis, and the losses that limit their accuracy.

    Raises:
        QueryError: If the selection names a TD or leaf that the trace does not have, or
            the locks of the module are not known.
        InputError: If the analysis needs more memory; also raised on access to a table that
            needs more.
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
    if module is not None or generation is not None:
        _mask(module, known_generation if generation is None else generation)
    given = {n: v for n, v in (("module", module), ("generation", generation)) if v is not None}
    with begin("retry_chains"):
        found = _chains(trace, memory)
        chains = found.selected(selected, trace)
        tables = (trace.page_faults, trace.host_events, trace.losses)
        drift_ns = {n: of.drift_ns for n, of in enumerate(trace.provenance.sources)}
        steps = zero_steps(*needed_rows(trace), *tables, drift_ns=drift_ns)
        steps = selected.filter(steps, trace)
        entries = selected.filter(trace.vm_entries, trace)
        columns = (*VCPU_COLUMNS, *TIMES)
        parts = (selected.filter(part, trace) for part in trace.parts("seamcalls", columns))
        of_vcpus = vcpu_stats(parts, entries, steps)
    on_demand = _OnDemand(trace, selected, found, module, generation, known_generation)
    return Findings(
        leaf_stats=leaf_stats(chains),
        zero_steps=steps,
        vm_stats=vm_stats(chains, steps),
        vcpu_stats=of_vcpus,
        threads=trace.threads,
        losses=trace.losses,
        provenance=trace.provenance,
        options=selected.to_dict() | given,
        kernel_messages=trace.kernel_messages,
        loader_calls=selected.of_host(trace.loader_calls, trace),
        _computed={"retry_chains": chains} if isinstance(chains, pl.DataFrame) else {},
        _analyses={"retry_chains": lambda _: chains}
        | {name: partial(_found, begin, name, find) for name, find in on_demand.finders().items()},
    )


@dataclass(frozen=True)
class _Chains:
    """Retry chains of a whole trace, in memory or on disk."""

    all_chains: pl.DataFrame | pl.LazyFrame
    make_answers: Callable[[], pl.DataFrame | pl.LazyFrame]

    def selected(self, selection: Selection, trace: Trace) -> pl.DataFrame | pl.LazyFrame:
        """Return the selected retry chains, in memory or as a query."""
        if isinstance(self.all_chains, pl.DataFrame):
            return selection.filter(self.all_chains, trace)
        return selection.filter(self.all_chains, trace)

    @cached_property
    def all_answers(self) -> pl.DataFrame | pl.LazyFrame:
        """The ``busy_answers`` table of these chains, or a query of it."""
        return self.make_answers()


def _chains(trace: Trace, memory: int | None) -> _Chains:
    """Find the retry chains of a trace: on disk for a large stored trace, else in memory."""
    if not trace.is_in_memory("seamcalls") and _is_large(trace, memory):
        from tdxtrace.analysis.stored_chains import store_chains

        stored = store_chains(trace)
        return _Chains(stored.chains.scan(), stored.scan_answers)
    trace.defragment()
    chains, answers = chains_and_answers(trace.seamcalls, trace.losses)

    def numbered() -> pl.DataFrame:
        from tdxtrace.analysis.busy_answers import with_episodes

        return with_episodes(answers, chains)

    return _Chains(chains, numbered)


# Bytes of memory that computing a table takes per attempt and vCPU entry, in addition to the
# tables computed before: python tests/bench/memory.py, 12 M events with 4.2 M busy answers.
_BYTES_PER_EVENT: Final = {"retry_chains": 230, "busy_causes": 400}
# Bytes of memory per event that reading the tables from a store takes.
_BYTES_READ: Final = 100
# A stored trace that needs more than 1/8 of the memory is analysed one segment at a time.
_MEMORY_DIVISOR: Final = 8


def _is_large(trace: Trace, memory: int | None) -> bool:
    needed_bytes = trace.n_rows("seamcalls") * _BYTES_READ
    return needed_bytes > (free_bytes() if memory is None else memory) // _MEMORY_DIVISOR


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
    """Check that a table fits in memory, and return the context in which it is computed."""
    _check_fits(trace, memory, table)
    return step(table, trace.n_rows("seamcalls") + trace.n_rows("vm_entries"))


def _check_fits(trace: Trace, memory: int | None, table: str) -> None:
    """Refuse to compute a table that needs more memory than is available.

    Raises:
        InputError: Names the memory needed, the memory available, and how to cut a part out.
    """
    n_calls = trace.n_rows("seamcalls")
    n_events = n_calls + trace.n_rows("vm_entries")
    needed_bytes = n_events * _BYTES_PER_EVENT.get(table, 0)
    if needed_bytes and not trace.is_in_memory("seamcalls"):
        needed_bytes += n_events * _BYTES_READ
        if table == "retry_chains" and _is_large(trace, memory):
            return
    if needed_bytes < _UNCHECKED_BYTES:
        return
    free = free_bytes() if memory is None else memory
    if needed_bytes > free:
        raise InputError(
            f"{table} of {n_calls:,} SEAMCALLs take about {format_size(needed_bytes)} of memory, "
            f"{format_size(free)} may be taken (--memory SIZE: try it anyway); cut a part out: "
            "tdxtrace convert TRACE -o part --since +0 --until +10"
        )


# Tables smaller than this are computed without a look at the free memory.
_UNCHECKED_BYTES: Final = 128 << 20


def query(trace: Trace, statement: str, selection: Selection | None = None) -> pl.DataFrame:
    """Run an SQL statement over every event and finding table of ``trace``.

    Args:
        trace: The recorded events; analysed only if the statement names a finding table.
        statement: One SELECT in the SQL dialect of polars.
        selection: TDs, leaves and times to which the tables are restricted; all by default.

    Raises:
        QueryError: If the statement is invalid, or the selection names a TD or leaf that the
            trace does not have.

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
        before: Findings of the first trace.
        after: Findings of the second trace.

    Returns:
        The ``comparisons`` table.

    Example:
        >>> import tdxtrace
        >>> found = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> set(tdxtrace.compare(found, found)["change"])
        {'not_told'}
    """
    from tdxtrace.analysis.comparisons import comparisons

    return comparisons(before.attempts, after.attempts)


_EVENTS = {table.name: table for table in EVENT_TABLES}


@dataclass(frozen=True)
class _OnDemand:
    """Functions that compute finding tables at their first access; ``_NAME`` computes NAME."""

    trace: Trace
    selected: Selection
    found: _Chains
    """Retry chains of the whole trace."""
    module: str | None
    """Release of the module, as given by the caller."""
    generation: str | None
    """Lock generation, as given by the caller."""
    known_generation: str | None
    """Lock generation as given, or from the given release, or from the kernel log."""

    def finders(self) -> dict[str, Finder]:
        """Return the functions by table name."""
        named = (table.name for table in FINDING_TABLES)
        return {name: getattr(self, f"_{name}") for name in named if hasattr(self, f"_{name}")}

    @property
    def all_chains(self) -> pl.DataFrame:
        """Retry chains of the whole trace, selected or not."""
        return self.found.all_chains.lazy().collect()

    @property
    def all_answers(self) -> pl.DataFrame:
        """Busy answers of the whole trace, selected or not."""
        return self.found.all_answers.lazy().collect()

    @cached_property
    def evidence(self) -> tuple[BusyEvidence, ...]:
        """Evidence that the tables about causes share, one item per source."""
        from tdxtrace.analysis.causes.evidence import gather_evidence

        generation = self.known_generation if self.generation is None else self.generation
        mask = _mask(self.module, generation)
        return tuple(gather_evidence(self.trace, mask=mask))

    @cached_property
    def causes(self) -> pl.LazyFrame:
        """Causes of all busy answers, selected or not."""
        from tdxtrace.analysis.causes.busy_causes import scan_busy_causes

        return scan_busy_causes(self.evidence)

    def _busy_causes(self, _: Findings) -> pl.DataFrame | pl.LazyFrame:
        if not self.selected.to_dict():
            return self.causes
        return self.selected.filter(self.causes.collect(), self.trace)

    def _cause_shares(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.causes.busy_causes import cause_shares

        return cause_shares(found.scan("busy_causes"))

    def _td_conflicts(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.causes.busy_causes import td_conflicts

        return td_conflicts(found.scan("busy_causes"))

    def _broken_rules(self, _: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.causes.busy_causes import broken_rules

        return self.selected.filter(broken_rules(self.evidence), self.trace)

    def _lock_values(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.causes.lock_effects import lock_values

        # Queues consist of all requests, so the lock is evaluated on the whole trace.
        return lock_values(self.evidence, self.causes, self.all_chains).join(
            found.retry_chains, on=("source", "td_id", "leaf"), how="semi", nulls_equal=True
        )

    def _entry_waits(self, _: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.causes.lock_effects import entry_waits

        return self.selected.filter(entry_waits(self.evidence), self.trace)

    def _zero_step_causes(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.zero_step_causes import zero_step_causes

        return zero_step_causes(found.zero_steps, self.trace)

    def _step_thresholds(self, _: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.step_thresholds import step_thresholds

        trace = self.trace
        tables = (trace.seamcalls, trace.vm_entries, trace.page_faults)
        return step_thresholds(*(self.selected.filter(table, trace) for table in tables))

    def _abandoned_requests(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.abandoned_requests import abandoned_requests

        return abandoned_requests(self.trace, found.retry_chains, generation=self.known_generation)

    def _progress_loops(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.progress_loops import progress_loops

        return progress_loops(self.trace, found.retry_chains, found.busy_answers)

    def _time_shares(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.time_shares import time_shares

        return time_shares(self.trace.seamcalls, found.retry_chains, found.busy_answers)

    def _counters(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.stats import counters

        return counters(found.retry_chains, found.busy_answers, found.zero_steps)

    def _measurement_log(self, _: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.measurement_log import measurement_log

        # Positions of calls within a TD's build are counted over the whole trace.
        return self.selected.filter(measurement_log(self.trace.seamcalls), self.trace)

    def _host_checks(self, _: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.host_checks import host_checks

        return host_checks(self.trace)

    def _accept_rates(self, _: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.accept_rates import accept_rates

        # Time slices span the whole trace, and a vCPU may have waited for a call of another leaf.
        rows = accept_rates(
            self.trace.seamcalls, self.trace.vm_entries, self.all_chains, self.all_answers
        )
        return self.selected.filter(rows, self.trace)

    def _boot_phases(self, _: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.boot_phases import boot_phases

        trace = self.trace
        events = (trace.seamcalls, trace.vm_entries, trace.host_events)
        rows = boot_phases(*events, self.all_chains, self.all_answers)
        return self.selected.filter(rows, trace)

    def _tdvmcalls(self, _: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.tdvmcalls import tdvmcalls

        trace = self.trace
        events = (trace.seamcalls, trace.vm_entries, trace.host_events)
        rows = tdvmcalls(*events, trace.losses)
        return self.selected.filter(rows, trace)

    def _module_updates(self, _: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.module_updates import module_updates

        return self.selected.of_host(module_updates(self.trace, self.all_chains), self.trace)

    def _verdicts(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.verdicts.verdicts import verdicts

        return verdicts(found, self.trace, generation=self.known_generation)

    def _busy_answers(self, found: Findings) -> pl.DataFrame | pl.LazyFrame:
        # Episodes are numbered over all chains, so the selection is applied afterwards.
        answers = self.found.all_answers
        if not self.selected.to_dict():
            return answers
        retried = found.scan("retry_chains").filter(pl.col("n_busy") > 0)
        on = ("source", "first_seq")
        kept = answers.lazy().join(retried, on=on, how="semi", maintain_order="left")
        return kept if isinstance(answers, pl.LazyFrame) else kept.collect()

    def _attempts(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.attempts import attempts

        return attempts(*_requests(found), found.scan("busy_causes"))

    def _latencies(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.latencies import latencies

        return latencies(self.trace.seamcalls, found.retry_chains, found.busy_answers)

    def _policies(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.recommend.replay import policies

        return policies(*_requests(found))

    def _limits(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.recommend.limits import limits, observed_seconds

        seconds = observed_seconds(found.provenance)
        return limits(found.attempts, found.scan("retry_chains"), found.losses, seconds)

    def _limit_statements(self, found: Findings) -> pl.DataFrame:
        from tdxtrace.analysis.attempts import attempts
        from tdxtrace.recommend.statements import limit_statements

        # Skip the causes, which dominate the time of attempts and are not needed here.
        curves = found.attempts if found.is_computed("attempts") else attempts(*_requests(found))
        return limit_statements(curves, found.scan("retry_chains"))


def _requests(found: Findings) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """Return queries of the retry chains and of their busy answers."""
    return found.scan("retry_chains"), found.scan("busy_answers")


def _mask(module: str | None, generation: str | None) -> int:
    """Return the lock generations that a module may have, as a bit mask."""
    from tdxtrace.analysis.causes.generation import chosen_generations

    return chosen_generations(module, generation)


def _generation(trace: Trace, module: str | None, generation: str | None) -> str | None:
    """Return the module's lock generation: as given by the user, else from the kernel log."""
    if generation is not None or module is not None:
        return generation.upper() if generation is not None else generation_of(module or "")
    if trace.kernel_messages.is_empty():
        return None
    from tdxtrace.analysis.causes.generation import module_release

    release = module_release(trace.kernel_messages)
    return release[1] if release else None
