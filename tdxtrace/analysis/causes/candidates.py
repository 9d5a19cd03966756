"""Calls that may have held the lock that a busy attempt found taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Index, Times
from tdxtrace.analysis.causes import conflicts, keys
from tdxtrace.analysis.causes.conflicts import TREE, LockConflicts
from tdxtrace.analysis.causes.entry_locks import is_refused_before
from tdxtrace.analysis.causes.overlaps import Intervals, overlapping_pairs
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.analysis.zero_steps import exits_without_progress
from tdxtrace.tdx import word
from tdxtrace.tdx.exit_reasons import STEPPING_EPF_THRESHOLD, exit_reason_number

# TDH.VP.ENTER releases the epoch, OP_STATE and the tree before the guest runs; a trace does not
# show when.  Upper bound: the shortest full exit and entry that was measured, CPUID through
# KVM, 3,851 ns (TUM-DSE/CVM_eval benchmarks/vmexit/README.md, 5bc6ab0).  Inferred.
ENTRY_NS: Final = 3_851

HELD_TO_END, HELD_BRIEFLY, BOUNDS_UNKNOWN = 0, 1, 2
"""Grades of a candidate: it held the lock to its end; briefly, or perhaps; bounds not known."""
CANDIDATES: Final = {
    "attempt": pl.UInt32,
    "holder": pl.UInt32,
    "lock": pl.String,
    "mask": pl.UInt8,
    "grade": pl.UInt8,
    "overlap_ns": pl.Int64,
    "core_ns": pl.Int64,
    "is_armed": pl.Boolean,
}


@dataclass(frozen=True, slots=True)
class BusyAttempts:
    """Busy attempts of one source, and what bounds the search for their holders."""

    calls: pl.DataFrame
    """Calls of all threads (:func:`~.activity.activity`)."""
    attempts: pl.DataFrame
    """Columns row (in ``calls``), leaf, operand_id, lock, scope, mask; per attempt and lock."""
    slack_ns: int
    """Resolution of the clock: how far apart two timestamps of one instant can lie."""
    mask: int
    """Generations to consider."""
    entry_ns: int = ENTRY_NS


def find_candidates(busy: BusyAttempts) -> pl.DataFrame:
    """Find every host call that overlaps a busy attempt and holds a lock against it.

    Returns:
        Columns of CANDIDATES, one row per attempt, lock and holder: attempt and holder are
        rows of ``calls``; mask the generations in which the two exclude each other; grade as
        above; overlap_ns the time both lasted together, below 0 within the slack; core_ns the
        overlap of the times that remain when :func:`min_lock_latency` is taken off both ends,
        below 0 by how far they are apart.
    """
    begun = busy.calls["start_ns"].gather(busy.attempts["row"]).is_not_null()
    timed = busy.attempts.filter(begun & busy.attempts["lock"].is_not_null())
    parts = [pl.DataFrame(schema=CANDIDATES)]
    for (lock, scope), rows in timed.group_by("lock", "scope", maintain_order=True):
        tables = conflicts.lock_conflicts(str(lock), str(scope))
        found = [_candidates_of_lock(busy, table, rows) for table in tables]
        parts.append(_merge([part for part in found if part.height]))
    return pl.concat(parts)


def _merge(found: list[pl.DataFrame]) -> pl.DataFrame:
    """Concatenate candidates; a holder of several pages that match an attempt is one row."""
    rows = pl.concat([pl.DataFrame(schema=CANDIDATES), *found])
    if len(found) < 2:
        return rows
    pair = ["attempt", "holder", "lock"]
    return rows.group_by(pair, maintain_order=True).agg(
        pl.col("mask").bitwise_or(), pl.exclude(*pair, "mask").first()
    )


def _candidates_of_lock(
    busy: BusyAttempts, table: LockConflicts, attempts: pl.DataFrame
) -> pl.DataFrame:
    lock = table.lock
    attempting = attempts["leaf"].unique().to_numpy().astype(np.intp)
    holding = table.holders(attempting, busy.mask)
    leaf = busy.calls["leaf"].to_numpy()
    rows = np.flatnonzero(holding[leaf])
    grade = np.full(len(rows), HELD_TO_END, np.uint8)
    is_entry = leaf[rows] == VP_ENTER
    if lock == TREE and is_entry.any():
        rows, grade = _add_armed_entries(busy.calls, rows[~is_entry])
        is_entry = leaf[rows] == VP_ENTER
    grade = _grades(busy.calls, lock, rows, grade)
    kept = grade <= BOUNDS_UNKNOWN
    rows, is_entry, grade = rows[kept], is_entry[kept], grade[kept]
    begins, ends = (busy.calls[name].to_numpy()[rows] for name in ("begins", "ends"))
    if conflicts.is_released_before_guest(lock):
        ends = np.where(is_entry, np.minimum(ends, begins + busy.entry_ns), ends)
    pairs = _pairs(busy, table, attempts["row"].to_numpy().astype(np.intp), rows, begins, ends)
    attempt, place, mask, overlap, core = pairs
    return pl.DataFrame(
        {
            "attempt": attempt,
            "holder": rows[place],
            "lock": pl.repeat(lock, len(attempt), eager=True),
            "mask": mask,
            "grade": grade[place],
            "overlap_ns": overlap,
            "core_ns": core,
            "is_armed": is_entry[place] & (lock == TREE),
        },
        schema_overrides=CANDIDATES,
    )


def _add_armed_entries(calls: pl.DataFrame, others: Index) -> tuple[Index, NDArray[np.uint8]]:
    """Candidate holders of the tree: other leaves as given, and entries armed by the mitigation."""
    entries = armed_entries(calls)
    rows = np.concatenate([others, entries["row"].to_numpy().astype(np.intp)])
    whole = np.full(len(others), HELD_TO_END, np.uint8)
    return rows, np.concatenate([whole, entries["armed"].to_numpy()])


_NOT_HELD: Final = BOUNDS_UNKNOWN + 1


def _grades(
    calls: pl.DataFrame, lock: str, rows: Index, grade: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Lower the grade of calls that failed on the way, or whose bounds are not known."""
    status, certain = pl.col("status"), pl.col("certain")
    is_busy = word.is_busy(status)
    never = is_refused_before(lock, status).fill_null(False)
    held_before = (
        conflicts.held_before().filter(pl.col("lock") == lock).select("leaf", "operand_id")
    )
    frame = calls[rows].select(
        "leaf", "certain", never=never, busy=is_busy.fill_null(False), id=word.low32(status)
    )
    frame = frame.join(
        held_before.with_columns(brief=pl.lit(True)),
        left_on=["leaf", "id"],
        right_on=["leaf", "operand_id"],
        how="left",
        maintain_order="left",
    )
    failed = (
        pl.when("never")
        .then(_NOT_HELD)
        .when(~pl.col("busy"))
        .then(HELD_TO_END)
        .when("brief")
        .then(HELD_BRIEFLY)
        .otherwise(_NOT_HELD)
    )
    bounds = pl.when(certain).then(HELD_TO_END).otherwise(BOUNDS_UNKNOWN)
    worst: NDArray[np.int32] = (
        frame.select(pl.max_horizontal(failed, bounds).cast(pl.Int32)).to_series().to_numpy()
    )
    return np.maximum(grade, worst.astype(np.uint8))


