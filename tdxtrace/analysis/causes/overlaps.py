"""Interval join: pairs of intervals that overlap in time, without testing every pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxtrace.analysis.arrays import Index, Times

# Attempts joined at a time: with a few hundred threads each overlaps a few hundred calls,
# which keeps a batch below some 100 MB.
_BATCH: Final = 1 << 15
_BITS: Final = 62


@dataclass(frozen=True, slots=True)
class Intervals:
    """Time intervals; only those of the same key can overlap."""

    key: Times
    """Small integers from 0."""
    start: Times
    end: Times


def overlapping_pairs(
    wanted: Intervals, held: Intervals, slack_ns: int = 0
) -> Iterator[tuple[Index, Index]]:
    """Find the pairs of intervals that share their key and overlap.

    Intervals are grouped by length into powers of two.  Those of one group that can reach a
    given interval begin within a window of about their own length, so two binary searches
    find them, and at most half of the pairs examined are discarded.  A single long interval
    does not slow the others down.

    Args:
        wanted: Intervals whose partners are wanted.
        held: Intervals to search.
        slack_ns: Gap in ns up to which two intervals count as overlapping.

    Yields:
        Indices into ``wanted`` and into ``held``, pair by pair, in batches.
    """
    if not len(wanted.key) or not len(held.key):
        return
    first = int(min(held.start.min(), wanted.start.min()))
    last = int(max(held.end.max(), wanted.end.max(), held.start.max())) + 2 * slack_ns + 1
    width = (last - first + 1).bit_length()
    n_keys = int(max(wanted.key.max(), held.key.max())) + 1
    if width + n_keys.bit_length() > _BITS:
        yield from _by_key(wanted, held, slack_ns)
        return
    classes = _length_classes(held, first, width)
    order = np.argsort(wanted.key << width | (wanted.start - first), kind="stable")
    for begin in range(0, len(order), _BATCH):
        rows = order[begin : begin + _BATCH]
        base = wanted.key[rows] << width
        low, high = wanted.start[rows] - slack_ns, wanted.end[rows] + slack_ns
        for longest, place, code in classes:
            since = np.maximum(low - longest - first, 0)
            left = np.searchsorted(code, base | since)
            right = np.searchsorted(code, base | np.maximum(high - first, 0), side="right")
            i, j = _expand_ranges(left, right)
            j = place[j]
            keep = held.end[j] >= low[i]
            yield rows[i[keep]], j[keep]


def _length_classes(held: Intervals, first: int, width: int) -> list[tuple[int, Index, Times]]:
    """Per power of two: greatest length, indices of the intervals by start, their sort codes."""
    code = held.key << width | (held.start - first)
    power = np.frexp((held.end - held.start).astype(np.float64))[1]
    found = []
    for number in np.unique(power):
        place = np.flatnonzero(power == number)
        place = place[np.argsort(code[place], kind="stable")]
        length = int((held.end[place] - held.start[place]).max())
        found.append((length, place, code[place]))
    return found


def _expand_ranges(left: Index, right: Index) -> tuple[Index, Index]:
    """Return every index of every range, with the number of its range."""
    n = np.maximum(right - left, 0)
    i = np.repeat(np.arange(len(n)), n)
    offset = np.arange(len(i)) - np.repeat(np.cumsum(n) - n, n)
    return i, left[i] + offset


def _by_key(wanted: Intervals, held: Intervals, slack_ns: int) -> Iterator[tuple[Index, Index]]:
    """Join key by key, for traces so long that key and time do not fit one integer."""
    for key in np.unique(wanted.key):
        wanted_rows, held_rows = np.flatnonzero(wanted.key == key), np.flatnonzero(held.key == key)
        parts = [
            Intervals(np.zeros(len(rows), np.int64), of.start[rows], of.end[rows])
            for of, rows in ((wanted, wanted_rows), (held, held_rows))
        ]
        for i, j in overlapping_pairs(parts[0], parts[1], slack_ns):
            yield wanted_rows[i], held_rows[j]
