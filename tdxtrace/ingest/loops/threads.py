"""Threads are numbered from 0 in the order in which they first occur."""

from __future__ import annotations

from typing import Final

import numpy as np

from tdxtrace.ingest.batch import I32Array, I64Array, U64Array

TABLE_FULL: Final = -1
# 2^64 divided by the golden ratio: Knuth, TAOCP 6.4, multiplicative hashing.
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_HIGH_HALF: Final = np.uint64(32)


def number_threads(tid: I32Array, slots: I32Array, slot_tid: I32Array, number: I32Array) -> int:
    """Write the number of each event's thread; return how many threads there are.

    Args:
        tid: Thread of each event.
        slots: Hash table of thread numbers, -1 where a slot is free; its length is a power of 2.
        slot_tid: The thread in each slot.
        number: Where to write, one entry per event.

    Returns:
        TABLE_FULL if more than half of the slots would be taken.
    """
    n_threads = before = 0
    mine = -1
    mask = len(slots) - 1
    for at in range(len(tid)):
        thread = tid[at]
        if mine < 0 or thread != before:
            slot = int(np.uint64(thread) * _MULTIPLIER >> _HIGH_HALF) & mask
            while slots[slot] >= 0 and slot_tid[slot] != thread:
                slot = (slot + 1) & mask
            if slots[slot] < 0:
                if 2 * n_threads >= len(slots):
                    return TABLE_FULL
                slots[slot], slot_tid[slot] = n_threads, thread
                n_threads += 1
            before, mine = thread, slots[slot]
        number[at] = mine
    return n_threads


def first_and_last(
    number: I32Array,
    began: I64Array,
    ended: I64Array,
    seq: U64Array,
    first_row: I64Array,
    first_end: I64Array,
    last_end: I64Array,
) -> None:
    """Write which row of each thread began first, and when its rows first and last ended.

    Args:
        number: Thread of each row, from 0.
        began: When it began, ns.
        ended: When it ended, ns.
        seq: Decides between rows that began at the same time.
        first_row: By thread: the row that began first; -1 before any.
        first_end: By thread, ns.
        last_end: By thread, ns.
    """
    for row in range(len(number)):
        thread = number[row]
        first = first_row[thread]
        if first < 0:
            first_row[thread] = row
            first_end[thread] = last_end[thread] = ended[row]
            continue
        if ended[row] > last_end[thread]:
            last_end[thread] = ended[row]
        elif ended[row] < first_end[thread]:
            first_end[thread] = ended[row]
        if began[row] <= began[first] and (began[row] < began[first] or seq[row] < seq[first]):
            first_row[thread] = row
