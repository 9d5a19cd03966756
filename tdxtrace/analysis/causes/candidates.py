"""Calls that may have held the lock for which an attempt was busy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Flags, Index, Rows, Times, read_only
from tdxtrace.analysis.causes import conflicts, keys
from tdxtrace.analysis.causes.conflicts import TREE, LockConflicts
from tdxtrace.analysis.causes.entry_locks import is_refused_before
from tdxtrace.analysis.causes.overlaps import Intervals, overlapping_pairs
from tdxtrace.analysis.loops.arming import (
    ARMED_UNKNOWN,
    FAULTED,
    MOVED,
    NOT_ENTERED,
    REFUSED,
    UNMOVED,
    grade_armed_entries,
)
from tdxtrace.analysis.loops.ranking import (
    BOUNDS_UNKNOWN,
    HELD_BRIEFLY,
    HELD_TO_END,
    MISS_RATIO,
)
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.analysis.zero_steps import ARMING_FAULT, exits_without_progress
from tdxtrace.compiler import choose
from tdxtrace.tdx import word
from tdxtrace.tdx.exit_reasons import exit_reason_number

# TDH.VP.ENTER releases the epoch, OP_STATE and the tree before the guest runs; a trace does not
# show when.  Upper bound: the shortest full exit and entry that was measured, for CPUID through
# KVM, 3,851 ns (TUM-DSE/CVM_eval benchmarks/vmexit/README.md, 5bc6ab0).  Inferred.
ENTRY_NS: Final = 3_851


@dataclass(frozen=True, slots=True)
class BusyAttempts:
    """Busy attempts of one source, and the parameters of the search for their holders."""

    calls: pl.DataFrame
    """Calls of all threads (:func:`~.evidence.activity`)."""
    attempts: pl.DataFrame
    """Columns row (in ``calls``), leaf, operand_id, lock, scope, mask; by attempt and lock."""
    slack_ns: int
    """Resolution of the clock in ns: largest difference of two timestamps of one instant."""
    mask: int
    """Lock generations to consider."""
    entry_ns: int = ENTRY_NS

    @property
    def rows(self) -> Rows:
        """Rows of the attempts in ``calls``, ascending."""
        of_lock = self.attempts["row"].to_numpy()
        return of_lock[self._first]

    @property
    def masks(self) -> NDArray[np.uint8]:
        """Generations in which the answer is possible, one mask for each of ``rows``."""
        masks = self.attempts["mask"].to_numpy()
        first = np.flatnonzero(self._first)
        return np.bitwise_or.reduceat(masks, first) if len(first) < len(masks) else masks

    @property
    def first_locks(self) -> pl.DataFrame:
        """Rows of ``attempts`` with the first lock of each attempt."""
        return self.attempts.filter(pl.Series(self._first))

    @property
    def _first(self) -> Flags:
        of_lock = self.attempts["row"].to_numpy()
        first = np.ones(len(of_lock), np.bool_)
        first[1:] = of_lock[1:] != of_lock[:-1]
        return first


@cache
def candidate_columns() -> dict[str, pl.DataType | type[pl.DataType]]:
    """Return the columns of :func:`find_candidates` and their types."""
    return {
        "attempt": pl.UInt32,
        "holder": pl.UInt32,
        "lock": conflicts.lock_type(),
        "mask": pl.UInt8,
        "grade": pl.UInt8,
        "overlap_ns": pl.Int64,
        "core_ns": pl.Int64,
        "is_armed": pl.Boolean,
    }


def find_candidates(busy: BusyAttempts) -> pl.DataFrame:
    """Find every host call that overlaps a busy attempt and holds a conflicting lock.

    Returns:
        Columns of :func:`candidate_columns`, one row per attempt, lock and holder: attempt and
        holder are rows of ``calls``; mask is the generations in which the two exclude each other;
        grade is HELD_TO_END, HELD_BRIEFLY, a grade of :func:`armed_entries` or BOUNDS_UNKNOWN;
        overlap_ns is the time both lasted together, negative for a gap within the slack; core_ns is
        the overlap after :func:`min_lock_latency` is taken off both ends of each call, negative
        for a gap.
    """
    begun = busy.calls["start_ns"].gather(busy.attempts["row"]).is_not_null()
    timed = busy.attempts.filter(begun & busy.attempts["lock"].is_not_null())
    latency = min_lock_latency(busy.calls, pl.Series(busy.rows), busy.slack_ns)
    parts = [pl.DataFrame(schema=candidate_columns())]
    for (lock, scope), rows in timed.group_by("lock", "scope", maintain_order=True):
        tables = conflicts.lock_conflicts(str(lock), str(scope))
        found = [_candidates_of_lock(busy, table, rows, latency) for table in tables]
        parts.append(_merge([part for part in found if part.height]))
    return pl.concat(parts)


def _merge(found: list[pl.DataFrame]) -> pl.DataFrame:
    """Concatenate candidates; merge rows of a holder that matches an attempt by several pages."""
    rows = pl.concat([pl.DataFrame(schema=candidate_columns()), *found])
    if len(found) < 2:
        return rows
    pair = ["attempt", "holder", "lock"]
    return rows.group_by(pair, maintain_order=True).agg(
        pl.col("mask").bitwise_or(), pl.exclude(*pair, "mask").first()
    )


def _candidates_of_lock(
    busy: BusyAttempts, table: LockConflicts, attempts: pl.DataFrame, latency: Times
) -> pl.DataFrame:
    lock, calls = table.lock, busy.calls
    attempt_rows = attempts["row"].to_numpy()
    holding = table.holders(attempts["leaf"].unique().to_numpy().astype(np.intp), busy.mask)
    leaf = calls["leaf"].to_numpy()
    rows = np.flatnonzero(holding[leaf])
    grade = np.full(len(rows), HELD_TO_END, np.uint8)
    if lock == TREE and holding[VP_ENTER]:
        is_entry = leaf[rows] == VP_ENTER
        rows, grade = _add_armed_entries(calls, rows[~is_entry])
    grade = _grades(calls, lock, rows, grade)
    is_candidate = grade <= BOUNDS_UNKNOWN
    rows, grade = rows[is_candidate], grade[is_candidate]
    of_row = np.zeros(calls.height, np.uint8)
    of_row[rows] = grade
    begins, ends = (calls[name].to_numpy() for name in ("begins", "ends"))
    held_until = ends
    if conflicts.is_released_before_guest(lock):
        held_until = np.where(leaf == VP_ENTER, np.minimum(ends, begins + busy.entry_ns), ends)
    attempt, holder = _pairs(busy, table, attempt_rows, rows, held_until)
    start, end = begins[attempt], ends[attempt]
    held_from, held_to = begins[holder], held_until[holder]
    own, other = np.minimum(latency[attempt], (end - start) // 2), latency[holder]
    return pl.DataFrame(
        {
            "attempt": attempt,
            "holder": holder,
            "lock": pl.repeat(lock, len(attempt), dtype=conflicts.lock_type(), eager=True),
            "mask": table.masks[leaf[attempt], leaf[holder]] & np.uint8(busy.mask),
            "grade": of_row[holder],
            "overlap_ns": np.minimum(end, held_to) - np.maximum(start, held_from),
            "core_ns": np.minimum(held_to - other - start - own, end - own - held_from - other),
            "is_armed": (leaf[holder] == VP_ENTER) & (lock == TREE),
        },
        schema_overrides=candidate_columns(),
    )


def _add_armed_entries(calls: pl.DataFrame, others: Index) -> tuple[Index, NDArray[np.uint8]]:
    """Return candidate holders of the tree, and grades: ``others`` and entries that were armed."""
    entries = armed_entries(calls)
    rows = np.concatenate([others, entries["row"].to_numpy().astype(np.intp)])
    held_to_end = np.full(len(others), HELD_TO_END, np.uint8)
    return rows, np.concatenate([held_to_end, entries["armed"].to_numpy()])


_NOT_HELD: Final = BOUNDS_UNKNOWN + 1


def _grades(
    calls: pl.DataFrame, lock: str, rows: Index, grade: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Downgrade calls that failed before or after the lock, or whose bounds are unknown."""
    status = calls["status"].gather(rows)
    frame = pl.select(
        never=is_refused_before(lock, pl.lit(status)).fill_null(False),
        busy=word.is_busy(pl.lit(status)).fill_null(False),
    )
    is_never_held, busy = (column.to_numpy() for column in frame)
    known = calls["certain"].to_numpy()[rows]
    held = np.where(known, grade, np.maximum(grade, BOUNDS_UNKNOWN)).astype(np.uint8)
    refused = np.flatnonzero(busy)
    is_held_briefly = _held_before(
        lock, calls["leaf"].to_numpy()[rows[refused]], status.gather(refused)
    )
    held[refused] = np.where(is_held_briefly, np.maximum(held[refused], HELD_BRIEFLY), _NOT_HELD)
    held[is_never_held] = _NOT_HELD
    return held


