"""Candidates of each busy attempt, ranked, and its cause among host calls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Flags, Rows, Times, read_only
from tdxtrace.analysis.causes.conflicts import ENTRY, TREE
from tdxtrace.analysis.causes.evidence import BusyEvidence
from tdxtrace.analysis.loops.ranking import (
    ENTRY_LOCK,
    HELD_TO_END,
    OTHER_LOCK,
    TREE_LOCK,
    decide_causes,
    order_candidates,
)
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.compiler import choose

# Bytes that the loops read per candidate and attempt; decide whether the loops are compiled.
_BYTES_PER_CANDIDATE, _BYTES_PER_ATTEMPT = 60, 20


@dataclass(frozen=True, slots=True)
class Ranking:
    """Busy attempts of one source, their candidates best first, and the cause these imply."""

    attempts: Rows
    """Rows of ``calls``, ascending; the arrays below have one entry for each."""
    first: Times
    """Offsets of each attempt's best candidate in ``candidates``; one more element: their count."""
    candidates: pl.DataFrame
    """Columns of :func:`~.candidates.candidate_columns`, for the possible generations."""
    cause: NDArray[np.uint8]
    """NO_CANDIDATE, HOST_CONFLICT, ... (:mod:`~tdxtrace.analysis.loops.ranking`)."""
    n_tied: NDArray[np.uint32]
    """Number of candidates of the best one's kind that fit as well; 0 without a candidate."""
    is_only_cause: Flags
    """Whether all candidates that fit nearly as well as the best are of its kind."""

    @property
    def best(self) -> pl.DataFrame:
        """Best candidate of each attempt, null if it has none; without the column attempt."""
        has_candidate = self.first[1:] > self.first[:-1]
        at = pl.Series(self.first[:-1]).cast(pl.UInt32)
        columns = self.candidates.drop("attempt")
        return columns[at.zip_with(pl.Series(has_candidate), pl.repeat(None, len(at), eager=True))]


def rank_candidates(evidence: BusyEvidence) -> Ranking:
    """Rank the candidates of every attempt, and determine its cause among host calls.

    In one generation the best candidate is the cause if it certainly held the lock, or if the
    capture shows every call that could have held it and all candidates have the same cause.
    There is no cause if the possible generations disagree, or one of them has no candidate.

    Evidence of ``host_conflict``: a call of another thread that overlaps the attempt, works on
    the same resource, takes its lock in a mode that excludes the attempt's, and was not refused
    before that lock.  Evidence of ``armed_entry``: :func:`~.candidates.armed_entries`.

    Absence: a call that was lost, or of which only the return was recorded, is no candidate, so
    where such a call is possible the absence of others proves nothing; if several causes fit
    within the resolution of the clock, the attempt has none.

    An armed entry is reported only if no other call can have held the lock, so the absence of host
    calls must be proven: that is impossible for an attempt of at most two clock steps if the clock
    may differ between CPUs.

    Nearest innocent trace: a call on another entry, for another TD, or over before the attempt
    began, while the true holder was not probed; and a BLOCK on a CPU whose clock is a few
    microseconds off, so that a vCPU entry seems to be the only candidate.
    """
    attempts, possible = evidence.busy.rows, evidence.busy.masks & np.uint8(evidence.mask)
    holders, calls = evidence.possible_holders, evidence.calls
    number = np.empty(calls.height, np.int64)
    number[attempts] = np.arange(len(attempts))
    grade, core, is_armed, holder = (
        holders[name].to_numpy() for name in ("grade", "core_ns", "is_armed", "holder")
    )
    miss = np.maximum(-core, 0)
    begins = calls["begins"].to_numpy()[holder]
    first, order = np.zeros(len(attempts) + 1, np.int64), np.empty(holders.height, np.int64)
    n_bytes = holders.height * _BYTES_PER_CANDIDATE + len(attempts) * _BYTES_PER_ATTEMPT
    run = choose(n_bytes)
    of_candidate = number[holders["attempt"].to_numpy()], grade, miss, is_armed, begins, holder
    run(order_candidates)(*read_only(*of_candidate), first, order)
    ranked = holders[order]
    cause = np.empty(len(attempts), np.uint8)
    n_tied, is_only = np.empty(len(attempts), np.uint32), np.empty(len(attempts), np.bool_)
    sees_starts = calls.filter(pl.col("leaf") != VP_ENTER)["start_ns"].count() > 0
    kind_of_lock = pl.col("lock").replace_strict(
        {TREE: TREE_LOCK, ENTRY: ENTRY_LOCK}, default=OTHER_LOCK, return_dtype=pl.UInt8
    )
    columns = ranked.select(
        *("mask", "grade", "overlap_ns"),
        pl.Series("miss_ns", miss[order]),
        "is_armed",
        is_proven=is_proven(evidence.busy.slack_ns),
        lock=kind_of_lock,
    )
    observed = (evidence.fully_observed & evidence.times_absence).to_numpy()[attempts]
    run(decide_causes)(
        *read_only(first, possible, observed, *(column.to_numpy() for column in columns)),
        evidence.busy.slack_ns,
        VP_ENTER in evidence.leaves,
        sees_starts,
        *(cause, n_tied, is_only),
    )
    return Ranking(attempts, first, ranked, cause, n_tied, is_only)


def is_proven(slack_ns: int) -> pl.Expr:
    """Return whether a candidate certainly held the lock, however the clock was rounded.

    Never true for an armed entry: the trace does not show when it released the tree.
    """
    is_held_throughout = (pl.col("core_ns") >= slack_ns) & (pl.col("grade") == HELD_TO_END)
    return is_held_throughout & ~pl.col("is_armed")
