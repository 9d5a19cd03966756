"""Candidates of each busy attempt in order, and the cause that host calls can be of it."""

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

# What the loops look at of a candidate and of an attempt: it decides how they run.
_BYTES_PER_CANDIDATE, _BYTES_PER_ATTEMPT = 60, 20


@dataclass(frozen=True, slots=True)
class Ranking:
    """Busy attempts of one source, their candidates best first, and what these say."""

    attempts: Rows
    """Rows of ``calls``, ascending; the arrays below have one entry for each."""
    first: Times
    """Place of its best candidate in ``candidates``, and one more: their number."""
    candidates: pl.DataFrame
    """Columns of :func:`~.candidates.candidate_columns`, in the generations that are possible."""
    cause: NDArray[np.uint8]
    """NO_CANDIDATE, HOST_CONFLICT, ... (:mod:`~tdxtrace.analysis.loops.ranking`)."""
    n_tied: NDArray[np.uint32]
    """Candidates that fit as well as the best, and are of its kind; 0 where there is none."""
    is_only_cause: Flags
    """Whether the candidates near the best are all of its kind."""

    @property
    def best(self) -> pl.DataFrame:
        """The best candidate of each attempt, null where there is none; without attempt."""
        some = self.first[1:] > self.first[:-1]
        at = pl.Series(self.first[:-1]).cast(pl.UInt32)
        columns = self.candidates.drop("attempt")
        return columns[at.zip_with(pl.Series(some), pl.repeat(None, len(at), eager=True))]


def rank_candidates(evidence: BusyEvidence) -> Ranking:
    """Order the candidates of every attempt, and determine the cause that host calls can be.

    In one generation the best candidate is the cause if it surely held the lock, or if the
    capture shows every call that could have held it and all candidates have the same cause.
    There is none where the possible generations disagree, or one of them has no candidate.

    Evidence of ``host_conflict``: a call of another thread that overlaps the attempt, works on
    the same resource, takes its lock in a mode that excludes the attempt's, and was not refused
    before that lock.  Evidence of ``armed_entry``: :func:`~.candidates.armed_entries`.

    Absence: a call of which only the return was recorded, or that was lost, is no candidate,
    so the absence of others proves nothing beside it; several causes that fit within the
    resolution of the clock leave none.

    An armed entry is only named where nothing else can have been at work, so the absence of host
    calls has to be shown: not for an answer that took two steps of a clock or less, where that
    clock may differ between CPUs.

    Nearest innocent trace: a call on another entry, of another TD, or over before the attempt
    began, while the true holder was not probed; and a BLOCK on a CPU whose clock is a few
    microseconds off, beside which an entry of a vCPU seems to be the only call.
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
    """Return whether a candidate had the lock with the attempt at any rounding of the clock.

    Never for an armed entry: when it released the tree is not shown.
    """
    held = (pl.col("core_ns") >= slack_ns) & (pl.col("grade") == HELD_TO_END)
    return held & ~pl.col("is_armed")
