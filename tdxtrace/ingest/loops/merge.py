"""The events of all CPUs, one after the other: of those that come next, the earliest first."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.loops.fields import (
    BEHIND,
    EVENT,
    FIRST,
    LEAST,
    SLOTS,
    Heads,
    context,
    event_number,
    read_fields,
    record_thread,
)
from tdxtrace.ingest.loops.pages import (
    CPU,
    FIRST_TIME,
    HAS_MORE,
    LAST_TIME,
    N_EVENTS,
    N_LOST,
    RECORD,
    SIZE,
    TIME,
    PageShape,
    Shifts,
    next_event,
)

I64Array = NDArray[np.int64]
I32Array = NDArray[np.int32]
Columns = tuple[
    I64Array, I64Array, I32Array, I32Array, NDArray[np.int8], I32Array, I32Array, I64Array
]
"""Of a RecordBatch: line, ts_ns, tid, cpu, in_irq, event, layout, first_word; one entry a row."""
Done = tuple[int, int, int, int, int, int]
"""Sources that may have further events; events so far; and of the batch its rows, their words,
gaps, and threads."""

# Why the loop ended: no event is left; the first of ``order`` needs further pages; its event
# has a number without a layout; there is no room for it.
END, NEEDS_PAGES, NEEDS_LAYOUT, FULL = range(4)
MOST_WORDS: Final = 64
"""Room that must be left for the words of a row: there are fewer slots in batch.SLOTS."""
# Columns of the gaps: number of the source, events lost, time of its last event before or -1,
# that of the first after, and the line of that.
GAP_COLUMNS: Final = 5
# Columns of the counts: see EventCatalog.count.
N, LINE, N_SHORT, SHORT_LINE, N_COUNTS = range(5)


def merge(
    int64_at: I64Array,
    forms: tuple[PageShape, Heads, Shifts],
    sources: I64Array,
    order: I64Array,
    catalog: tuple[I64Array, I64Array, I64Array],
    into: tuple[Columns, I64Array, I64Array, I64Array],
    threads: tuple[NDArray[np.bool_], I32Array],
    done: Done,
) -> tuple[int, Done]:
    """Give out events by time, those of one time by source, and make rows of those that are ours.

    Events of one source stay in their order, even if a damaged page makes its time go back.

    Args:
        int64_at: The number at each byte of the pages that are in memory.
        forms: How pages and the heads of records look, and corrections of clocks.
        sources: By source, the columns that loops.pages names; changed.
        order: The sources that may have further events, as a heap by the time of the one that
            comes next; changed.
        catalog: By event number its layout, or less than 0; and the tables of layouts and of
            fields (records.fields).
        into: Filled: columns and words of the rows, gaps, and counts by layout.
        threads: By thread number, up to some, whether it is known; filled: those that were not.
        done: What was done before.

    Returns:
        Why it ended, and what was done.
    """
    shape, heads, shifts = forms
    number_to_layout, layouts, fields = catalog
    columns, words, gaps, counts = into
    most_rows, most_words, most_gaps = len(columns[0]), len(words) - MOST_WORDS, len(gaps)
    n_sources, n_events, n_rows, n_words, n_gaps, n_threads = done
    while n_sources > 0:
        source = int(order[0])
        record = int(sources[source, RECORD])
        if record < 0:
            if not next_event(int64_at, shape, shifts, sources, source):
                if sources[source, HAS_MORE]:
                    return NEEDS_PAGES, (n_sources, n_events, n_rows, n_words, n_gaps, n_threads)
                n_sources -= 1
                order[0] = order[n_sources]
            _restore(order, n_sources, sources)
            continue
        layout = int(number_to_layout[event_number(int64_at, record, heads)])
        if layout < 0:
            return NEEDS_LAYOUT, (n_sources, n_events, n_rows, n_words, n_gaps, n_threads)
        if n_rows == most_rows or n_words > most_words or n_gaps == most_gaps:
            return FULL, (n_sources, n_events, n_rows, n_words, n_gaps, n_threads)
        n_events += 1
        n_gaps = _take_event(sources, source, n_events, gaps, n_gaps)
        if not _count(counts, layout, n_events, int(sources[source, SIZE]), layouts):
            continue
        tid, in_irq = context(int64_at, record, heads)
        n_threads = record_thread(tid, threads[0], threads[1], n_threads)
        _write(columns, n_rows, n_events, sources, source, tid, in_irq, layouts, layout, n_words)
        first, behind = int(layouts[layout, FIRST]), int(layouts[layout, BEHIND])
        n_words = read_fields(int64_at, record, first, behind, fields, words, n_words)
        n_rows += 1
    return END, (n_sources, n_events, n_rows, n_words, n_gaps, n_threads)


def _restore(order: I64Array, n: int, sources: I64Array) -> None:
    """Move the first of a heap, whose time has grown, to its place."""
    if n < 2:
        return
    place, mine = 0, int(order[0])
    time = int(sources[mine, TIME])
    while 2 * place + 1 < n:
        child = 2 * place + 1
        other = int(order[child])
        other_time = int(sources[other, TIME])
        if child + 1 < n:
            right = int(order[child + 1])
            right_time = int(sources[right, TIME])
            if right_time < other_time or (right_time == other_time and right < other):
                child, other, other_time = child + 1, right, right_time
        if time < other_time or (time == other_time and mine < other):
            break
        order[place] = other
        place = child
    order[place] = mine


def _take_event(sources: I64Array, source: int, line: int, gaps: I64Array, n_gaps: int) -> int:
    """Note that a source's event was given out, and what was lost before it."""
    time = sources[source, TIME]
    if sources[source, N_LOST]:
        gaps[n_gaps, 0], gaps[n_gaps, 1] = source, sources[source, N_LOST]
        gaps[n_gaps, 2], gaps[n_gaps, 3] = sources[source, LAST_TIME], time
        gaps[n_gaps, 4] = line
        n_gaps += 1
        sources[source, N_LOST] = 0
    if sources[source, N_EVENTS] == 0:
        sources[source, FIRST_TIME] = time
    sources[source, LAST_TIME] = time
    sources[source, N_EVENTS] += 1
    sources[source, RECORD] = -1
    return n_gaps


def _count(counts: I64Array, layout: int, line: int, size: int, layouts: I64Array) -> bool:
    """Count a record of ``size`` bytes; return whether it becomes a row."""
    if counts[layout, N] == 0:
        counts[layout, LINE] = line
    counts[layout, N] += 1
    least = layouts[layout, LEAST]
    if size >= least:
        return bool(least >= 0)
    if counts[layout, N_SHORT] == 0:
        counts[layout, SHORT_LINE] = line
    counts[layout, N_SHORT] += 1
    return False


def _write(
    columns: Columns,
    row: int,
    line: int,
    sources: I64Array,
    source: int,
    tid: int,
    in_irq: int,
    layouts: I64Array,
    layout: int,
    first_word: int,
) -> None:
    lines, time, tids, cpu, in_irqs, event, slots, first_words = columns
    lines[row], time[row], cpu[row] = line, sources[source, TIME], sources[source, CPU]
    tids[row], in_irqs[row] = tid, in_irq
    event[row], slots[row] = layouts[layout, EVENT], layouts[layout, SLOTS]
    first_words[row] = first_word
