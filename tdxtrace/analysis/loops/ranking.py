"""Order the candidates of each attempt, best first, and decide the cause of the attempt."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_Rows = NDArray[np.int64]
_Times = NDArray[np.int64]
_Flags = NDArray[np.bool_]
_Codes = NDArray[np.uint8]

HELD_TO_END, HELD_BRIEFLY, BOUNDS_UNKNOWN = 0, 1, 2
"""Grades of a candidate, in this order: held the lock until its end; held it briefly or possibly;
start or end unknown."""
NO_CANDIDATE, HOST_CONFLICT, ARMED_ENTRY, CLOCK_TOO_COARSE, GENERATIONS_DISAGREE = range(5)
"""Causes, in this order: no candidate; a host call; an armed entry; several candidates fit; lock
generations give different causes."""
OTHER_LOCK, TREE_LOCK, ENTRY_LOCK = range(3)
"""Kinds of lock that a candidate held: any other lock; SEPT tree lock; SEPT entry lock."""

# This project's choice.  The latencies are a decile of the measured ones, so a call that misses by
# little may have been a faster one: in 32 simulated runs (zero_step_attack and string_copy, 1,144
# answers) true holders overlapped at least 13 times as long as they missed.
MISS_RATIO: Final = 9


def order_candidates(
    attempt: _Rows,
    grade: _Codes,
    miss_ns: _Times,
    is_armed: _Flags,
    begins: _Times,
    holder: NDArray[np.uint32],
    first: _Rows,
    order: _Rows,
) -> None:
    """Group the candidates by attempt and sort those of each attempt, best first.

    A call that was in the middle of its work when the attempt tried the lock ranks above a call
    that overlaps only at its edges.  Next, a call that held the lock until its end ranks above one
    that failed before or is not certainly armed.  Next, the call that began first ranks higher:
    the module defines no order among several holders of one lock.

    Args:
        attempt: Attempt number of each candidate, from 0.
        grade: Grade of each candidate: HELD_TO_END, HELD_BRIEFLY or BOUNDS_UNKNOWN.
        miss_ns: Gap in ns between the lock intervals of candidate and attempt; 0 if they overlap.
        is_armed: Whether the candidate is an entry that zero-step mitigation may have armed.
        begins: Start of each candidate, ns.
        holder: Row of each candidate in ``calls``.
        first: Output by attempt, with one more element, zero on input: first index in ``order``.
        order: Output: candidate numbers.
    """
    for row in range(len(attempt)):
        first[attempt[row] + 1] += 1
    for number in range(1, len(first)):
        first[number] += first[number - 1]
    for row in range(len(attempt)):
        number = attempt[row]
        order[first[number]] = row
        first[number] += 1
    for number in range(len(first) - 1, 0, -1):
        first[number] = first[number - 1]
    first[0] = 0
    for number in range(len(first) - 1):
        for place in range(first[number] + 1, first[number + 1]):
            row, at = order[place], place
            while at > first[number]:
                other = order[at - 1]
                unknown = grade[other] == BOUNDS_UNKNOWN
                if (grade[row] == BOUNDS_UNKNOWN) != unknown:
                    is_better = unknown
                elif miss_ns[row] != miss_ns[other]:
                    is_better = miss_ns[row] < miss_ns[other]
                elif is_armed[row] != is_armed[other]:
                    is_better = is_armed[other]
                elif grade[row] != grade[other]:
                    is_better = grade[row] < grade[other]
                elif begins[row] != begins[other]:
                    is_better = begins[row] < begins[other]
                else:
                    is_better = holder[row] < holder[other]
                if not is_better:
                    break
                order[at] = other
                at -= 1
            order[at] = row


def decide_causes(
    first: _Rows,
    possible: _Codes,
    is_observed: _Flags,
    mask: _Codes,
    grade: _Codes,
    overlap_ns: _Times,
    miss_ns: _Times,
    is_armed: _Flags,
    is_proven: _Flags,
    lock: _Codes,
    slack_ns: int,
    sees_entries: bool,
    sees_starts: bool,
    cause: _Codes,
    n_tied: NDArray[np.uint32],
    is_only_cause: _Flags,
) -> None:
    """Write the cause of each attempt, and how clearly its best candidate stands out.

    Args:
        first: By attempt, with one more element: its first candidate; candidates are best first.
        possible: By attempt: mask of the lock generations in which its answer is possible.
        is_observed: By attempt: whether the absence of a call is evidence during the attempt.
        mask: By candidate: mask of the lock generations in which it excludes the attempt.
        grade: By candidate: HELD_TO_END, HELD_BRIEFLY or BOUNDS_UNKNOWN.
        overlap_ns: By candidate: time in ns that candidate and attempt overlap.
        miss_ns: By candidate: gap in ns between the lock intervals of candidate and attempt; 0 if
            they overlap.
        is_armed: By candidate: whether it is an entry that may have been armed.
        is_proven: By candidate: whether it held the lock during the attempt at any clock rounding.
        lock: By candidate: OTHER_LOCK, TREE_LOCK or ENTRY_LOCK.
        slack_ns: Resolution of the clock, ns.
        sees_entries: Whether the capture has vCPU entries.
        sees_starts: Whether the capture has the starts of other calls.
        cause: Output by attempt: the cause in every possible generation, NO_CANDIDATE to
            GENERATIONS_DISAGREE.
        n_tied: Output by attempt: number of candidates that fit as well as the best, itself
            included, and are of the same kind (armed entry or other call).
        is_only_cause: Output by attempt: whether all candidates near the best are of its kind.
    """
    for number in range(len(first) - 1):
        begin, end = first[number], first[number + 1]
        cause[number] = NO_CANDIDATE
        is_decided = False
        for bit in (1, 2, 4):
            if possible[number] & bit == 0:
                continue
            # fmt: off
            found = _cause_in_generation(
                bit, begin, end, is_observed[number], mask, grade, overlap_ns, miss_ns, is_armed,
                is_proven, lock, slack_ns, sees_entries, sees_starts,
            )
            # fmt: on
            if is_decided and cause[number] != found:
                found = GENERATIONS_DISAGREE
            cause[number] = found
            is_decided = True
        n_tied[number] = 0
        is_only_cause[number] = True
        for row in range(begin, end):
            same_kind = is_armed[row] == is_armed[begin]
            if same_kind and grade[row] == grade[begin]:
                n_tied[number] += miss_ns[row] <= miss_ns[begin] + slack_ns
            # Only estimated latencies decide whether a call that overlaps longer than it misses
            # held the tree lock.  With such a call present, an armed entry is a weak answer.
            near = miss_ns[row] <= miss_ns[begin] + 2 * slack_ns
            near |= is_armed[begin] and overlap_ns[row] > miss_ns[row]
            if near and not same_kind:
                is_only_cause[number] = False


def _cause_in_generation(
    bit: int,
    begin: np.int64,
    end: np.int64,
    is_observed: np.bool_,
    mask: _Codes,
    grade: _Codes,
    overlap_ns: _Times,
    miss_ns: _Times,
    is_armed: _Flags,
    is_proven: _Flags,
    lock: _Codes,
    slack_ns: int,
    sees_entries: bool,
    sees_starts: bool,
) -> int:
    """Return the cause of one attempt in one lock generation."""
    best = begin
    while best < end and mask[best] & bit == 0:
        best += 1
    # Candidates with unknown bounds are sorted last.
    if best == end or grade[best] == BOUNDS_UNKNOWN:
        return NO_CANDIDATE
    is_only_kind, has_rival = True, False
    for row in range(best, end):
        if mask[row] & bit == 0:
            continue
        if is_armed[row] != is_armed[best]:
            is_only_kind &= miss_ns[row] > miss_ns[best] + 2 * slack_ns
        # A call that certainly held the tree lock may have held it at that time, so the attempt
        # may equally have collided with that call.
        if lock[row] == TREE_LOCK and not is_armed[row]:
            has_rival |= overlap_ns[row] >= MISS_RATIO * miss_ns[row]
    # A guest can hold an SEPT entry lock too, and a vCPU entry that was not probed can hold the
    # tree lock: only a call that certainly held the lock rules these out.
    hides_others = lock[best] == ENTRY_LOCK or (lock[best] == TREE_LOCK and not sees_entries)
    if not is_proven[best] and (hides_others or not is_only_kind):
        return CLOCK_TOO_COARSE
    if not is_armed[best]:
        return HOST_CONFLICT
    # An armed entry is inferred from the absence of other calls, so every call must be observed,
    # including its start, which a capture of selected returns lacks.
    fits = overlap_ns[best] >= 0 and not has_rival and is_observed and sees_starts
    return ARMED_ENTRY if fits else CLOCK_TOO_COARSE
