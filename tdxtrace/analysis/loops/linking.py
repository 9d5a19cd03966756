"""Attempts at the same request, among the calls of each thread.

A call is another attempt if the thread's last call for the same request may have to be repeated,
whatever else the thread called in between.  A call that does not name its request, where others
of its leaf do, continues none: it may belong to any that is open.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

NONE: Final = -1
_Rows = NDArray[np.int64]
_Flags = NDArray[np.bool_]
_Keys = NDArray[np.uint64]


def link_attempts(
    owner: _Rows,
    code: _Rows,
    key: _Keys,
    is_open: _Flags,
    is_named: _Flags,
    slot_key: _Keys,
    slot_row: _Rows,
    n_open: _Rows,
    vague: _Rows,
    loose: _Rows,
    previous: _Rows,
    doubtful: _Flags,
) -> None:
    """Write the attempt before each call, and where an attempt may be missing.

    Args:
        owner: Thread of each call; calls are in the order of threads, and of time within each.
        code: Number of its leaf, small.
        key: Equal for calls of one thread for the same request, different for others.
        is_open: Whether the call may be repeated: its answer is retryable, or was not recorded.
        is_named: Whether it names all that calls of its leaf name in this capture.
        slot_key: Hash table; its size is a power of 2, above the number of interrupted requests.
        slot_row: By slot: NONE; the last attempt, for calls that are not next to each other.
        n_open: By leaf: scratch.
        vague: By leaf: scratch; last call that names no request, and may belong to an open one.
        loose: By leaf: scratch; last call that names no request, and may be repeated.
        previous: By call: NONE; the attempt before it is written.
        doubtful: By call: False; True is written where the chain may not be whole.
    """
    for row in range(len(owner)):
        before = np.int64(row - 1)
        if row == 0 or owner[row] != owner[before]:
            before = np.int64(NONE)
            n_open[:] = 0
            vague[:] = NONE
            loose[:] = NONE
        found = np.int64(NONE)
        if before != NONE and key[before] == key[row]:
            found = before if is_open[before] and is_named[row] else np.int64(NONE)
        else:
            if before != NONE and is_open[before] and is_named[before]:
                _keep(key[before], before, slot_key, slot_row)
            if is_named[row]:
                found = _take(key[row], slot_key, slot_row)
        previous[row] = found
        _doubt(row, found, code[row], is_open, is_named, n_open, vague, loose, doubtful)


def _keep(key: np.uint64, row: np.int64, slot_key: _Keys, slot_row: _Rows) -> None:
    """Remember the last attempt of a request that the thread did not repeat at once."""
    last = np.uint64(len(slot_key) - 1)
    slot = key & last
    while slot_row[slot] != NONE and slot_key[slot] != key:
        slot = (slot + np.uint64(1)) & last
    slot_key[slot] = key
    slot_row[slot] = row


def _take(key: np.uint64, slot_key: _Keys, slot_row: _Rows) -> np.int64:
    """Return the attempt that was remembered, and forget it; NONE if there is none."""
    last = np.uint64(len(slot_key) - 1)
    slot = key & last
    while slot_row[slot] != NONE:
        if slot_key[slot] == key:
            row = slot_row[slot]
            _close_gap(slot, slot_key, slot_row)
            return np.int64(row)
        slot = (slot + np.uint64(1)) & last
    return np.int64(NONE)


def _close_gap(slot: np.uint64, slot_key: _Keys, slot_row: _Rows) -> None:
    """Empty a slot and move those behind it that would no longer be found (Knuth, TAOCP 6.4 R)."""
    last = np.uint64(len(slot_key) - 1)
    slot_row[slot] = NONE
    at = (slot + np.uint64(1)) & last
    while slot_row[at] != NONE:
        wanted = slot_key[at] & last
        if ((at - wanted) & last) >= ((at - slot) & last):
            slot_key[slot] = slot_key[at]
            slot_row[slot] = slot_row[at]
            slot_row[at] = NONE
            slot = at
        at = (at + np.uint64(1)) & last


def _doubt(
    row: int,
    found: np.int64,
    code: np.int64,
    is_open: _Flags,
    is_named: _Flags,
    n_open: _Rows,
    vague: _Rows,
    loose: _Rows,
    doubtful: _Flags,
) -> None:
    """Mark what cannot be told because a call does not name its request."""
    if found != NONE:
        n_open[code] -= 1
        doubtful[row] = vague[code] > found
    elif not is_named[row]:
        # Any open request of the leaf may be the one that it belongs to.
        if n_open[code] > 0:
            vague[code] = row
            doubtful[row] = True
    elif loose[code] != NONE:
        # It may continue the request that was not named.
        doubtful[row] = doubtful[loose[code]] = True
        loose[code] = NONE
    if is_open[row]:
        n_open[code] += 1
        if not is_named[row]:
            loose[code] = row


def doubt_open_ends(
    owner: _Rows,
    code: _Rows,
    is_open: _Flags,
    is_named: _Flags,
    is_last: _Flags,
    later: _Rows,
    doubtful: _Flags,
) -> None:
    """Mark requests left open that a later call, which does not name its own, may have continued.

    Args:
        owner: Thread of each call, as for :func:`link_attempts`.
        code: Number of its leaf.
        is_open: Whether the call may be repeated.
        is_named: Whether it names its request.
        is_last: Whether it is the last attempt of its request.
        later: By leaf: scratch; the next call that does not name its request.
        doubtful: By call, as :func:`link_attempts` wrote it; more are marked.
    """
    for row in range(len(owner) - 1, -1, -1):
        if row == len(owner) - 1 or owner[row] != owner[row + 1]:
            later[:] = NONE
        of_leaf = code[row]
        if is_open[row] and is_last[row] and later[of_leaf] != NONE:
            doubtful[row] = True
        if doubtful[row] and not is_named[row]:
            later[of_leaf] = row


def order_by_chain(previous: _Rows, chain: _Rows, begins: _Rows, order: _Rows) -> int:
    """Write the chain of each call, and the calls chain by chain; return the number of chains.

    Args:
        previous: By call: the attempt before it, NONE for the first.
        chain: By call: written, numbered by first attempts.
        begins: By chain, one more than calls: scratch; 0.
        order: Written: calls of a chain follow each other, first attempts are in order.
    """
    n = 0
    for row in range(len(previous)):
        if previous[row] == NONE:
            chain[row] = n
            n += 1
        else:
            chain[row] = chain[previous[row]]
        begins[chain[row] + 1] += 1
    for number in range(n):
        begins[number + 1] += begins[number]
    for row in range(len(previous)):
        order[begins[chain[row]]] = row
        begins[chain[row]] += 1
    return n
