"""Which host calls could have held what an attempt found busy?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.causes import armed, conflicts, keys
from tdxtrace.analysis.causes.conflicts import TREE, VP_ENTER, Conflicts
from tdxtrace.analysis.causes.overlaps import Index, Spans, Times, meetings
from tdxtrace.tdx import word

# TDH.VP.ENTER lets go of the epoch, OP_STATE and the tree before the guest runs, and a trace
# does not show when that is.  It is over before the shortest full exit and entry that was
# measured: CPUID through KVM, 3,851 ns (TUM-DSE/CVM_eval benchmarks/vmexit/README.md,
# 5bc6ab0).  Inferred, not measured.
ENTRY_NS: Final = 3_851

WHOLE, BRIEF, UNCERTAIN = 0, 1, 2
"""How well a candidate fits: it held the lock to its end; for a moment, or perhaps; its own
bounds are not known."""
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
class Question:
    """What is asked of one source."""

    done: pl.DataFrame
    """What its threads did."""
    attempts: pl.DataFrame
    """Busy attempts: row (in ``done``), leaf, operand_id, lock, scope, mask, one row per lock."""
    slack_ns: int
    """Resolution of its clock: how far apart two stamps of one instant can lie."""
    mask: int
    """Generations to consider."""
    entry_ns: int = ENTRY_NS


def candidates(question: Question) -> pl.DataFrame:
    """Find every host call that overlaps a busy attempt and holds a lock against it.

    Returns:
        Columns of CANDIDATES, one row per attempt, lock and holder: attempt and holder are
        rows of ``done``; mask the generations in which the two collide; grade as above;
        overlap_ns how long both lasted together, below 0 within the slack; core_ns
        how far one of them could be moved and they would still meet between their edges
        (:func:`edges`), below 0 by how much they miss each other.
    """
    begun = question.done["start_ns"].gather(question.attempts["row"]).is_not_null()
    timed = question.attempts.filter(begun & question.attempts["lock"].is_not_null())
    parts = [
        _on_lock(question, str(lock[0]), rows)
        for lock, rows in timed.group_by("lock", maintain_order=True)
    ]
    return pl.concat([pl.DataFrame(schema=CANDIDATES), *parts])


def _on_lock(question: Question, lock: str, attempts: pl.DataFrame) -> pl.DataFrame:
    table = conflicts.conflicts(lock)
    attempting = attempts["leaf"].unique().to_numpy().astype(np.intp)
    holding = table.holders(attempting, question.mask)
    leaf = question.done["leaf"].to_numpy()
    rows = np.flatnonzero(holding[leaf])
    grade = np.full(len(rows), WHOLE, np.uint8)
    is_entry = leaf[rows] == VP_ENTER
    if lock == TREE and is_entry.any():
        rows, grade = _gated(question.done, rows[~is_entry])
        is_entry = leaf[rows] == VP_ENTER
    grade = _grades(question.done, lock, rows, grade)
    kept = grade <= UNCERTAIN
    rows, is_entry, grade = rows[kept], is_entry[kept], grade[kept]
    begins, ends = (question.done[name].to_numpy()[rows] for name in ("begins", "ends"))
    if conflicts.is_head_only(lock):
        ends = np.where(is_entry, np.minimum(ends, begins + question.entry_ns), ends)
    pairs = _pairs(question, table, attempts["row"].to_numpy().astype(np.intp), rows, begins, ends)
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


def _gated(done: pl.DataFrame, others: Index) -> tuple[Index, NDArray[np.uint8]]:
    """Holders of the tree: other leaves as they are, and the entries whose gate was armed."""
    entries = armed.armed_entries(done)
    rows = np.concatenate([others, entries["row"].to_numpy().astype(np.intp)])
    whole = np.full(len(others), WHOLE, np.uint8)
    return rows, np.concatenate([whole, entries["armed"].to_numpy()])


_NEVER: Final = UNCERTAIN + 1


def _grades(
    done: pl.DataFrame, lock: str, rows: Index, grade: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Lower the grade of calls that failed on the way, or whose bounds are not known."""
    status, certain = pl.col("status"), pl.col("certain")
    busy = word.is_busy(status)
    briefly = conflicts.held_before().filter(pl.col("lock") == lock).select("leaf", "operand_id")
    frame = done[rows].select("leaf", "certain", busy=busy.fill_null(False), id=word.low32(status))
    frame = frame.join(
        briefly.with_columns(brief=pl.lit(True)),
        left_on=["leaf", "id"],
        right_on=["leaf", "operand_id"],
        how="left",
        maintain_order="left",
    )
    failed = pl.when(~pl.col("busy")).then(WHOLE).when("brief").then(BRIEF).otherwise(_NEVER)
    doubt = pl.when(certain).then(WHOLE).otherwise(UNCERTAIN)
    worst: NDArray[np.int32] = (
        frame.select(pl.max_horizontal(failed, doubt).cast(pl.Int32)).to_series().to_numpy()
    )
    return np.maximum(grade, worst.astype(np.uint8))


