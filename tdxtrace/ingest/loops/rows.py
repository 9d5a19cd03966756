"""Fill the columns of table rows from events, and number the threads of rows."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import UNKNOWN, BoolArray, I8Array, I32Array, I64Array, U64Array

OBSERVED: Final = ("start_ns", "end_ns", "start_cpu", "cpu", "tid", "tgid", "in_irq")
"""Columns that may be unknown, in the order of the rows of ``present``."""
_START, _END, _START_CPU, _CPU, _TID, _TGID, _IN_IRQ = range(len(OBSERVED))
_MAX_CPU: Final = 0xFFFF


def make_rows(
    start: I64Array,
    end: I64Array,
    line: I64Array,
    ts_ns: I64Array,
    cpu: I32Array,
    tid: I32Array,
    tgid: I32Array,
    in_irq: I8Array,
    row_seq: I64Array,
    row_start_ns: I64Array,
    row_end_ns: I64Array,
    row_cpus: NDArray[np.uint16],
    row_ids: I32Array,
    row_in_irq: BoolArray,
    present: BoolArray,
) -> None:
    """Write the columns of rows from the common fields of their entry and return events.

    Args:
        start: Index of each row's entry event; -1: not recorded.
        end: Index of each row's return event; -1: not recorded.
        line: By event: its line number in the source.
        ts_ns: By event: its time, ns.
        cpu: By event: its CPU, or UNKNOWN.
        tid: By event: its thread, or UNKNOWN.
        tgid: By event: its process, or UNKNOWN.
        in_irq: By event: 1 in interrupt context, 0 outside, or UNKNOWN.
        row_seq: By row, written: ``line`` of the last event.
        row_start_ns: By row, written: time of the entry, or of the return if it has no entry.
        row_end_ns: By row, written: time of the return, or of the entry if it has no return.
        row_cpus: By row, written: CPU of the entry (first row) and of the last event (second).
        row_ids: By row, written: thread (first row) and process (second).
        row_in_irq: By row, written: whether the return, or else the entry, was in interrupt
            context.
        present: Written: where each of OBSERVED is known.  A start after the end counts as unknown,
            as clocks of two CPUs may disagree (trace_clock "local").
    """
    for row in range(len(start)):
        first, last = start[row], end[row]
        has_start, has_end = first >= 0, last >= 0
        if not has_start:
            first = last
        if not has_end:
            last = first
        began, ended = ts_ns[first], ts_ns[last]
        row_seq[row], row_start_ns[row], row_end_ns[row] = line[last], began, ended
        present[_START, row] = has_start and began <= ended
        present[_END, row] = has_end
        number = cpu[first]
        if has_start and 0 <= number <= _MAX_CPU:
            row_cpus[0, row], present[_START_CPU, row] = number, True
        number = cpu[last]
        if 0 <= number <= _MAX_CPU:
            row_cpus[1, row], present[_CPU, row] = number, True
        number = tid[last]
        row_ids[0, row], present[_TID, row] = number, number != UNKNOWN
        number = max(tgid[first], tgid[last])
        row_ids[1, row], present[_TGID, row] = number, number != UNKNOWN
        context = in_irq[last]
        if context == UNKNOWN:
            context = in_irq[first]
        if context != UNKNOWN:
            row_in_irq[row], present[_IN_IRQ, row] = context == 1, True


def copy_fields(
    event: I64Array,
    layout: I32Array,
    first_word: I64Array,
    words: U64Array,
    columns: I64Array,
    position: I64Array,
    value: U64Array,
    present: BoolArray,
) -> None:
    """Copy fields of one event per row into columns, replacing earlier values.

    Args:
        event: Index of each row's event; -1: no event, nothing is copied.
        layout: By event: number of its layout.
        first_word: By event: index of its first word.
        words: The words of all events.
        columns: Columns that some layout fills.
        position: By column and layout: which word of the event fills it; -1: none.
        value: One row per column, one entry per table row; written.
        present: Where a value was written, of the same shape.
    """
    for column in columns:
        for row in range(len(event)):
            at = event[row]
            if at >= 0:
                word = position[column, layout[at]]
                if word >= 0:
                    value[column, row] = words[first_word[at] + word]
                    present[column, row] = True


TABLE_FULL: Final = -1
# 2^64 divided by the golden ratio: Knuth, TAOCP 6.4, multiplicative hashing.
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_HIGH_HALF: Final = np.uint64(32)


def number_threads(tid: I32Array, slots: I32Array, slot_tid: I32Array, number: I32Array) -> int:
    """Write the index of each event's thread, in order of first occurrence.

    Args:
        tid: Thread ID of each event.
        slots: Hash table of thread indexes, filled with -1; its length is a power of 2.
        slot_tid: The thread ID in each slot; scratch.
        number: Written, one entry per event.

    Returns:
        The number of threads; TABLE_FULL if more than half of the slots would be taken.
    """
    n_threads = previous_tid = 0
    index = -1
    mask = len(slots) - 1
    for at in range(len(tid)):
        thread = tid[at]
        if index < 0 or thread != previous_tid:
            slot = int(np.uint64(thread) * _MULTIPLIER >> _HIGH_HALF) & mask
            while slots[slot] >= 0 and slot_tid[slot] != thread:
                slot = (slot + 1) & mask
            if slots[slot] < 0:
                if 2 * n_threads >= len(slots):
                    return TABLE_FULL
                slots[slot], slot_tid[slot] = n_threads, thread
                n_threads += 1
            previous_tid, index = thread, slots[slot]
        number[at] = index
    return n_threads


def thread_spans(
    number: I32Array,
    began: I64Array,
    ended: I64Array,
    seq: U64Array,
    first_row: I64Array,
    first_end: I64Array,
    last_end: I64Array,
) -> None:
    """Write the row of each thread that began first, and its earliest and latest end.

    Args:
        number: Index of each row's thread, from 0.
        began: Begin of each row, ns.
        ended: End of each row, ns.
        seq: Line of each row; breaks ties between rows that began at the same time.
        first_row: By thread: -1; replaced by the row that began first.
        first_end: By thread, written: earliest end, ns.
        last_end: By thread, written: latest end, ns.
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