def _held_before(lock: str, leaf: NDArray[np.uint16], status: pl.Series) -> Flags:
    """Return whether calls that returned OPERAND_BUSY held the lock before they failed."""
    rows = conflicts.held_before().filter(pl.col("lock") == lock)
    if rows.is_empty():
        return np.zeros(len(leaf), np.bool_)
    ids = rows["operand_id"].unique().sort().to_numpy()
    held = np.zeros((conflicts.N_LEAVES, len(ids) + 1), np.bool_)
    held[rows["leaf"].to_numpy(), np.searchsorted(ids, rows["operand_id"].to_numpy())] = True
    operand = pl.select(word.low32(pl.lit(status))).to_series().to_numpy()
    place = np.minimum(np.searchsorted(ids, operand), len(ids) - 1)
    found: Flags = held[leaf, np.where(ids[place] == operand, place, len(ids))]
    return found


def min_lock_latency(calls: pl.DataFrame, attempts: pl.Series, slack_ns: int) -> Times:
    """Estimate the shortest time between the start or end of a call and its locked section.

    A busy call only enters the module, fails, and returns, with probes on either side.  It
    therefore tries the lock near its middle: a call needs about half of the duration of a short
    busy call to acquire its locks, and again to return after it released them.  Estimated from
    the trace itself, separately for TDH.VP.ENTER and for other leaves; inferred.

    Args:
        calls: Calls of one source.
        attempts: Rows of its busy attempts.
        slack_ns: Resolution of the clock: shorter durations are recorded as 0.

    Returns:
        ns for each row of ``calls``; 0 if no busy call has a duration.
    """
    took = (calls["end_ns"] - calls["start_ns"]).gather(attempts)
    enters = calls["leaf"].gather(attempts) == VP_ENTER
    least = [
        max(int(part.quantile(_LATENCY_QUANTILE, "lower") or 0), slack_ns) // 2
        for part in (took.filter(~enters), took.filter(enters))
    ]
    other, enter = least if all(least) else (max(least), max(least))
    return np.where(calls["leaf"].to_numpy() == VP_ENTER, enter, other).astype(np.int64)


