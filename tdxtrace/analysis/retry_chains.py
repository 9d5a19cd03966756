"""The ``retry_chains`` table: SEAMCALLs grouped into attempts at the same request.

:func:`retry_chains` processes a whole capture.  For a capture that arrives in segments, call
:func:`start`, then :func:`step` for each segment, which returns the decided chains, and finally
:func:`finish`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Flags
from tdxtrace.analysis.lookup import in_order
from tdxtrace.analysis.loops import linking
from tdxtrace.analysis.request_identity import (
    U8,
    U16,
    identifying_operands,
    identity,
    second_callers,
)
from tdxtrace.analysis.threads import (
    NO_CPU,
    TD_OWNERS,
    VP_ENTER,
    LossWindows,
    call_owner,
    infer_td,
    start_windows,
)
from tdxtrace.compiler import Runner, choose, interpreted
from tdxtrace.tables.events import LOSSES, SEAMCALLS
from tdxtrace.tables.findings import CUTS, OUTCOMES, RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tdx import leaves, word
from tdxtrace.tdx.status import is_retryable

# Leaves that handle a page fault.  One thread may have such a request and a request to enter the
# faulting vCPU open at the same time.  Linux 6.16 arch/x86/kvm/vmx/tdx.c: tdx_handle_ept_violation
# leaves its loop with the page still missing and enters the guest, which faults again on the same
# page or on another page first.
_FAULT_LEAVES: Final = leaves.numbers_of(("TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"))

# RANGE.UNBLOCK, and the leaves that require the same Secure EPT entry to be blocked: once it is
# unblocked, the request fails until a new BLOCK and TRACK.  Intel TDX module 1.5 ABI specification:
# the entry state that each of these leaves requires.
_UNBLOCK: Final = leaves.parse_leaf("TDH.MEM.RANGE.UNBLOCK")[0]
# PAGE.RELOCATE accepts only 4K pages, and its operands contain no level.
_RELOCATE: Final = leaves.parse_leaf("TDH.MEM.PAGE.RELOCATE")[0]
_NEED_BLOCK: Final = leaves.numbers_of(
    f"TDH.MEM.PAGE.{name}" for name in ("DEMOTE", "PROMOTE", "RELOCATE", "REMOVE")
)

# Number of calls linked per batch, chosen so that the per-call working data fits into the CPU
# caches and uses little memory.
_BATCH_CALLS: Final = 1 << 18
# Maximum number of chains, threads and pairs kept for an endless capture: one fault and one entry
# for each of 32,768 vCPUs.  An arbitrary choice.
_MAX_ROWS: Final = 1 << 16
# Approximate recording size of one call; decides whether loops over calls are compiled.
_BYTES_PER_CALL: Final = 256
# Maximum number of calls of a leaf after a gap that may still continue a request from before the
# gap.  Later returns are too rare to mark every new request as cut.  An arbitrary choice.
_MAX_CALLS_BETWEEN: Final = 255
# The observed maximum is a lower bound of the true maximum; assume twice as many (a choice).
_MARGIN: Final = 2
_MIN_NS: Final = np.iinfo(np.int64).min
_MAX_NS: Final = np.iinfo(np.int64).max
_SMALLEST_TABLE: Final = 64
_OPERANDS: Final = {
    "td_id": linking.TD,
    "gpa": linking.GPA,
    "level": linking.LEVEL,
    "vp_id": linking.VP,
    "page": linking.PAGE,
}
_RECORDED: Final = _OPERANDS | {
    "tid": linking.TID,
    "tgid": linking.TGID,
    "start_ns": linking.START,
    "end_ns": linking.END,
    "status": linking.RETURNED,
}
_ABANDONED, _CUT, _FAILED, _RESOLVED, _SUCCEEDED = map(
    OUTCOMES.index, ("abandoned", "cut", "failed", "resolved_elsewhere", "succeeded")
)
_TRACE_START, _TRACE_END, _LOST = map(CUTS.index, ("trace_start", "trace_end", "lost_events"))
Rows = NDArray[np.void]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(slots=True)
class Survey:
    """Properties of the whole capture that chain linking needs."""

    captured: U16 = field(default_factory=lambda: np.zeros(1 << 16, np.uint16))
    """For each leaf: bits of the identifying operands that any of its calls recorded."""
    tds: pl.DataFrame = field(
        default_factory=lambda: SEAMCALLS.empty().select("source", "tid", "tgid", "td_id")
    )
    """TDs recorded in the calls of each thread."""
    has_processes: bool = False
    """Whether the process of every call was recorded."""
    losses: pl.DataFrame = field(default_factory=LOSSES.empty)

    def add(self, seamcalls: pl.DataFrame, *, are_all: bool = False) -> None:
        """Add calls to the survey; ``are_all`` means that these are all calls of the capture."""
        leaf = seamcalls["leaf"].to_numpy()
        for name, operand in _OPERANDS.items():
            is_named = np.zeros(1 << 16, np.bool_)
            is_named[leaf[seamcalls[name].is_not_null().to_numpy()]] = True
            self.captured[is_named] |= operand
        self.captured &= identifying_operands()
        if not are_all or seamcalls["td_id"].null_count():
            tds = seamcalls.select(self.tds.columns).filter(pl.col("td_id").is_not_null())
            self.tds = pl.concat([self.tds, tds.unique()]).unique(keep="last", maintain_order=True)


def retry_chains(seamcalls: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """Group the attempts at each request into one row.

    A chain consists of the calls by which one thread makes one request, identified by (td, leaf,
    gpa, level) for memory leaves, (td, leaf) for TRACK and the management leaves, and the
    vCPU for VP.ENTER.  Every call but the last returned a retryable status, and no other thread
    settled the request before the next call, unless that call followed at once.  A pause, a move
    to another CPU or another call of the thread does not end a chain.  One call does: a successful
    RANGE.UNBLOCK, by any thread, ends the requests that require the range to be blocked (DEMOTE,
    PROMOTE, RELOCATE, REMOVE).  A request that succeeds at once is a chain with one call.

    Where some operands were not captured, calls are grouped by the captured ones, and ``identity``
    records which.  A call without the operands that other calls of its leaf have (its entry event
    is missing) joins no chain: it may belong to any open request of its thread, so these are
    ``cut``.  A window of lost events cuts the chains that could extend into it: those open in the
    affected threads, and after it the first chain of the thread and of each leaf of a vCPU.  If a
    thread was observed to return to a request after n other calls of the same leaf, it may also do
    so after a loss, and later than observed: chains that it begins within 2 n calls of that leaf
    are cut.  A request that it left open n calls before the end of the trace is not abandoned.

    A request is ``abandoned`` if its thread began another request later, or its range was
    unblocked, and no events of the thread were lost up to then.  It is ``cut`` by the end of the
    trace if the thread began no other request, or only continued open ones, since it may return.
    For a request of a fault, entering the vCPU does not count as another request.

    A request that its caller left busy is ``resolved_elsewhere`` if a call of another thread
    succeeded on the same (td, leaf, gpa, level) after the chain began and before a loss: the page
    is in the target state and the lock's host priority is cleared.  This applies only to requests
    identified by a page or a TD: a vCPU has no second caller.

    Args:
        seamcalls: The ``seamcalls`` table, in any order.
        losses: The ``losses`` table of the same trace.

    Returns:
        The ``retry_chains`` table, ordered by source and ``first_seq``.  Every row
        of ``seamcalls`` belongs to exactly one chain, so ``n_attempts`` sums to its
        height.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        Which statuses are retried: ``tdxtrace.tdx.status.is_retryable``.
    """
    return chains_and_answers(seamcalls, losses)[0]


def chains_and_answers(
    seamcalls: pl.DataFrame, losses: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the ``retry_chains`` table and its busy answers (see :func:`take_answers`)."""
    state = start(survey(seamcalls, losses), answers=True)
    parts = [step(state, seamcalls), finish(state)]
    return in_order(pl.concat(parts), "first_seq"), take_answers(state)


