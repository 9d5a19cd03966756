"""Pairs of calls that overlap in time on one resource."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Index, Rows, Times, read_only
from tdxtrace.analysis.loops.overlapping import NONE, find_overlapping
from tdxtrace.compiler import choose

_NO_OWNER: Final = (-1, -2)
# Bytes that the loop reads per interval; decides whether the loop is compiled.
_BYTES_PER_INTERVAL: Final = 40
_ALL_CONFLICT: Final = np.ones((1, 1), np.uint8)


@dataclass(frozen=True, slots=True)
class Intervals:
    """Time intervals by row; two intervals can form a pair only if they have the same key."""

    start: Times
    """ns."""
    end: Times
    """ns."""
    key: Times
    """Keys, by position in ``rows``: small integers from 0; negative: never form a pair."""
    rows: Index | Rows | None = None
    """Rows to use, sorted by start; None: all."""
    owner: NDArray[np.int32] | None = None
    """Owner by row: intervals of one owner form no pair; None: each has its own owner."""
    kind: NDArray[np.uint16] | None = None
    """Kind by row, an index into ``may_conflict``; None: all are of kind 0."""


def overlapping_pairs(
    wanted: Intervals,
    held: Intervals,
    slack_ns: int = 0,
    *,
    may_conflict: NDArray[np.uint8] = _ALL_CONFLICT,
) -> tuple[Rows, Rows]:
    """Find the pairs of intervals that have the same key and overlap.

    Args:
        wanted: Intervals to find partners for.
        held: Intervals to search.
        slack_ns: Gap in ns up to which two intervals count as overlapping.
        may_conflict: Matrix by kind of the wanted and of the held interval; 0: they form no pair.

    Returns:
        Rows of ``wanted`` and of ``held``, one element per pair, in no particular order.
    """
    n_keys = int(max(wanted.key.max(initial=-1), held.key.max(initial=-1))) + 1
    columns = [*_columns(wanted, _NO_OWNER[0]), *_columns(held, _NO_OWNER[1])]
    n_wanted, n_held = len(columns[0]), len(columns[6])
    if not n_wanted or not n_held:
        return np.zeros(0, np.uint32), np.zeros(0, np.uint32)
    run = choose((n_wanted + n_held) * _BYTES_PER_INTERVAL)
    inputs = (*read_only(*columns, may_conflict, may_conflict.T), slack_ns)
    capacity = 2 * n_wanted
    while True:
        found = np.empty(capacity, np.uint32), np.empty(capacity, np.uint32)
        in_flight = (
            *(np.full(n_keys, NONE, np.int32), np.empty(n_wanted, np.int32)),
            *(np.full(n_keys, NONE, np.int32), np.empty(n_held, np.int32)),
        )
        n = run(find_overlapping)(*inputs, *in_flight, *found)
        if n <= capacity:
            return found[0][:n], found[1][:n]
        capacity = n


def _columns(intervals: Intervals, no_owner: int) -> tuple[NDArray[Any], ...]:
    """Return the loop's inputs: rows by start and their keys; start, end, owner, kind by row."""
    n = len(intervals.start)
    rows = np.argsort(intervals.start, kind="stable") if intervals.rows is None else intervals.rows
    key = intervals.key[rows] if intervals.rows is None else intervals.key
    keyed = key >= 0
    if not keyed.all():
        rows, key = rows[keyed], key[keyed]
    owner = np.broadcast_to(np.int32(no_owner), n) if intervals.owner is None else intervals.owner
    kind = np.zeros(n, np.uint16) if intervals.kind is None else intervals.kind
    return rows.astype(np.uint32), key.astype(np.int32), intervals.start, intervals.end, owner, kind