# Not the minimum: one pair of timestamps may be wrong.
_LATENCY_QUANTILE: Final = 0.1


def may_have_held_lock() -> pl.Expr:
    """Return whether a candidate may have held the lock when the attempt tried it.

    True if the locked sections overlap according to :func:`min_lock_latency`, or if the gap between
    them is small in relation to the overlap of the calls: the latencies are estimates.  Nearest
    innocent trace: a call that overlaps only while one of the two enters or leaves the module.

    Returns:
        Boolean expression over the columns of :func:`candidate_columns`.
    """
    return pl.col("overlap_ns") >= -MISS_RATIO * pl.col("core_ns")


def _pairs(
    busy: BusyAttempts, table: LockConflicts, attempts: Rows, rows: Index, held_until: Times
) -> tuple[Rows, Rows]:
    """Return pairs of an attempt and an overlapping, conflicting call among ``rows``."""
    calls = busy.calls
    begins, ends = (calls[name].to_numpy() for name in ("begins", "ends"))
    wanted, held = (of[np.argsort(begins[of], kind="stable")] for of in (attempts, rows))
    wanted_key, held_key = keys.keys(calls, table.scope, table.holder_scope, wanted, held)
    threads, leaf = owners(calls), calls["leaf"].to_numpy()
    attempt, holder = overlapping_pairs(
        Intervals(begins, ends, wanted_key, wanted, threads, leaf),
        Intervals(begins, held_until, held_key, held, threads, leaf),
        busy.slack_ns,
        may_conflict=table.masks & np.uint8(busy.mask),
    )
    same = keys.is_same_resource(calls, table, attempt, holder)
    return (attempt, holder) if same.all() else (attempt[same], holder[same])


def owners(calls: pl.DataFrame) -> NDArray[np.int32]:
    """Return the thread of each call; -2 - cpu for an idle thread, because each CPU has one."""
    cpu = pl.col("cpu").cast(pl.Int32)
    idle = pl.when((pl.col("tid") == 0) & cpu.is_not_null()).then(-2 - cpu)
    return calls.select(idle.otherwise(pl.col("tid")).fill_null(-1)).to_series().to_numpy()


# Bytes that the loop reads per entry; decides whether the loop is compiled.
_BYTES_PER_ENTRY: Final = 10