def survey(seamcalls: pl.DataFrame, losses: pl.DataFrame) -> Survey:
    """Return the survey of all calls and losses of a capture."""
    found = Survey(has_processes=not seamcalls["tgid"].null_count(), losses=LOSSES.conform(losses))
    found.add(SEAMCALLS.conform(seamcalls), are_all=True)
    return found


SURVEYED: Final = ("source", "leaf", "tid", "tgid", *_OPERANDS)
"""Columns of ``seamcalls`` that a survey reads."""


def survey_parts(parts: Iterable[pl.DataFrame], losses: pl.DataFrame) -> Survey:
    """Return the survey of a capture whose calls come in parts with the columns SURVEYED."""
    found = Survey(has_processes=True, losses=LOSSES.conform(losses))
    for calls in parts:
        found.has_processes &= not calls["tgid"].null_count()
        found.add(calls)
    return found


@dataclass(slots=True)
class ChainState:
    """State kept between segments."""

    known: Survey
    is_surveyed: bool
    """Whether ``known`` covers the whole capture; otherwise it covers the segments so far."""
    sources: dict[int, Linker] = field(default_factory=dict)
    n_dropped: int = 0
    """Number of chains dropped by :func:`evict_old` before their end was recorded."""
    answers: list[pl.DataFrame] | None = None
    """Busy answers since the last :func:`take_answers`; None unless requested in :func:`start`."""

    @property
    def n_in_flight(self) -> int:
        """Number of chains that may still get another attempt."""
        return sum(int((linker.chains["is_lost"] == 0).sum()) for linker in self.sources.values())

    @property
    def max_attempts_in_flight(self) -> int:
        """Largest number of attempts so far among open chains; 0 without open chains."""
        return max(
            (int(linker.chains["n"].max(initial=0)) for linker in self.sources.values()), default=0
        )


