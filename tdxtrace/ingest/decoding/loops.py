"""Compiled loops of the decoder: which return belongs to which entry, what threads did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.compiled import compiled
from tdxtrace.ingest.decoding.pairing import MAX_CONTEXTS, Index
from tdxtrace.ingest.raw import BoolArray, I32Array, I64Array, U64Array
from tdxtrace.tdx import word

U16Array = NDArray[np.uint16]

_NONE: Final = -1
# What became of an event that is in no pair.
_GIVEN_UP: Final = 1
_ORPHAN: Final = 2
_OPEN: Final = 3
# Of a table of threads, in slots: it grows when half of it is taken.
_LEAST_SLOTS: Final = 1 << 10
# Of threads whose calls are looked through.
_MOST_SLOTS: Final = 1 << 13
_ERROR: Final = np.uint64(word.ERROR_BIT)
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: Knuth, TAOCP 6.4


def pair(
    thread: I64Array, function: I32Array, is_return: BoolArray, depth: int = MAX_CONTEXTS
) -> tuple[Index, Index, Index, Index, Index]:
    """Match each return with the last open entry of its function in its thread.

    What it takes and gives is said at :func:`tdxtrace.ingest.decoding.pairing.pair`.
    """
    every = np.arange(len(thread), dtype=np.int32)
    return pair_events(thread, every, function, is_return, depth)


def pair_events(
    thread: I64Array | I32Array,
    event: I32Array,
    function: I32Array,
    is_return: BoolArray,
    depth: int = MAX_CONTEXTS,
) -> tuple[Index, Index, Index, Index, Index]:
    """Do the same where function and side are given by event, and each row has its event."""
    n = len(thread)
    entry, back = np.empty(n // 2, np.intp), np.empty(n // 2, np.intp)
    fate, below = np.zeros(n, np.uint8), np.empty(n, np.intp)
    slots = _LEAST_SLOTS
    n_pairs = _NONE
    while n_pairs == _NONE:
        top, owner = np.full(slots, _NONE, np.intp), np.full(slots, _NONE, np.intp)
        n_pairs = _pair(
            (thread, event, function, is_return), depth, (top, owner, below), (entry, back, fate)
        )
        slots *= 4
    # numpy finds what is true far quicker than what is not 0.
    others = np.flatnonzero(fate != 0) if 2 * n_pairs < n else np.zeros(0, np.intp)
    given_up, orphan, still = (others[fate[others] == x] for x in (_GIVEN_UP, _ORPHAN, _OPEN))
    return entry[:n_pairs], back[:n_pairs], given_up, orphan, still


@compiled
def _slot(thread: I64Array | I32Array, at: int, owner: Index) -> int:
    """Where the thread of an event is in the table, or will be."""
    mask = len(owner) - 1
    place = int(np.uint64(thread[at]) * _MIX >> np.uint64(32)) & mask
    while owner[place] != _NONE and thread[owner[place]] != thread[at]:
        place = (place + 1) & mask
    return place


@compiled
def _pair(
    events: tuple[I64Array | I32Array, I32Array, I32Array, BoolArray],
    depth: int,
    stacks: tuple[Index, Index, Index],
    into: tuple[Index, Index, NDArray[np.uint8]],
) -> int:
    """Write the pairs and the fate of other events; return how many pairs, -1: a small table.

    Open entries are a list: ``top`` of each thread, ``below`` each the one before it.
    """
    thread, event, function, is_return = events
    top, owner, below = stacks
    entry, back, fate = into
    fate[:] = 0
    n_pairs = n_threads = slot = 0
    for at in range(len(thread)):
        if at == 0 or thread[at] != thread[at - 1]:
            slot = _slot(thread, at, owner)
            if owner[slot] == _NONE:
                n_threads += 1
                if 2 * n_threads > len(owner):
                    return _NONE
                owner[slot] = at
        what = function[event[at]]
        if is_return[event[at]]:
            found = top[slot]
            while found != _NONE and function[event[found]] != what:
                found = below[found]
            if found == _NONE:
                fate[at] = _ORPHAN
                continue
            while top[slot] != found:
                fate[top[slot]] = _GIVEN_UP
                top[slot] = below[top[slot]]
            fate[found] = 0
            top[slot] = below[found]
            entry[n_pairs], back[n_pairs] = found, at
            n_pairs += 1
        else:
            if top[slot] != _NONE:
                _give_up_oldest((event, function), what, depth, slot, (top, below, fate))
            below[at], top[slot], fate[at] = top[slot], at, _OPEN
    return n_pairs


@compiled
def _give_up_oldest(
    events: tuple[I32Array, I32Array],
    what: int,
    depth: int,
    slot: int,
    stack: tuple[Index, Index, NDArray[np.uint8]],
) -> None:
    """Before one more entry of a function: end the oldest if there would be too many."""
    event, function = events
    top, below, fate = stack
    n_open, oldest, above_oldest, above = 0, _NONE, _NONE, _NONE
    place = top[slot]
    while place != _NONE:
        if function[event[place]] == what:
            n_open += 1
            oldest, above_oldest = place, above
        above, place = place, below[place]
    if n_open < depth:
        return
    fate[oldest] = _GIVEN_UP
    if above_oldest == _NONE:
        top[slot] = below[oldest]
    else:
        below[above_oldest] = below[oldest]


@dataclass(frozen=True, slots=True)
class Seen:
    """What whole calls, in the order of their ends, tell of their threads."""

    tid: I32Array
    """Of each thread, ascending."""
    enters: BoolArray
    """Whether it enters a vCPU."""
    first: Index
    """Its first call …"""
    last: Index
    """… and its last."""
    leaves: Index
    """The leaves of all calls."""
    done: Index
    """Calls of leaves that were asked for, and without an error."""


def look(
    tid: I32Array, end_ns: I64Array, leaf: U16Array, status: U64Array, enter: int, asked: BoolArray
) -> Seen | None:
    """Look through calls once.

    Args:
        tid: Thread of each.
        end_ns: When it ended.
        leaf: Its leaf.
        status: Its status.
        enter: The leaf that enters a vCPU.
        asked: By leaf: whether to tell which calls were done.

    Returns:
        None if they are not in the order of their ends, or of very many threads.
    """
    owner, enters = np.full(_MOST_SLOTS, _NONE, np.intp), np.zeros(_MOST_SLOTS, np.bool_)
    last, leaves = np.zeros(_MOST_SLOTS, np.intp), np.zeros(len(asked), np.bool_)
    done = np.empty(len(tid), np.intp)
    n_done = _look(tid, end_ns, leaf, status, enter, (asked, owner, last, enters, leaves, done))
    if n_done == _NONE:
        return None
    met = np.flatnonzero(owner != _NONE)
    met = met[np.argsort(tid[owner[met]])]
    first = owner[met]
    return Seen(tid[first], enters[met], first, last[met], np.flatnonzero(leaves), done[:n_done])


@compiled
def _look(
    tid: I32Array,
    end_ns: I64Array,
    leaf: U16Array,
    status: U64Array,
    enter: int,
    into: tuple[BoolArray, Index, Index, BoolArray, BoolArray, Index],
) -> int:
    """Write what the calls tell; return how many were done, -1 if they cannot be looked through."""
    asked, owner, last, enters, leaves, done = into
    n_threads = n_done = slot = 0
    for at in range(len(tid)):
        if at > 0 and end_ns[at] < end_ns[at - 1]:
            return _NONE
        if at == 0 or tid[at] != tid[at - 1]:
            slot = _slot(tid, at, owner)
            if owner[slot] == _NONE:
                n_threads += 1
                if 2 * n_threads > len(owner):
                    return _NONE
                owner[slot] = at
        last[slot] = at
        leaves[leaf[at]] = True
        if leaf[at] == enter:
            enters[slot] = True
        if asked[leaf[at]] and status[at] < _ERROR:
            done[n_done] = at
            n_done += 1
    return n_done