def min_lock_latency(calls: pl.DataFrame, attempts: pl.Series, slack_ns: int) -> Times:
    """Estimate the shortest time from the start of a call to its locks, and from them to its end.

    A busy answer only enters the module, fails, and returns, with probes on either side.  So it
    met the lock about its middle, and half of the duration of a short busy answer passes before
    a call has its locks and after it released them.  Taken from the trace itself, separately
    for TDH.VP.ENTER and for other leaves; inferred.

    Args:
        calls: Calls of one source.
        attempts: Rows of its busy attempts.
        slack_ns: Resolution of the clock: shorter durations are recorded as 0.

    Returns:
        ns for each row of ``calls``; 0 where no busy answer was timed.
    """
    failed = calls[attempts].select("start_ns", "end_ns", "leaf").drop_nulls()
    took = failed.select(
        ns=pl.col("end_ns") - pl.col("start_ns"), enters=pl.col("leaf") == VP_ENTER
    )
    least = [
        max(int(part["ns"].quantile(_LATENCY_QUANTILE, "lower") or 0), slack_ns) // 2
        for part in (took.filter(~pl.col("enters")), took.filter("enters"))
    ]
    other, enter = least if all(least) else (max(least), max(least))
    return np.where(calls["leaf"].to_numpy() == VP_ENTER, enter, other).astype(np.int64)