def edges(done: pl.DataFrame, attempts: pl.Series, slack_ns: int) -> Times:
    """How long each call takes at the least to get to its locks, and as long to come back.

    A busy answer does nothing but go into the module, fail, and come out, with probes on
    either side.  So it met the lock about its middle, and half of what a busy answer takes
    at the least lies before a call has its locks and after it gave them back.  This is
    taken from the trace itself, for TDH.VP.ENTER and for other leaves apart; inferred.

    Args:
        done: What the threads of one source did.
        attempts: Rows of its busy attempts.
        slack_ns: Resolution of the clock: what lasts less shows as nothing.

    Returns:
        ns for each row of ``done``; 0 where no busy answer was timed.
    """
    busy = done[attempts].select("start_ns", "end_ns", "leaf").drop_nulls()
    took = busy.select(ns=pl.col("end_ns") - pl.col("start_ns"), enters=pl.col("leaf") == VP_ENTER)
    least = [
        max(int(part["ns"].quantile(_LEAST, "lower") or 0), slack_ns) // 2
        for part in (took.filter(~pl.col("enters")), took.filter("enters"))
    ]
    other, enter = least if all(least) else (max(least), max(least))
    return np.where(done["leaf"].to_numpy() == VP_ENTER, enter, other).astype(np.int64)


# Not the very shortest: one pair of stamps may be wrong.
_LEAST: Final = 0.1

_Found = tuple[Index, Index, NDArray[np.uint8], Times, Times]


def _pairs(
    question: Question, table: Conflicts, attempts: Index, rows: Index, begins: Times, ends: Times
) -> _Found:
    """Attempts and places in ``rows`` that meet, are about one thing, and collide."""
    done = question.done
    asked_key, held_key = keys.keys(done, table.scope, attempts, rows)
    mine, theirs = np.flatnonzero(asked_key >= 0), np.flatnonzero(held_key >= 0)
    start, end = (done[name].to_numpy()[attempts] for name in ("begins", "ends"))
    tid = done["tid"].fill_null(-1).to_numpy()
    leaf = done["leaf"].to_numpy()
    edge = edges(done, question.attempts["row"].unique(), question.slack_ns)
    found: list[_Found] = []
    asked = Spans(asked_key[mine], start[mine], end[mine])
    held = Spans(held_key[theirs], begins[theirs], ends[theirs])
    for i, j in meetings(asked, held, question.slack_ns):
        a, h = mine[i], theirs[j]
        mask = table.masks[leaf[attempts[a]], leaf[rows[h]]] & np.uint8(question.mask)
        keep = (mask > 0) & (tid[attempts[a]] != tid[rows[h]])
        a, h, mask = a[keep], h[keep], mask[keep]
        same = keys.same_thing(done, table.scope, attempts[a], rows[h])
        a, h, mask = a[same], h[same], mask[same]
        own, other = edge[attempts[a]], edge[rows[h]]
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
