"""Bursts of requests: which were busy at one moment, and how large they are after each step."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

# A key holds a burst in its high half, and how far the depth of a request is from the deepest
# possible one in its low half, so that sorted keys go from deep to shallow within a burst.
HALF: Final = 32
DEEPEST: Final = (1 << HALF) - 1

_Counts = NDArray[np.int64]


# A request of a later rank adds as much as this one to the cubes, so that these stay whole numbers
# of 64 bits for any trace: bursts that large are one observation whatever their cube.
MOST_CUBED: Final = 1 << 18


def count_bursts(
    key: _Counts, n_more: _Counts, squares: _Counts, n_bursts: _Counts, cubes: _Counts
) -> None:
    """Count the requests of one curve at the last step after which they still need more.

    Sums over later steps give the requests that need more than a step, the sums of the squares and
    cubes of the bursts' sizes among them, and the number of these bursts: the squares of 1, 2, 3
    ... differ by 1, 3, 5 ..., which is what the request of each rank adds to the square of its
    burst; the cubes by 1, 7, 19 ...

    Args:
        key: Sorted, one for each request.
        n_more: By depth: 0; requests are counted.
        squares: By depth: 0; what they add to the squares is.
        n_bursts: By depth: 0; bursts whose deepest request is here are counted.
        cubes: By depth: 0; what requests add to the cubes is.
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
        at_most = min(rank, MOST_CUBED)
        cubes[depth] += 3 * at_most * (at_most - 1) + 1


def count_moments(start: _Counts, end: _Counts, begins: NDArray[np.bool_], moment: _Counts) -> None:
    """Number the moments at which intervals are pierced: as few as pierce all.

    Args:
        start: Ascending within each part.
        end: Of each interval, not before its start.
        begins: Whether a part begins, which shares no moment with the one before.
        moment: Filled with the number of each interval's moment, which is the earliest end of those
            that have it.
    """
    number, earliest = 0, end[0] if len(end) else 0
    for place in range(len(start)):
        if begins[place] or start[place] > earliest:
            number += 1
            earliest = end[place]
        elif end[place] < earliest:
            earliest = end[place]
        moment[place] = number