# Not the minimum: one pair of timestamps may be wrong.
_LATENCY_QUANTILE: Final = 0.1

# A choice.  The latencies are a decile of what was measured, so a call that misses by little may
# have been a faster one: in 32 simulated runs (zero_step_attack and string_copy, 1,144 answers)
# true holders overlapped at least 13 times as long as they missed.
_MISS_RATIO: Final = 9


def may_have_met() -> pl.Expr:
    """Whether a candidate may have held the lock when the attempt met it.

    It may if both had their locks at one time by :func:`min_lock_latency`, or if they miss that by
    little, measured by their overlap: the latencies are estimates.  A call that overlaps only
    while one of the two enters or leaves the module is the innocent case nearest to it.

    Returns:
        Boolean, of the columns of CANDIDATES.
    """
    return pl.col("overlap_ns") >= -_MISS_RATIO * pl.col("core_ns")


_Pairs = tuple[Index, Index, NDArray[np.uint8], Times, Times]


def _pairs(
    busy: BusyAttempts,
    table: LockConflicts,
    attempts: Index,
    rows: Index,
    begins: Times,
    ends: Times,
) -> _Pairs:
    """Attempts, and places in ``rows`` that overlap them on the same resource and exclude them."""
    calls = busy.calls
    wanted_key, held_key = keys.keys(calls, table.scope, table.holder_scope, attempts, rows)
    keyed_wanted, keyed_held = np.flatnonzero(wanted_key >= 0), np.flatnonzero(held_key >= 0)
    start, end = (calls[name].to_numpy()[attempts] for name in ("begins", "ends"))
    tid = calls["tid"].fill_null(-1).to_numpy()
    cpu = calls["cpu"].to_numpy()
    leaf = calls["leaf"].to_numpy()
    latency = min_lock_latency(calls, busy.attempts["row"].unique(), busy.slack_ns)
    found: list[_Pairs] = []
    wanted = Intervals(wanted_key[keyed_wanted], start[keyed_wanted], end[keyed_wanted])
    held = Intervals(held_key[keyed_held], begins[keyed_held], ends[keyed_held])
    for i, j in overlapping_pairs(wanted, held, busy.slack_ns):
        a, h = keyed_wanted[i], keyed_held[j]
        mask = table.masks[leaf[attempts[a]], leaf[rows[h]]] & np.uint8(busy.mask)
        # The idle threads of all CPUs have tid 0.
        same_thread = (tid[attempts[a]] == tid[rows[h]]) & (
            (tid[rows[h]] != 0) | (cpu[attempts[a]] == cpu[rows[h]])
        )
        keep = (mask > 0) & ~same_thread
        a, h, mask = a[keep], h[keep], mask[keep]
        same = keys.is_same_resource(calls, table, attempts[a], rows[h])
        a, h, mask = a[same], h[same], mask[same]
        own, other = latency[attempts[a]], latency[rows[h]]
        overlap = np.minimum(end[a], ends[h]) - np.maximum(start[a], begins[h])
        half = (end[a] - start[a]) // 2
        own = np.minimum(own, half)
        core = np.minimum(ends[h] - other - start[a] - own, end[a] - own - begins[h] - other)
        found.append((attempts[a], h, mask, overlap, core))
    none = np.zeros(0, np.intp)
    empty = (none, none, np.zeros(0, np.uint8), none.astype(np.int64), none.astype(np.int64))
    parts = [empty, *found]
    attempt, place, mask, overlap, core = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return attempt, place, mask, overlap, core


# The seventh counted fault at one RIP logs a page and arms the next entry: TDX module
# src/td_transitions/td_exit_stepping.c, 1.0.00 to 1.5.25.
ARMED_AFTER: Final = STEPPING_EPF_THRESHOLD + 1
_REFUSED: Final = word.is_busy_on(pl.col("status"), word.TDX_OPERAND_ID_SEPT)

ARMED, PERHAPS_ARMED, ARMED_UNKNOWN = 0, 1, 2


