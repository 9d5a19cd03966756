"""Which intervals meet in time, without trying every pair?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]
Index = NDArray[np.intp]

# Attempts that are joined at a time: with a few hundred threads each meets a few hundred
# calls, which keeps a step below some 100 MB.
_STEP: Final = 1 << 15
_BITS: Final = 62


@dataclass(frozen=True, slots=True)
class Spans:
    """Intervals, each of which meets only those of the same key."""

    key: Times
    """Small numbers from 0."""
    start: Times
    end: Times


def meetings(asked: Spans, held: Spans, slack_ns: int = 0) -> Iterator[tuple[Index, Index]]:
    """Find the pairs of intervals that share their key and overlap.

    Intervals are sorted by length into powers of two.  Of one such class, those that
    can reach an interval begin within a window hardly longer than they are, so two
    binary searches find them, and at most half of what is looked at is in vain.  A
    single long interval costs nothing but itself.

    Args:
        asked: Intervals whose partners are wanted.
        held: Where to look for them.
        slack_ns: How far apart two intervals may lie and still count as overlapping.

    Yields:
        Places in ``asked`` and in ``held``, pair by pair, in portions.
    """
    if not len(asked.key) or not len(held.key):
        return
    first = int(min(held.start.min(), asked.start.min()))
    last = int(max(held.end.max(), asked.end.max(), held.start.max())) + 2 * slack_ns + 1
    width = (last - first + 1).bit_length()
    n_keys = int(max(asked.key.max(), held.key.max())) + 1
    if width + n_keys.bit_length() > _BITS:
        yield from _by_key(asked, held, slack_ns)
        return
    classes = _classes(held, first, width)
    order = np.argsort(asked.key << width | (asked.start - first), kind="stable")
    for begin in range(0, len(order), _STEP):
        rows = order[begin : begin + _STEP]
        base = asked.key[rows] << width
        low, high = asked.start[rows] - slack_ns, asked.end[rows] + slack_ns
        for longest, place, code in classes:
            since = np.maximum(low - longest - first, 0)
            left = np.searchsorted(code, base | since)
            right = np.searchsorted(code, base | np.maximum(high - first, 0), side="right")
            i, j = _spread(left, right)
            j = place[j]
            keep = held.end[j] >= low[i]
            yield rows[i[keep]], j[keep]


def _classes(held: Spans, first: int, width: int) -> list[tuple[int, Index, Times]]:
    """For each power of two: the longest length, the intervals in order, and their codes."""
    code = held.key << width | (held.start - first)
    power = np.frexp((held.end - held.start).astype(np.float64))[1]
    found = []
    for number in np.unique(power):
        place = np.flatnonzero(power == number)
        place = place[np.argsort(code[place], kind="stable")]
        length = int((held.end[place] - held.start[place]).max())
        found.append((length, place, code[place]))
    return found


def _spread(left: Index, right: Index) -> tuple[Index, Index]:
    """Every place of every range, with the number of its range."""
    n = np.maximum(right - left, 0)
    i = np.repeat(np.arange(len(n)), n)
    offset = np.arange(len(i)) - np.repeat(np.cumsum(n) - n, n)
    return i, left[i] + offset


def _by_key(asked: Spans, held: Spans, slack_ns: int) -> Iterator[tuple[Index, Index]]:
    """The same key by key, for traces so long that key and time do not fit one number."""
    for key in np.unique(asked.key):
        mine, theirs = np.flatnonzero(asked.key == key), np.flatnonzero(held.key == key)
        parts = [
            Spans(np.zeros(len(rows), np.int64), of.start[rows], of.end[rows])
            for of, rows in ((asked, mine), (held, theirs))
        ]
        for i, j in meetings(parts[0], parts[1], slack_ns):
            yield mine[i], theirs[j]
