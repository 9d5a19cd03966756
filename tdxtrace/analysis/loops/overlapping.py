"""Find calls that overlap in time on one resource.

One sweep visits two lists of calls in the order of their starts and keeps the calls in flight for
each list and resource.  A call is paired with calls of the other list that are in flight when it
starts.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

NONE: Final = -1
_Rows = NDArray[np.uint32]
_Keys = NDArray[np.int32]
_Times = NDArray[np.int64]
_Owners = NDArray[np.int32]
_Kinds = NDArray[np.uint16]
_Matrix = NDArray[np.uint8]


def find_overlapping(
    wanted: _Rows,
    wanted_key: _Keys,
    wanted_start: _Times,
    wanted_end: _Times,
    wanted_owner: _Owners,
    wanted_kind: _Kinds,
    held: _Rows,
    held_key: _Keys,
    held_start: _Times,
    held_end: _Times,
    held_owner: _Owners,
    held_kind: _Kinds,
    may_conflict: _Matrix,
    transposed: _Matrix,
    slack_ns: int,
    newest_wanted: _Keys,
    older_wanted: _Keys,
    newest_held: _Keys,
    older_held: _Keys,
    found_wanted: _Rows,
    found_held: _Rows,
) -> int:
    """Write the overlapping pairs of a wanted and a held call; return the number of pairs.

    Args:
        wanted: Rows of the wanted calls, in the order of their starts.
        wanted_key: Resource number of each wanted call, from 0.
        wanted_start: Start of each row, ns.
        wanted_end: End of each row, ns.
        wanted_owner: Thread of each row; calls of one thread make no pair.
        wanted_kind: Kind of each row.
        held: Rows of the held calls, in the order of their starts.
        held_key: As ``wanted_key``, for the held calls.
        held_start: As ``wanted_start``, for the held calls.
        held_end: As ``wanted_end``, for the held calls.
        held_owner: As ``wanted_owner``, for the held calls.
        held_kind: As ``wanted_kind``, for the held calls.
        may_conflict: Indexed by kind of the wanted call and kind of the held call: above 0 if the
            two kinds make a pair.
        transposed: As ``may_conflict``, indexed by kind of the held call and kind of the wanted
            call.
        slack_ns: Gap in ns up to which two calls count as overlapping.
        newest_wanted: Scratch by key, NONE on input: index in ``wanted`` of the last call in
            flight.
        older_wanted: Scratch by index in ``wanted``: index of the previous call in flight.
        newest_held: Scratch by key, NONE on input: as ``newest_wanted``, for ``held``.
        older_held: Scratch by index in ``held``: as ``older_wanted``, for ``held``.
        found_wanted: Output: row of the wanted call of each pair, for as many pairs as fit.
        found_held: Output: row of the held call of each pair, for as many pairs as fit.
    """
    i = j = n = np.int64(0)
    while i < len(wanted) or j < len(held):
        row = wanted[i if i < len(wanted) else i - 1]
        other = held[j if j < len(held) else j - 1]
        if j == len(held) or (i < len(wanted) and wanted_start[row] <= held_start[other]):
            # fmt: off
            n = _add_pairs(
                n, row, wanted_key[i], wanted_start, wanted_end, wanted_owner, wanted_kind,
                held, held_start, held_end, held_owner, held_kind, may_conflict, slack_ns,
                newest_held, older_held, found_wanted, found_held,
            )
            # fmt: on
            older_wanted[i] = newest_wanted[wanted_key[i]]
            newest_wanted[wanted_key[i]] = i
            i += 1
        else:
            # fmt: off
            n = _add_pairs(
                n, other, held_key[j], held_start, held_end, held_owner, held_kind,
                wanted, wanted_start, wanted_end, wanted_owner, wanted_kind, transposed, slack_ns,
                newest_wanted, older_wanted, found_held, found_wanted,
            )
            # fmt: on
            older_held[j] = newest_held[held_key[j]]
            newest_held[held_key[j]] = j
            j += 1
    return int(n)


def _add_pairs(
    n: np.int64,
    row: np.uint32,
    key: np.int32,
    start: _Times,
    end: _Times,
    owner: _Owners,
    kind: _Kinds,
    others: _Rows,
    other_start: _Times,
    other_end: _Times,
    other_owner: _Owners,
    other_kind: _Kinds,
    may_conflict: _Matrix,
    slack_ns: int,
    newest: _Keys,
    older: _Keys,
    found: _Rows,
    found_other: _Rows,
) -> np.int64:
    """Write the pairs of a call with calls in flight of the other list; unlink ended calls."""
    newer, index = np.int32(NONE), newest[key]
    while index != NONE:
        previous, other = older[index], others[index]
        if other_end[other] < start[row] - slack_ns:
            if newer == NONE:
                newest[key] = previous
            else:
                older[newer] = previous
        else:
            newer = index
            # The clocks of CPUs differ, so a call may appear to end before it starts.
            begun = other_start[other] <= end[row] + slack_ns
            is_other = other_owner[other] != owner[row]
            if begun and is_other and may_conflict[kind[row], other_kind[other]]:
                if n < len(found):
                    found[n], found_other[n] = row, other
                n += 1
        index = previous
    return n
