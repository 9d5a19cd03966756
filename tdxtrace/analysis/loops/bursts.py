"""Bursts: requests that were busy at the same moment, and the burst sizes after each step."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

# A key has the burst number in its high half and DEEPEST minus the depth of the request in its low
# half, so that sorted keys order the requests of a burst from deep to shallow.
HALF: Final = 32
DEEPEST: Final = (1 << HALF) - 1

_Counts = NDArray[np.int64]


def count_bursts(key: _Counts, n_more: _Counts, squares: _Counts, n_bursts: _Counts) -> None:
    """Count the requests of one curve at the last step after which each still needs more.

    For a given step, the sum of each output over that depth and all greater depths gives the number
    of requests that need more than the step, the sum of the squares of their bursts' sizes, and
    the number of these bursts.  The request of rank r adds r**2 - (r - 1)**2 to the squares (1, 3,
    5 ...).

    Args:
        key: Sorted keys, one for each request.
        n_more: Output by depth, zero on input: number of requests.
        squares: Output by depth, zero on input: what these requests add to the squares.
        n_bursts: Output by depth, zero on input: number of bursts whose deepest request is here.
    """
    rank = 0
    for place in range(len(key)):
        if place == 0 or key[place] >> HALF != key[place - 1] >> HALF:
            rank = 0
        depth = DEEPEST - (key[place] & DEEPEST)
        n_bursts[depth] += rank == 0
        rank += 1
        n_more[depth] += 1
        squares[depth] += 2 * rank - 1


def count_moments(start: _Counts, end: _Counts, begins: NDArray[np.bool_], moment: _Counts) -> None:
    """Assign each interval to a moment that it contains, with the fewest moments possible.

    Args:
        start: Start of each interval, ascending within each part.
        end: End of each interval, not before its start.
        begins: Whether a new part begins at this interval; parts share no moment.
        moment: Output: number of each interval's moment.  A moment is the earliest end of the
            intervals assigned to it.
    """
    number, earliest = 0, end[0] if len(end) else 0
    for place in range(len(start)):
        if begins[place] or start[place] > earliest:
            number += 1
            earliest = end[place]
        elif end[place] < earliest:
            earliest = end[place]
        moment[place] = number