def armed_entries(calls: pl.DataFrame) -> pl.DataFrame:
    """Find the entries that may have held the SEPT tree for zero-step mitigation.

    ``ARMED``: the entry before it was answered busy on the tree, which only an armed mitigation
    tries to take.  ``PERHAPS_ARMED``: at least ARMED_AFTER EPT violations preceded it without an
    exit that an executed instruction causes, and an entry of that run was answered busy; how
    long RIP stood still is not shown.  ``ARMED_UNKNOWN``: as many violations without such an
    answer, or the vCPU was not yet seen to execute anything.  An entry that was itself refused
    holds nothing.

    Absence: the guest's RIP is in no trace, so an exit that no instruction causes does not end a
    run.  Nearest innocent trace: seven faults of instructions of which each was done at the
    next entry, which no answer shows.

    Args:
        calls: Calls of one source (:func:`~.activity.activity`).

    Returns:
        Columns row (place in ``calls``) and armed (UInt8), for those entries only.
    """
    violation = exit_reason_number("EPT_VIOLATION")
    entries = (
        calls.lazy()
        .select("leaf", "tid", "status", "begins", "seq")
        .with_row_index("row")
        .filter(pl.col("leaf") == VP_ENTER)
        .sort("tid", "begins", "seq")
    )
    exited = pl.col("status") < word.ERROR_BIT
    reason = pl.when(exited).then(pl.col("status").cast(pl.UInt32, strict=False))
    moved = reason.is_not_null() & ~reason.is_in(exits_without_progress())
    steps = entries.with_columns(
        is_fault=(reason == violation).fill_null(False).cast(pl.UInt32),
        moved=moved.shift().over("tid").fill_null(False),
        was_refused=_REFUSED.shift().over("tid").fill_null(False),
        entered=exited.fill_null(False),
    ).with_columns(run=pl.col("moved").cast(pl.UInt32).cum_sum().over("tid"))
    refused_in_run = _REFUSED.fill_null(False).any().over("tid", "run")
    n_before = pl.col("is_fault").cum_sum().over("tid", "run") - pl.col("is_fault")
    armed = (
        pl.when("was_refused")
        .then(ARMED)
        .when((n_before >= ARMED_AFTER) & refused_in_run)
        .then(PERHAPS_ARMED)
        .when((n_before >= ARMED_AFTER) | (pl.col("run") == 0))
        .then(ARMED_UNKNOWN)
    )
    return (
        steps.with_columns(armed=armed.cast(pl.UInt8))
        .filter(pl.col("armed").is_not_null() & pl.col("entered"))
        .select("row", "armed")
        .collect()
    )


GUESTS_INSIDE = {"attempt": pl.UInt32, "holder": pl.UInt32, "overlap_ns": pl.Int64}


def guests_inside(calls: pl.DataFrame, attempts: pl.Series, slack_ns: int) -> pl.DataFrame:
    """Find the entries of a TD whose guest may have run during each attempt on that TD.

    A guest takes the lock of an SEPT entry in TDG.MEM.PAGE.ACCEPT, ATTR.RD and ATTR.WR, of which
    the host sees no call: a trace only shows that the vCPU was inside.

    Args:
        calls: Calls of one source.
        attempts: Rows of ``calls``.
        slack_ns: Resolution of the clock.

    Returns:
        Columns of GUESTS_INSIDE, one row per attempt and entry.
    """
    rows = attempts.to_numpy().astype(np.intp)
    entries = np.flatnonzero((calls["leaf"] == VP_ENTER).to_numpy())
    wanted_key, held_key = keys.keys(calls, "td", "td", rows, entries)
    begins, ends = calls["begins"].to_numpy(), calls["ends"].to_numpy()
    tid = calls["tid"].fill_null(-1).to_numpy()
    keyed_wanted, keyed_held = np.flatnonzero(wanted_key >= 0), np.flatnonzero(held_key >= 0)
    rows, entries = rows[keyed_wanted], entries[keyed_held]
    wanted = Intervals(wanted_key[keyed_wanted], begins[rows], ends[rows])
    held = Intervals(held_key[keyed_held], begins[entries], ends[entries])
    parts = [pl.DataFrame(schema=GUESTS_INSIDE)]
    for i, j in overlapping_pairs(wanted, held, slack_ns):
        attempt, entry = rows[i], entries[j]
        other = tid[attempt] != tid[entry]
        attempt, entry = attempt[other], entry[other]
        overlap = np.minimum(ends[attempt], ends[entry]) - np.maximum(
            begins[attempt], begins[entry]
        )
        columns = {"attempt": attempt, "holder": entry, "overlap_ns": overlap}
        parts.append(pl.DataFrame(columns, schema_overrides=GUESTS_INSIDE))
    return pl.concat(parts)
