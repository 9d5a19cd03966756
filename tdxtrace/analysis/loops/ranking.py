"""Candidates of each attempt: best first, and what they say together of its cause."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_Rows = NDArray[np.int64]
_Times = NDArray[np.int64]
_Flags = NDArray[np.bool_]
_Codes = NDArray[np.uint8]

HELD_TO_END, HELD_BRIEFLY, BOUNDS_UNKNOWN = 0, 1, 2
"""Grades of a candidate: it held the lock to its end; briefly, or perhaps; bounds not known."""
NO_CANDIDATE, HOST_CONFLICT, ARMED_ENTRY, CLOCK_TOO_COARSE, GENERATIONS_DISAGREE = range(5)
"""Causes by host calls: there is none; the two kinds; several fit; generations differ."""
OTHER_LOCK, TREE_LOCK, ENTRY_LOCK = range(3)
"""What matters of the lock of a candidate."""

# A choice.  The latencies are a decile of what was measured, so a call that misses by little may
# have been a faster one: in 32 simulated runs (zero_step_attack and string_copy, 1,144 answers)
# true holders overlapped at least 13 times as long as they missed.
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
    """Write the candidates attempt by attempt, best first.

    A call in the middle of its work when the attempt met the lock ranks above one that only
    overlaps its edges; then one that held the lock to its end above one that failed on the way
    or is not surely armed; then the one that began first: among several that hold a lock
    together the module knows no order.

    Args:
        attempt: Number of the attempt of each candidate, from 0.
        grade: As above.
        miss_ns: ns between the times in which both had their locks; 0: these overlap.
        is_armed: Whether it is an entry that zero-step mitigation may have armed.
        begins: When it began, ns.
        holder: Its row in ``calls``.
        first: By attempt, and one more: 0; written: its first place in ``order``.
        order: Written: candidates.
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
    """Write the cause of each attempt by its candidates, and how well the best is told apart.

    Args:
        first: By attempt, and one more: its first candidate; candidates are best first.
        possible: By attempt: lock generations in which its answer is possible, as a mask.
        is_observed: By attempt: whether the absence of a call is evidence there.
        mask: By candidate: generations in which it excludes the attempt.
        grade: By candidate, as above.
        overlap_ns: By candidate: how long both lasted together.
        miss_ns: By candidate: ns between the times in which both had their locks; 0: these overlap.
        is_armed: By candidate: whether it is an entry that may have been armed.
        is_proven: By candidate: whether it had the lock with the attempt at any rounding.
        lock: By candidate: OTHER_LOCK, TREE_LOCK or ENTRY_LOCK.
        slack_ns: Resolution of the clock.
        sees_entries: Whether the capture has entries of vCPUs.
        sees_starts: Whether it has starts of other calls.
        cause: By attempt, written: in every generation that is possible, as above.
        n_tied: By attempt, written: candidates that fit as well as the best and are of its kind.
        is_only_cause: By attempt, written: whether those near the best are all of its kind.
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
            # Whether a call that overlaps more than it misses had the tree is a matter of
            # latencies that are estimated: beside it an armed entry is a weak answer.
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
    """Return the cause of one attempt in one generation."""
    best = begin
    while best < end and mask[best] & bit == 0:
        best += 1
    # Those whose bounds are not known come last.
    if best == end or grade[best] == BOUNDS_UNKNOWN:
        return NO_CANDIDATE
    is_only_kind, has_rival = True, False
    for row in range(best, end):
        if mask[row] & bit == 0:
            continue
        if is_armed[row] != is_armed[best]:
            is_only_kind &= miss_ns[row] > miss_ns[best] + 2 * slack_ns
        # A call that surely had the tree may have had it at that time: the attempt may as well
        # have met that call.
        if lock[row] == TREE_LOCK and not is_armed[row]:
            has_rival |= overlap_ns[row] >= MISS_RATIO * miss_ns[row]
    # A guest can hold the lock of an SEPT entry too, and an entry that was not probed the tree:
    # only a call that surely held it rules these out.
    hides_others = lock[best] == ENTRY_LOCK or (lock[best] == TREE_LOCK and not sees_entries)
    if not is_proven[best] and (hides_others or not is_only_kind):
        return CLOCK_TOO_COARSE
    if not is_armed[best]:
        return HOST_CONFLICT
    # An armed entry is inferred from the absence of calls, so every call must be observed: also
    # when it began, which a capture of chosen returns does not show.
    fits = overlap_ns[best] >= 0 and not has_rival and is_observed and sees_starts
    return ARMED_ENTRY if fits else CLOCK_TOO_COARSE