def start(known: Survey | None = None, *, answers: bool = False) -> ChainState:
    """Create the state for a capture that comes in segments.

    Args:
        known: Survey of the whole capture.  Without it, the survey grows with each segment, with
            three effects: calls without entry events, before the first call of their leaf that
            names its request, are joined with each other; the TD of a thread is the only one
            recorded so far; and threads with the same tid are treated as one thread.
        answers: Whether :func:`take_answers` is called after each step.
    """
    return ChainState(known or Survey(), known is not None, answers=[] if answers else None)


def step(
    state: ChainState, seamcalls: pl.DataFrame, losses: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Add a segment, and return the chains that it decided.

    For a surveyed capture, all steps and :func:`finish` together return the same rows, however the
    capture is divided into segments.

    Args:
        state: State returned by :func:`start`.
        seamcalls: Rows of the ``seamcalls`` table.  No call begins before a call of an earlier
            segment.  A late call is processed in order of arrival.
        losses: New rows of the ``losses`` table; none if the capture was surveyed.

    Returns:
        Rows of the ``retry_chains`` table.
    """
    seamcalls = SEAMCALLS.conform(seamcalls)
    if not state.is_surveyed:
        state.known.add(seamcalls)
    if losses is not None and losses.height:
        state.known.losses = pl.concat([state.known.losses, LOSSES.conform(losses)])
        for source, linker in state.sources.items():
            linker.set_losses(state.known.losses, source)
    parts = []
    for source, calls in _by_source(seamcalls):
        linker = _linker(state, source)
        for batch in _batches(calls):
            ended, positions = linker.add(batch, state.known)
            parts.append(linker.rows(ended, state.known, source, state.is_surveyed))
            if state.answers is not None:
                state.answers.append(number_batch(batch, positions))
    return pl.concat(parts or [RETRY_CHAINS.empty()])


def take_answers(state: ChainState) -> pl.DataFrame:
    """Return the busy answers since the previous call, and drop them from the state.

    Returns:
        Rows of the ``busy_answers`` table without ``episode``, which depends on all chains, in the
        order in which the calls begin.
    """
    found, state.answers = state.answers or [], []
    return pl.concat([_NO_ANSWERS, *found])


_NO_ANSWERS: Final = BUSY_ANSWERS.empty().drop("episode")


def number_batch(calls: pl.DataFrame, positions: linking.CallPositions) -> pl.DataFrame:
    """Return rows of ``busy_answers`` without ``episode``.

    Args:
        calls: Rows of the ``seamcalls`` table; only those with a retryable status are used.
        positions: Position of each call in its chain.
    """
    answers = calls.lazy().with_columns(
        first_seq=pl.Series(positions.first_seq),
        number=pl.Series(positions.n_busy),
        waited_ns=pl.col("end_ns") - pl.Series(positions.begins),
    )
    return answers.filter(is_retryable(pl.col("status"))).select(_NO_ANSWERS.columns).collect()


def finish(state: ChainState) -> pl.DataFrame:
    """Return the chains that are still open at the end of the capture."""
    parts = [RETRY_CHAINS.empty()]
    for source, linker in state.sources.items():
        parts += [linker.rows(linker.finish(), state.known, source), linker.deferred_rows()]
    return pl.concat(parts)


def evict_old(state: ChainState, before_ns: int) -> pl.DataFrame:
    """Drop old chains and losses to bound the memory of an endless capture.

    Chains without an attempt since ``before_ns``, and those cut by a loss, are returned as if the
    capture ended: they get no more attempts.  Chains whose thread has made no call since are
    dropped and counted, and so are the oldest chains above a limit.  Older losses of each CPU are
    merged into one.

    Args:
        state: State returned by :func:`start`.
        before_ns: Time in ns before which attempts are old.
    """
    known, parts = state.known, []
    for source, linker in state.sources.items():
        old, n_excess = linker.evict(before_ns)
        rows = linker.rows(old, known, source)
        is_dropped = (pl.col("cut_by") == "trace_end").fill_null(False)
        state.n_dropped += n_excess + rows.select(is_dropped.sum()).item()
        parts.append(rows.filter(~is_dropped))
        if max(len(linker.owners), len(linker.pairs)) > _MAX_ROWS:
            linker.shrink()
    known.tds = known.tds.tail(_MAX_ROWS)
    if known.losses.height:
        known.losses = _merged_losses(known.losses, before_ns)
    return pl.concat(parts or [RETRY_CHAINS.empty()])


def _merged_losses(losses: pl.DataFrame, before_ns: int) -> pl.DataFrame:
    """Merge the losses of each kind and CPU that ended before a time; keep the others unchanged."""
    is_past = (pl.col("end_ns") < before_ns).fill_null(False)
    start_ns = pl.when(~pl.col("start_ns").is_null().any()).then(pl.col("start_ns").min())
    merged = losses.filter(is_past).group_by("source", "kind", "cpu")
    past = merged.agg(
        pl.all().exclude("start_ns", "end_ns").first(),
        start_ns=start_ns.first(),
        end_ns=pl.col("end_ns").max(),
    )
    return pl.concat([LOSSES.conform(past), losses.filter(~is_past)])


def _linker(state: ChainState, source: int) -> Linker:
    if source not in state.sources:
        state.sources[source] = Linker()
        state.sources[source].set_losses(state.known.losses, source)
    return state.sources[source]


def _by_source(seamcalls: pl.DataFrame) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield the calls of each source; the frame is not copied if there is only one source."""
    sources = seamcalls["source"].unique().sort()
    for source in sources:
        is_only = len(sources) == 1
        yield int(source), seamcalls if is_only else seamcalls.filter(pl.col("source") == source)


def _batches(calls: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Yield calls in batches, in the order in which they begin."""
    calls = calls.select(pl.col(name) for name in calls.columns if name in _NEEDED)
    if not calls["seq"].is_sorted():
        calls = calls.sort("seq")
    begins = calls.select(pl.coalesce("start_ns", "end_ns")).to_series()
    # Calls are nearly in order, and numpy's stable sort is fast on sorted runs.
    order = None if begins.is_sorted() else np.argsort(begins.to_numpy(), kind="stable")
    for at in range(0, calls.height, _BATCH_CALLS):
        yield (
            calls[at : at + _BATCH_CALLS] if order is None else calls[order[at : at + _BATCH_CALLS]]
        )


_NEEDED: Final = {"source", "seq", "leaf", "cpu", "start_cpu", "in_irq", "bounds", *_RECORDED}


@dataclass(slots=True)
class Linker:
    """State of linking for one source: what later calls depend on."""

    windows: LossWindows | None = None
    started_midway: bool = False
    owners: Rows = field(default_factory=lambda: np.zeros(0, linking.OWNER))
    pairs: Rows = field(default_factory=lambda: np.zeros(0, linking.PAIR))
    chains: Rows = field(default_factory=lambda: np.zeros(0, linking.CHAIN))
    """Open chains."""
    successes: Rows = field(default_factory=lambda: np.zeros(0, linking.SUCCESS))
    """Successful calls that may have ended after the begin of a later call."""
    owner_heads: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    pair_heads: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    max_between: I64 = field(default_factory=lambda: np.full(1 << 16, linking.NONE, np.int64))
    deferred: list[pl.DataFrame] = field(default_factory=list)
    """Chains that are cut if a thread returns to a request after that many calls, and the cause."""
    n_calls: int = 0
    run: Runner[Any] = interpreted

    def set_losses(self, losses: pl.DataFrame, source: int) -> None:
        """Set the loss windows from all losses so far."""
        windows = LossWindows(losses, source)
        self.windows = windows if windows.any else None
        self.started_midway = start_windows(losses, source).any

    def add(self, frame: pl.DataFrame, known: Survey) -> tuple[ChainFields, linking.CallPositions]:
        """Link calls in the order in which they begin.

        Args:
            frame: Rows of ``seamcalls``, with the column ``bounds`` (bits OPENS and CLOSES) if it
                is known which calls begin and end chains.
            known: Survey of the capture.

        Returns:
            The chains that ended, and the position of each call in its chain.
        """
        calls, n = _columns(frame, known), frame.height
        self.run = choose((self.n_calls + n) * _BYTES_PER_CALL)
        tables = self._tables(n)
        pair_of = np.empty(n, np.int32)
        positions = linking.CallPositions(
            np.empty(n, np.uint64), np.empty(n, np.int64), np.empty(n, np.uint32)
        )
        columns = calls
        if self.run is interpreted:
            columns = linking.CallColumns(*(column.tolist() for column in calls))
        self.run(linking.find_threads)(columns, tables, pair_of)
        may_miss, inside = self._gaps(frame, calls, tables, pair_of)
        successes = np.concatenate([self.successes, _successes(calls)])
        successes = successes[np.lexsort((successes["seq"], successes["ends"]))]
        rows = self._rows(successes)
        process = calls.tgid if known.has_processes else np.zeros(n, np.int32)
        operands, callers = identifying_operands(), second_callers()
        leaf_properties = linking.Leaves(
            operands, known.captured, callers, _special_leaves(), self.max_between
        )
        arguments = leaf_properties, pair_of, may_miss, inside, process, rows, self.n_calls
        self.run(linking.link_attempts)(columns, *arguments, self.started_midway, tables, positions)
        self.n_calls += n
        self.owners = _array(tables.owners, tables.counts[0], linking.OWNER).copy()
        self.pairs = _array(tables.pairs, tables.counts[1], linking.PAIR).copy()
        self.successes = successes[tables.counts[3] :]
        chains = _array(tables.chains, tables.counts[2], linking.CHAIN)
        is_open = chains["is_open"] != 0
        self.chains = chains[is_open]
        return ChainFields(chains, np.flatnonzero(~is_open)), positions

    def _tables(self, n: int) -> linking.Tables:
        """Return the kept tables with headroom for ``n`` calls."""
        sizes = len(self.owners), len(self.pairs), len(self.chains)
        n_slots = [2 * (size + n) for size in sizes]
        must_rebuild = len(self.owner_heads) < n_slots[0] or len(self.pair_heads) < n_slots[1]
        if must_rebuild:
            self.owner_heads, self.pair_heads = _heads(2 * n_slots[0]), _heads(2 * n_slots[1])
        self.owners["opened"] = self.pairs["unidentified"] = linking.NONE
        tables = linking.Tables(
            self._rows(self.owners, n),
            self._rows(self.pairs, n),
            self._rows(self.chains, n),
            self.owner_heads,
            self.pair_heads,
            _heads(n_slots[2]),
            _heads(n_slots[2]),
            np.full(sizes[2] + n, linking.NONE, np.int32),
            np.full(sizes[2] + n, linking.NONE, np.int32),
            np.array([*sizes, 0], np.int64),
        )
        self.run(linking.rebuild_indexes)(tables, sizes[2], must_rebuild)
        return tables

    def _rows(self, table: Rows, n: int = 0) -> Rows:
        """Return a table with ``n`` further zero rows, in the form that the loops accept.

        Interpreted loops are 20 times faster if each row is a dict that is created on first use.
        """
        if self.run is not interpreted:
            return _with_capacity(table, n)
        names = table.dtype.names or ()
        rows = defaultdict[int, dict[str, int]](lambda: dict.fromkeys(names, 0))
        rows |= {at: dict(zip(names, row, strict=True)) for at, row in enumerate(table.tolist())}
        return cast("Rows", rows)

    def _gaps(
        self, frame: pl.DataFrame, calls: linking.CallColumns, tables: linking.Tables, pair_of: I32
    ) -> tuple[Flags, Flags]:
        """Return whether events may be lost before or during each call, and during each call."""
        last_cpu = np.array(frame["cpu"].cast(pl.Int64).fill_null(NO_CPU).to_numpy())
        cpus = frame.select(pl.coalesce("start_cpu", "cpu").cast(pl.Int64).fill_null(NO_CPU))
        first_cpu = np.array(cpus.to_series().to_numpy())
        start, end = calls.begins, calls.ends
        since, cpu = np.full(len(start), _MIN_NS), first_cpu.copy()
        self.run(linking.find_previous_calls)(pair_of, last_cpu, end, tables, since, cpu)
        if self.windows is None:
            nothing = np.zeros(0, np.bool_)
            return nothing, nothing
        before = self.windows.overlap(first_cpu, since, start)
        before |= self.windows.overlap(cpu, since, start)
        inside = self.windows.overlap(first_cpu, start, end)
        inside |= self.windows.overlap(last_cpu, start, end)
        return before | inside, inside

    def evict(self, before_ns: int) -> tuple[ChainFields, int]:
        """Drop and return the old chains; drop and count the oldest chains above the limit."""
        last, is_lost = self.chains["ends"], self.chains["is_lost"] != 0
        is_old = is_lost | (last < before_ns)
        is_excess = ~is_old
        is_excess[np.argsort(np.where(is_old, _MIN_NS, last), kind="stable")[-_MAX_ROWS:]] = False
        is_dropped = is_old | is_excess
        was_counted = is_dropped & (self.chains["is_followed"] == 0)
        np.subtract.at(self.pairs["n_open"], self.chains["pair"][was_counted], 1)
        dropped = ChainFields(self.chains, np.flatnonzero(is_old))
        self.chains = self.chains[~is_dropped]
        self.successes = self.successes[-_MAX_ROWS:]
        return dropped, int(is_excess.sum())

    def shrink(self) -> None:
        """Drop rows that later calls do not need, and the threads whose last call is oldest."""
        is_kept = np.zeros(len(self.owners), np.bool_)
        is_kept[np.argsort(self.owners["last"], kind="stable")[-_MAX_ROWS:]] = True
        is_kept[self.pairs["owner"][self.chains["pair"]]] = True
        of_vcpu = _special_leaves()[self.pairs["leaf"]] != 0
        is_kept_pair = is_kept[self.pairs["owner"]] & (of_vcpu | (self.pairs["n_open"] > 0))
        is_kept_pair[self.chains["pair"]] = True
        self.chains["pair"] = (np.cumsum(is_kept_pair) - 1)[self.chains["pair"]]
        self.owners, self.pairs = self.owners[is_kept], self.pairs[is_kept_pair]
        self.pairs["owner"] = (np.cumsum(is_kept) - 1)[self.pairs["owner"]]
        self.owner_heads, self.pair_heads = _heads(0)[:0], _heads(0)[:0]

    def finish(self) -> ChainFields:
        """Return the open chains, after the last call."""
        tables = self._tables(0)
        self.run(linking.settle)(tables, self._rows(self.successes), np.int64(_MAX_NS))
        n, self.chains, self.successes = len(self.chains), self.chains[:0], self.successes[:0]
        return ChainFields(_array(tables.chains, n, linking.CHAIN), np.arange(n))

    def rows(
        self, chains: ChainFields, known: Survey, source: int, may_defer: bool = False
    ) -> pl.DataFrame:
        """Return rows of ``retry_chains``; chains still open get no more attempts.

        Args:
            chains: The chains.
            known: Survey of the capture.
            source: Source number.
            may_defer: Whether to hold back chains that a later call may show to be cut.
        """
        if not len(chains):
            return RETRY_CHAINS.empty()
        outcome, cut_by = self._outcomes(chains)
        table = _table(chains, outcome, cut_by, known, source)
        after_gap = chains["after_gap"]
        is_deferred = (after_gap > self._max_between_after_gap(chains["leaf"])) & (
            after_gap <= _MAX_CALLS_BETWEEN
        )
        is_deferred &= outcome != _CUT
        if not may_defer or not is_deferred.any():
            return table
        gap = np.where(chains["n_gaps"] > 0, _LOST, _TRACE_START).astype(np.uint8)
        rows = table.with_columns(
            after_gap=pl.Series(after_gap), gap=pl.Series(gap).cat.to(pl.Enum(CUTS))
        )
        self.deferred.append(rows.filter(is_deferred))
        return table.filter(~is_deferred)

    def deferred_rows(self) -> pl.DataFrame:
        """Return the rows that were held back, after the last call."""
        if not self.deferred:
            return RETRY_CHAINS.empty()
        deferred = pl.concat(self.deferred)
        is_cut = pl.col("after_gap") <= pl.Series(
            self._max_between_after_gap(deferred["leaf"].to_numpy())
        )
        outcome = pl.when(is_cut).then(pl.lit("cut", pl.Enum(OUTCOMES))).otherwise("outcome")
        cut_by = pl.when(is_cut).then("gap").otherwise("cut_by")
        return RETRY_CHAINS.conform(deferred.with_columns(outcome=outcome, cut_by=cut_by))

    def _outcomes(self, chains: ChainFields) -> tuple[U8, U8]:
        """Return the outcome of each chain, and the cause if it is cut."""
        is_open, is_lost = chains["is_open"] != 0, chains["is_lost"] != 0
        is_active, has_left, is_ambiguous = self._activity_after(chains, is_open)
        by_loss, by_start = chains["by_loss"] != 0, chains["by_start"] != 0
        after_gap, is_past_loss = chains["after_gap"], chains["n_gaps"] != 0
        may_continue = (after_gap != linking.NONE) & (
            after_gap <= self._max_between_after_gap(chains["leaf"])
        )
        by_loss |= may_continue & is_past_loss
        by_start |= may_continue & ~is_past_loss & ~by_loss
        by_loss |= is_open & (chains["last_flags"] & linking.RETURNED == 0) & is_active
        is_doubtful = (chains["is_doubtful"] != 0) | is_ambiguous
        # Without a loss since then, a call that does not name its request began before the trace.
        is_from_start = self.started_midway & ~is_past_loss & ~is_lost
        by_start |= is_doubtful & is_from_start
        by_loss |= is_doubtful & ~is_from_start & ~by_start
        is_cut = by_loss | by_start | is_open & ~has_left
        # The outcome depends on whether another thread settled the request before the loss.
        by_later_loss = is_open & is_lost & ~by_loss & ~by_start
        is_left = is_open & (~is_cut | by_later_loss)
        is_resolved = is_left & _is_settled(chains)
        by_loss |= by_later_loss
        is_error = chains["status"] & np.uint64(word.ERROR_BIT) != 0
        outcome = np.select(
            [is_resolved, is_cut | by_later_loss, is_open, is_error],
            [_RESOLVED, _CUT, _ABANDONED, _FAILED],
            _SUCCEEDED,
        )
        cut_by = np.select([by_loss, by_start], [_LOST, _TRACE_START], _TRACE_END)
        return outcome.astype(np.uint8), cut_by.astype(np.uint8)

    def _activity_after(self, chains: ChainFields, is_open: Flags) -> tuple[Flags, Flags, Flags]:
        """Activity of each thread after the last call of its open chain; False for ended chains.

        Returns:
            Whether the thread made any call; whether it began another request and so left this
            one; and whether a call that does not name its request may continue this one.
        """
        is_active, has_left, is_ambiguous = np.zeros((3, len(is_open)), np.bool_)
        at = np.flatnonzero(is_open)
        if not len(at):
            return is_active, has_left, is_ambiguous
        open_chains = ChainFields(chains, at)
        pair = self.pairs[open_chains["pair"]]
        owner, last, leaf = self.owners[pair["owner"]], open_chains["last"], open_chains["leaf"]
        is_fault = _special_leaves()[leaf] == linking.FAULT
        is_followed = open_chains["is_followed"] != 0
        # Entering the vCPU does not mean that the thread left a fault's request.
        is_active[at] = np.where(is_fault, owner["last_other"], owner["last"]) > last
        has_moved_on = np.where(is_fault, owner["began_other"], owner["began"]) > last
        # The thread may return to the request, as it returned to others.
        between = pair["n"] - open_chains["at"] - 1
        is_settled = (open_chains["is_settled"] != 0) & (
            open_chains["last_settled"] > open_chains["last_begins"]
        )
        has_moved_on &= (between > self._max_between(leaf)) | is_settled | is_followed
        has_left[at] = has_moved_on | (open_chains["is_void"] != 0)
        is_ambiguous[at] = ~is_followed & (pair["last_ambiguous"] > last)
        return is_active, has_left, is_ambiguous

    def _max_between(self, leaf: U16) -> I64:
        """Largest number of calls of a leaf before a thread returns to a request; NONE if never."""
        return np.minimum(self.max_between, _MAX_CALLS_BETWEEN)[leaf]

    def _max_between_after_gap(self, leaf: U16) -> I64:
        """Like :meth:`_max_between`, after a gap: there may be more calls than were recorded."""
        return np.clip(_MARGIN * self._max_between(leaf), linking.NONE, _MAX_CALLS_BETWEEN)


class ChainFields:
    """Selected rows of a table; each field is copied once, on first access.

    A row is far longer than a field, so copying single fields keeps the used data contiguous.

    Args:
        rows: The table, or another selection.
        at: Numbers of the selected rows.
    """

    def __init__(self, rows: Rows | ChainFields, at: NDArray[np.int64]) -> None:
        self._rows, self._at = rows, at
        self._cache: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return one field of all rows; do not modify it."""
        if name not in self._cache:
            self._cache[name] = self._rows[name][self._at]
        return self._cache[name]


def _is_settled(chains: ChainFields) -> Flags:
    """Return whether another thread settled each request before a loss in its own thread."""
    by_other = chains["tid"] != chains["settled_tid"]
    by_other |= chains["flags"] & chains["settled_flags"] & linking.TID == 0
    in_time = (chains["is_lost"] == 0) | (chains["settled_ends"] <= chains["until"])
    settled: Flags = (chains["is_settled"] != 0) & by_other & in_time
    return settled


def _columns(frame: pl.DataFrame, known: Survey) -> linking.CallColumns:
    """Return the columns of calls in the form that the loops accept."""
    flags = [pl.lit(0, pl.UInt16)]
    flags += [
        pl.col(name).is_not_null().cast(pl.UInt16) * bit
        for name, bit in _RECORDED.items()
        if frame[name].null_count() < frame.height
    ]
    flags.append(
        is_retryable(pl.col("status")).fill_null(False).cast(pl.UInt16) * linking.RETRYABLE
    )
    if "bounds" in frame.columns:
        flags.append(pl.col("bounds"))
    columns = frame.select(
        "leaf",
        "seq",
        pl.col("tid", "tgid", "gpa", "level", "vp_id", "page", "status").fill_null(0),
        owner=call_owner().reinterpret(signed=False),
        flags=pl.sum_horizontal(flags).cast(pl.UInt16),
        td=_td_of_request(frame, known),
        begins=pl.coalesce("start_ns", "end_ns"),
        ends=pl.coalesce("end_ns", "start_ns"),
    ).rename({"vp_id": "vp"})
    # numba treats writable and read-only arrays as two types.
    return linking.CallColumns(
        *(np.array(columns[name].to_numpy()) for name in linking.CallColumns._fields)
    )


def _td_of_request(frame: pl.DataFrame, known: Survey) -> pl.Series:
    """TD of each call: the recorded one, else the only one of its thread or process, else 0."""
    td = frame["td_id"]
    if td.null_count() and known.tds.height:
        unknown = np.flatnonzero(
            td.is_null().to_numpy() & (second_callers()[frame["leaf"].to_numpy()] != 0)
        )
        if len(unknown):
            found = infer_td(frame[unknown].select(known.tds.columns), known.tds, TD_OWNERS[:2])
            td = td.scatter(unknown, found["td_id"])
    return td.fill_null(0)


def _successes(calls: linking.CallColumns) -> Rows:
    """Return the calls that settled a request for every caller, or made requests void."""
    caller = second_callers()[calls.leaf]
    is_success = (caller == linking.BY_PAGE) & (calls.flags & linking.GPA != 0)
    is_success |= (caller == linking.BY_TD) & ((calls.flags & linking.TD != 0) | (calls.td != 0))
    is_success &= (calls.flags & linking.RETURNED != 0) & (calls.status < word.ERROR_BIT)
    at = np.flatnonzero(is_success)
    found = np.zeros(len(at), linking.SUCCESS)
    for name in linking.CallColumns._fields:
        if name in (linking.SUCCESS.names or ()):
            found[name] = getattr(calls, name)[at]
    unblocks = found[found["leaf"] == _UNBLOCK]
    if not len(unblocks):
        return found
    unblocks["voids"] = 1
    return np.concatenate([found, *_undone(unblocks)])


def _undone(unblocks: Rows) -> Iterator[Rows]:
    """Yield the requests that successful RANGE.UNBLOCK calls make void."""
    for leaf in _NEED_BLOCK:
        requests = unblocks.copy()
        requests["leaf"] = leaf
        yield requests
    requests = unblocks[unblocks["level"] == 0]
    requests["leaf"] = _RELOCATE
    requests["flags"] &= ~np.uint16(linking.LEVEL)
    yield requests


def _table(
    chains: ChainFields, outcome: U8, cut_by: U8, known: Survey, source: int
) -> pl.DataFrame:
    """Rows of ``retry_chains``, one per chain."""
    n, flags, last = len(chains), chains["flags"], chains["last_flags"]
    columns = {name: pl.Series(chains[name]) for name in _COPIED_FIELDS}
    operands = flags & identifying_operands()[chains["leaf"]]
    is_entry = chains["leaf"] == VP_ENTER
    end_flag = np.where(is_entry, linking.START, linking.END)
    took = np.where(is_entry, chains["last_begins"], chains["ends"]) - chains["begins"]
    is_timed = (flags & linking.START != 0) & (last & end_flag != 0)
    rows = pl.DataFrame(
        {
            "source": pl.Series([source], dtype=pl.UInt16).new_from_index(0, n),
            "first_seq": columns["first_seq"],
            "last_seq": columns["last_seq"],
            "leaf": columns["leaf"],
            "tid": _null_unless(columns["tid"], flags & linking.TID),
            "tgid": _null_unless(columns["tgid"], chains["known"] & linking.TGID),
            "td_id": _null_unless(columns["td"], chains["known"] & linking.TD),
            "vp_id": _null_unless(columns["vp"], chains["known"] & linking.VP),
            "gpa": _null_unless(columns["gpa"], operands & linking.GPA),
            "level": _null_unless(columns["level"], operands & linking.LEVEL),
            "start_ns": columns["begins"],
            "end_ns": columns["ends"],
            "took_ns": _null_unless(pl.Series(took), is_timed),
            "n_attempts": columns["n"].cast(pl.UInt32),
            "n_busy": columns["n_busy"].cast(pl.UInt32),
            "n_segments": columns["n_segments"].cast(pl.UInt32),
            "outcome": pl.Series(outcome).cat.to(pl.Enum(OUTCOMES)),
            "final_status": _null_unless(columns["status"], last & linking.RETURNED),
            "identity": identity(chains["leaf"], flags),
            "cut_by": _null_unless(pl.Series(cut_by).cat.to(pl.Enum(CUTS)), outcome == _CUT),
            "settled_seq": _null_unless(columns["settled_seq"], outcome == _RESOLVED),
            "begin_lost": (chains["by_loss"] | chains["by_start"]) != 0,
        }
    )
    return RETRY_CHAINS.conform(infer_td(rows, known.tds, TD_OWNERS[:2]))


_COPIED_FIELDS: Final = (
    *("first_seq", "last_seq", "leaf", "tid", "tgid", "td", "vp", "gpa", "level", "begins"),
    *("ends", "n", "n_busy", "n_segments", "status", "settled_seq"),
)


def _null_unless(values: pl.Series, flags: NDArray[Any]) -> pl.Series:
    """Values where a flag is set, else null."""
    is_set = flags != 0
    if is_set.all():
        return values
    return pl.select(pl.when(pl.Series(is_set)).then(values)).to_series()


@cache
def _special_leaves() -> U8:
    """For each leaf: ENTRY if it enters a vCPU, FAULT if it handles a page fault, else 0."""
    found = np.zeros(1 << 16, np.uint8)
    found[VP_ENTER] = linking.ENTRY
    found[_FAULT_LEAVES] = linking.FAULT
    return found


def _heads(n: int) -> NDArray[np.int32]:
    """An empty hash table for ``n`` entries; its size is a power of 2."""
    return np.full(1 << max(n, _SMALLEST_TABLE).bit_length(), linking.NONE, np.int32)


def _array(rows: Rows, n: int, kind: np.dtype[np.void]) -> Rows:
    """Return the first ``n`` rows of a table that a loop filled."""
    if isinstance(rows, np.ndarray):
        return rows[:n]
    return np.array([tuple(rows[at].values()) for at in range(n)], kind)


def _with_capacity(rows: Rows, n: int) -> Rows:
    """Return a copy of the table with ``n`` further zero rows."""
    table = np.zeros(len(rows) + n, rows.dtype)
    table[: len(rows)] = rows
    return table


def number_answers(calls: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Find the busy answers of chains that were linked without keeping answers.

    Args:
        calls: The retryable rows of the ``seamcalls`` table.
        chains: The retried rows of the ``retry_chains`` table.

    Returns:
        The answers of these chains, in the form of :func:`take_answers`.
    """
    parts = [_NO_ANSWERS]
    for source, of_source in _by_source(calls):
        own_chains, seq = chains.filter(pl.col("source") == source), pl.col("seq")
        # The bounds come from the chains, which were separated by losses, threads or processes.
        opens = seq.is_in(own_chains["first_seq"].implode()).cast(pl.UInt16) * linking.OPENS
        closes = seq.is_in(own_chains["last_seq"].implode()).cast(pl.UInt16) * linking.CLOSES
        linker, known = Linker(), Survey()
        known.add(of_source, are_all=True)
        batches = _batches(of_source.with_columns(bounds=opens + closes))
        parts += [number_batch(batch, linker.add(batch, known)[1]) for batch in batches]
    begun = chains.select("source", "first_seq")
    return pl.concat(parts).join(begun, on=["source", "first_seq"], how="semi")
