"""Which return belongs to which entry: by thread, last in first out."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.raw import BoolArray, I32Array, I64Array

# A function that does not call itself can be open at most once per context of
# its CPU: task, softirq, hardirq, NMI.  Linux, include/linux/trace_recursion.h
# (TRACE_CTX_NORMAL … TRACE_CTX_NMI).  An entry deeper than that has lost its return.
MAX_CONTEXTS: Final = 4
_SIDE_BITS: Final = 16
_KEY_BITS: Final = 16
_KEY_MASK: Final = (1 << _KEY_BITS) - 1

Index = NDArray[np.intp]


def pair(
    thread: I64Array, function: I32Array, is_return: BoolArray, depth: int = MAX_CONTEXTS
) -> tuple[Index, Index, Index, Index, Index]:
    """Match each return with the last open entry of its function in its thread.

    A return also ends the calls that were opened after its entry and never
    returned: they cannot return any more.

    Args:
        thread: Whatever the calls nest by, one value of 32 bits per event, in file order.
        function: What was called, a small number, comparable between entry and return.
        is_return: Which events are returns.
        depth: Most open calls of one function in one thread; the oldest one
            more is given up.

    Returns:
        Positions of the entries and of the returns of each pair, ordered by the
        return; of the entries given up; of the returns without entry; of the
        entries still open.
    """
    order = every = _by_thread(thread)
    # Thread, function and side of a call in one number: a return has its entry's and one more.
    owner = (thread << np.int64(_SIDE_BITS)) + (function.astype(np.int64) * 2 + is_return)
    mine = owner.take(order)
    entries: list[Index] = []
    returns: list[Index] = []
    while len(order) > 1:
        after = mine[1:]
        matched = np.flatnonzero(((mine[:-1] ^ after) == 1) & ((after & 1) == 1))
        if not len(matched):
            break
        entries.append(order.take(matched))
        returns.append(order.take(matched + 1))
        left = np.ones(len(order), np.bool_)
        left[matched] = left[matched + 1] = False
        order = order[left]
        mine = mine[left]
    nested = [thread[at] for at in entries[depth:]]
    deep = _may_be_too_deep(order, thread, function, is_return, depth - len(entries))
    deep = np.unique(np.concatenate([deep, *nested]))
    if len(deep):
        again = np.isin(thread, deep)
        entries = [at[~again[at]] for at in entries]
        returns = [at[~again[at]] for at in returns]
        order = np.concatenate([order[~again[order]], every[again[every]]])
    more = _by_hand(order, thread, function, is_return, depth)
    entry, back = _by_return([*entries, more[0]], [*returns, more[1]], len(thread))
    still = np.setdiff1d(order, np.concatenate(more), assume_unique=True)
    return entry, back, more[2], more[3], np.sort(still)


def _by_return(entries: list[Index], returns: list[Index], n: int) -> tuple[Index, Index]:
    """Put pairs in the order of their returns: quicker with a place for each than by a sort."""
    partner = np.full(n, -1, np.intp)
    for entry, back in zip(entries, returns, strict=True):
        partner[back] = entry
    ends = np.flatnonzero(partner >= 0)
    return partner.take(ends), ends


def pair_next(thread: I64Array, is_return: BoolArray) -> tuple[Index, Index, Index, Index]:
    """Match each return with the entry directly before it in its thread, as :func:`pair` does.

    For what cannot nest: an entry on top of an open one means that a return is missing.
    """
    order = _by_thread(thread)
    same = np.zeros(len(order) + 1, np.bool_)
    same[1:-1] = thread[order[1:]] == thread[order[:-1]]
    back = is_return[order]
    after_entry = same[:-1] & np.concatenate([[False], ~back[:-1]])
    matched = np.flatnonzero(back & after_entry)
    before_entry = same[1:] & np.concatenate([~back[1:], [False]])
    ends = order[matched]
    by_return = np.argsort(ends, kind="stable")
    return (
        order[matched - 1][by_return],
        ends[by_return],
        np.sort(order[~back & before_entry]),
        np.sort(order[back & ~after_entry]),
    )


def _by_thread(thread: I64Array) -> Index:
    """The events thread by thread; numpy sorts 16-bit keys far faster than longer ones."""
    if not len(thread):
        return np.zeros(0, np.intp)
    keys = thread - thread.min()
    order: Index = np.argsort((keys & _KEY_MASK).astype(np.uint16), kind="stable")
    last = int(keys.max())
    for shift in range(_KEY_BITS, last.bit_length(), _KEY_BITS):
        digit = (keys.take(order) >> shift & _KEY_MASK).astype(np.uint16)
        order = order.take(np.argsort(digit, kind="stable"))
    return order


def _may_be_too_deep(
    order: Index, thread: I64Array, function: I32Array, is_return: BoolArray, room: int
) -> I64Array:
    """Threads with more open calls of one function than ``room``, nested pairs left out."""
    open_calls = order[~is_return[order]]
    if not len(open_calls):
        return np.zeros(0, np.int64)
    both = np.stack([thread[open_calls], function[open_calls].astype(np.int64)])
    calls, n = np.unique(both, axis=1, return_counts=True)
    return np.unique(calls[0][n > room])


def _by_hand(
    order: Index, thread: I64Array, function: I32Array, is_return: BoolArray, depth: int
) -> tuple[Index, Index, Index, Index]:
    """The same rule with a stack, for the few events that do not simply alternate."""
    pairs: tuple[list[int], list[int]] = ([], [])
    given_up: list[int] = []
    orphans: list[int] = []
    stack: list[tuple[int, int]] = []
    current: int | None = None
    for position, owner, what, back in zip(
        order.tolist(),
        thread[order].tolist(),
        function[order].tolist(),
        is_return[order].tolist(),
        strict=True,
    ):
        if owner != current:
            stack, current = [], owner
        open_calls = [at for at, (_, name) in enumerate(stack) if name == what]
        if not back:
            if len(open_calls) >= depth:
                given_up.append(stack.pop(open_calls[0])[0])
            stack.append((position, what))
        elif open_calls:
            given_up.extend(at for at, _ in stack[open_calls[-1] + 1 :])
            del stack[open_calls[-1] + 1 :]
            pairs[0].append(stack.pop()[0])
            pairs[1].append(position)
        else:
            orphans.append(position)
    return (
        np.array(pairs[0], np.intp),
        np.array(pairs[1], np.intp),
        np.array(sorted(given_up), np.intp),
        np.array(sorted(orphans), np.intp),
    )