def armed_entries(calls: pl.DataFrame) -> pl.DataFrame:
    """Find the entries that may have held the SEPT tree for zero-step mitigation.

    Evidence, by grade.  ``ARMED``: the previous entry was busy on the tree, which only an armed
    mitigation tries to take.  ``PERHAPS_ARMED``: at least ARMING_FAULT EPT violations preceded the
    entry without an exit that an executed instruction causes, and an entry of that run was
    busy; the trace does not show how long RIP stood still.  ``ARMED_UNKNOWN``: as many violations
    without a busy entry, or no earlier sign that the vCPU executed an instruction.  An entry that
    was itself refused holds nothing.

    Absence: no trace has the guest's RIP, so an exit that no instruction causes does not end a
    run.  Nearest innocent trace: seven faults at different instructions, each completed at the
    next entry; no status shows that.

    Args:
        calls: Calls of one source (:func:`~.evidence.activity`).

    Returns:
        Columns row (index into ``calls``) and armed (UInt8: the grade), for those entries only.
    """
    rows = np.flatnonzero((calls["leaf"] == VP_ENTER).to_numpy())
    rows = rows[np.argsort(calls["begins"].to_numpy()[rows], kind="stable")]
    status = pl.lit(calls["status"].gather(rows))
    exited = status < word.ERROR_BIT
    reason = pl.when(exited).then(status.cast(pl.UInt32, strict=False))
    kind = (
        pl.when(reason == exit_reason_number("EPT_VIOLATION"))
        .then(FAULTED)
        .when(reason.is_not_null() & ~reason.is_in(exits_without_progress()))
        .then(MOVED)
        .when(exited)
        .then(UNMOVED)
        .when(word.is_busy_on(status, word.TDX_OPERAND_ID_SEPT))
        .then(REFUSED)
        .otherwise(NOT_ENTERED)
    )
    event_kinds = pl.select(kind.cast(pl.UInt8)).to_series().to_numpy()
    tids = calls["tid"].gather(rows).fill_null(-1)
    threads = tids.unique().sort().to_numpy()
    thread = np.searchsorted(threads, tids.to_numpy()).astype(np.int32)
    armed = np.empty(len(rows), np.uint8)
    n_runs = len(rows) + len(threads)
    scratch = np.empty((3, len(threads)), np.int32), np.zeros(n_runs, np.bool_)
    run = choose(len(rows) * _BYTES_PER_ENTRY)
    run(grade_armed_entries)(*read_only(thread, event_kinds), ARMING_FAULT, *scratch, armed)
    may_be_armed = armed <= ARMED_UNKNOWN
    columns = {"row": rows[may_be_armed], "armed": armed[may_be_armed]}
    return pl.DataFrame(columns, schema_overrides={"row": pl.UInt32})


GUESTS_INSIDE = {"attempt": pl.UInt32, "holder": pl.UInt32, "overlap_ns": pl.Int64}


def guests_inside(calls: pl.DataFrame, attempts: pl.Series, slack_ns: int) -> pl.DataFrame:
    """Find the entries of a TD whose guest may have run during each attempt on that TD.

    A guest takes the lock of an SEPT entry in TDG.MEM.PAGE.ACCEPT, ATTR.RD and ATTR.WR.  A host
    trace does not record these calls: it only shows that the vCPU was inside the guest.

    Args:
        calls: Calls of one source.
        attempts: Rows of the attempts in ``calls``.
        slack_ns: Resolution of the clock.

    Returns:
        Columns of GUESTS_INSIDE, one row per attempt and entry.
    """
    begins, ends = (calls[name].to_numpy() for name in ("begins", "ends"))
    entries = np.flatnonzero((calls["leaf"] == VP_ENTER).to_numpy())
    rows, entries = (
        of[np.argsort(begins[of], kind="stable")] for of in (attempts.to_numpy(), entries)
    )
    wanted_key, held_key = keys.keys(calls, "td", "td", rows, entries)
    threads = owners(calls)
    attempt, entry = overlapping_pairs(
        Intervals(begins, ends, wanted_key, rows, threads),
        Intervals(begins, ends, held_key, entries, threads),
        slack_ns,
    )
    overlap = np.minimum(ends[attempt], ends[entry]) - np.maximum(begins[attempt], begins[entry])
    columns = {"attempt": attempt, "holder": entry, "overlap_ns": overlap}
    return pl.DataFrame(columns, schema_overrides=GUESTS_INSIDE)
