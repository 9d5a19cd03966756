"""How many requests, and how large bursts, are left after each step of a curve."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

# A key holds a burst in its high half, and how far the depth of a request is from the deepest
# possible one in its low half, so that sorted keys go from deep to shallow within a burst.
HALF: Final = 32
DEEPEST: Final = (1 << HALF) - 1

_Counts = NDArray[np.int64]


def count_bursts(key: _Counts, n_more: _Counts, squares: _Counts, n_bursts: _Counts) -> None:
    """Count the requests of one curve at the last step after which they still need more.

    Sums over later steps give the requests that need more than a step, the sum of the squares of
    the bursts' sizes among them, and the number of these bursts: the squares of 1, 2, 3 ... differ
    by 1, 3, 5 ..., which is what the request of each rank adds to the square of its burst.

    Args:
        key: Sorted, one for each request.
        n_more: By depth: 0; requests are counted.
        squares: By depth: 0; what they add to the squares is.
        n_bursts: By depth: 0; bursts whose deepest request is here are counted.
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
