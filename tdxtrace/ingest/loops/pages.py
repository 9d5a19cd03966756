"""Events of ring-buffer pages: of one CPU one after the other, of all CPUs the earliest first.

A page is a header, the time at which it begins and the length of its data, and records, each of
which says how much later than the one before it was.  Linux include/linux/ring_buffer.h and
kernel/trace/ring_buffer.c; of 64-bit little-endian machines.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tdxtrace.ingest.batch import BoolArray, I8Array, I32Array, I64Array, U64Array

Heads = tuple[int, int, int, int, int]
"""Where records have their common fields, in bytes: that of the event's number and its mask,
the thread's number, the flags, the preempt count; -1 for those that they lack."""

# Columns of the table of layouts, and of that of their fields: see records.layouts.FieldTables.
FIRST, BEHIND, LEAST, EVENT, SLOTS = range(5)
OFFSET, MASK, SIGN = range(3)

# enum trace_flag_type, Linux include/linux/trace_events.h: HARDIRQ and NMI.
_IN_IRQ: Final = 0x08 | 0x40
_NO_CONTEXT: Final = 0xFF  # preempt count of uprobe events: it tells nothing
_LOW: Final = 0xFFFF_FFFF
_SIGN: Final = 1 << 31
_UNKNOWN: Final = -1


def event_number(int64_at: I64Array, record: int, heads: Heads) -> int:
    """The number of the event that the record at byte ``record`` is of."""
    return int(int64_at[record + heads[0]]) & heads[1]


def context(int64_at: I64Array, record: int, heads: Heads) -> tuple[int, int]:
    """The thread that made a record, and 1 if in hard interrupt context, 0 if not; -1: unknown."""
    tid, in_irq = _UNKNOWN, _UNKNOWN
    if heads[2] >= 0:
        tid = ((int(int64_at[record + heads[2]]) & _LOW) ^ _SIGN) - _SIGN
    if heads[3] >= 0:
        in_irq = 1 if int(int64_at[record + heads[3]]) & _IN_IRQ else 0
        if heads[4] >= 0 and int(int64_at[record + heads[4]]) & 0xFF == _NO_CONTEXT:
            in_irq = _UNKNOWN
    return tid, in_irq


def read_fields(
    int64_at: I64Array,
    record: int,
    first: int,
    end: int,
    fields: I64Array,
    words: I64Array,
    n_words: int,
) -> int:
    """Write a record's fields behind the first ``n_words`` of ``words``; return how many then.

    Args:
        int64_at: The number at each byte.
        record: The byte at which the record begins.
        first: Row in ``fields`` of the first one that its layout has …
        end: … and behind the last.
        fields: By field: OFFSET in bytes, MASK, and SIGN bit; 0: unsigned.
        words: Filled; with room for them.
        n_words: Words before these.
    """
    for field in range(first, end):
        word = int64_at[record + fields[field, OFFSET]] & fields[field, MASK]
        sign = fields[field, SIGN]
        words[n_words] = (word ^ sign) - sign
        n_words += 1
    return n_words


def record_thread(tid: int, is_known: BoolArray, fresh: I32Array, n_fresh: int) -> int:
    """Put a thread behind the first ``n_fresh`` of ``fresh`` unless known; return how many then.

    ``is_known`` says it of threads by their numbers, up to some: others come again and again.
    """
    if 0 <= tid < len(is_known):
        if is_known[tid]:
            return n_fresh
        is_known[tid] = True
    fresh[n_fresh] = tid
    return n_fresh + 1


PageShape = tuple[int, int, int]
"""Bytes of a page, and where on it its events begin, and the length of its data is."""
Shifts = tuple[I64Array, I64Array, U64Array, I64Array, U64Array, U64Array]
"""Corrections of clocks (tracedat.options.shifts_of): by source and one more, its first; by
source, whether to interpolate; and by correction its time, offset, factor, and binary fraction."""

# Columns of the table of sources, each a CPU's buffer: the byte of its next page and of the end
# of the pages that are in memory; of its next record and of the end of its page's data; the
# clock there.  Of the event that was found: its time, its record's first byte or -1 if none
# was found, and bytes.  Events lost before it (-1: an unknown number); times of the first and
# the last event before, -1: none; damaged pages and events so far; the number of its CPU, and
# whether its file has more pages.
(NEXT_PAGE, PAGES_END, AT, DATA_END, NOW, TIME, RECORD, SIZE, N_LOST) = range(9)
(FIRST_TIME, LAST_TIME, N_DAMAGED, N_EVENTS, CPU, HAS_MORE, N_COLUMNS) = range(9, 16)

FAR: Final = (1 << 63) - 1
"""Times from here on come from damage; they would overflow."""
# enum ring_buffer_type: 1 to 28 is a record of so many words, 0 one whose length is in its
# first word.
_PADDING: Final = 29
_TIME_EXTEND: Final = 30
_TIME_STAMP: Final = 31
_TYPE_MASK: Final = 31
_TYPE_BITS: Final = 5
_DELTA_BITS: Final = 27
_DELTA_MASK: Final = (1 << _DELTA_BITS) - 1
_WORD_MASK: Final = (1 << 32) - 1
# An absolute timestamp has 59 bits; its high bits are those of the one before (rb_fix_abs_ts).
_STAMP_BITS: Final = 59
_STAMP_MASK: Final = (1 << _STAMP_BITS) - 1
# Flags beside the length of a page's data: events were lost before it, and their number
# follows the data.
_MISSED_EVENTS: Final = 1 << 31
_MISSED_STORED: Final = 1 << 30
_COMMIT_MASK: Final = (1 << 27) - 1  # libtraceevent src/kbuffer-parse.c, COMMIT_MASK
# The shortest record is a header and one word.
_LEAST_BYTES: Final = 8
_NONE: Final = -1
_DAMAGED: Final = -2


def page_start(int64_at: I64Array, page: int, shape: PageShape) -> tuple[int, int, int]:
    """Read the header of the page at byte ``page``.

    Returns:
        When it begins, in the clock's unit, -1 if it cannot be a page; bytes of its data; and
        events lost before it: 0 none, -1 an unknown number.
    """
    page_size, data, commit_at = shape
    start, commit = int(int64_at[page]), int(int64_at[page + commit_at])
    n_bytes, room, n_lost = commit & _COMMIT_MASK, page_size - data, 0
    if start < 0 or start >= FAR or n_bytes > room:
        start = -1
    if commit & _MISSED_EVENTS:
        n_lost = -1
        if commit & _MISSED_STORED and n_bytes + 8 <= room and n_bytes % 4 == 0 and start >= 0:
            n = int(int64_at[page + data + n_bytes]) & _WORD_MASK
            n_lost = n if n > 0 else -1
    return start, n_bytes, n_lost


def next_record(int64_at: I64Array, at: int, end: int, now: int) -> tuple[int, int, int, int]:
    """Find the next event of a page.

    Time extends, absolute timestamps and padding move the clock or the place and are no events.

    Args:
        int64_at: The number at each byte.
        at: Where the next record begins.
        end: Where the page's data ends.
        now: The clock there.

    Returns:
        Place and clock behind the event, the first byte of its record, and how many there are:
        _NONE at the end of the page, _DAMAGED where something stands that is no record.
    """
    while at < end:
        both = int(int64_at[at])
        kind, delta = both & _TYPE_MASK, both >> _TYPE_BITS & _DELTA_MASK
        if 0 < kind < _PADDING:
            behind = at + 4 + 4 * kind
            if behind > end:
                break
            return behind, _later(now, delta), at + 4, 4 * kind
        word = both >> 32 & _WORD_MASK
        if kind == _PADDING and delta == 0:
            return end, now, at, _NONE  # the unused rest of the page
        behind = at + (8 if kind >= _TIME_EXTEND else 4 + ((word + 3) & ~3))
        if behind > end or (kind < _TIME_EXTEND and word < 4):
            break
        if kind == _TIME_STAMP:
            full = (delta | word << _DELTA_BITS) + (now & ~_STAMP_MASK)
            now = full if full >= now else _later(full, _STAMP_MASK + 1)
        else:
            now = _later(now, delta | word << _DELTA_BITS if kind == _TIME_EXTEND else delta)
        if kind == 0:
            return behind, now, at + 8, word - 4
        at = behind
    return end, now, at, _DAMAGED if at < end else _NONE


def _later(now: int, delta: int) -> int:
    return now + delta if now <= FAR - delta else FAR


def next_event(
    int64_at: I64Array, shape: PageShape, shifts: Shifts, sources: I64Array, source: int
) -> bool:
    """Find the next event of a source; False if the pages in memory hold no further one."""
    while True:
        at, end = int(sources[source, AT]), int(sources[source, DATA_END])
        if at < end:
            at, now, record, n = next_record(int64_at, at, end, int(sources[source, NOW]))
            sources[source, AT] = at
            if n >= 0:
                sources[source, NOW] = sources[source, TIME] = now
                sources[source, RECORD], sources[source, SIZE] = record, n
                if len(shifts[2]):
                    sources[source, TIME] = corrected(now, shifts, source)
                return True
            sources[source, N_DAMAGED] += n == _DAMAGED
        page = int(sources[source, NEXT_PAGE])
        if page >= sources[source, PAGES_END]:
            return False
        start, n_bytes, n_lost = page_start(int64_at, page, shape)
        sources[source, NEXT_PAGE] = page + shape[0]
        sources[source, N_DAMAGED] += start < 0
        if n_lost:
            is_counted = n_lost > 0 and sources[source, N_LOST] >= 0
            sources[source, N_LOST] = sources[source, N_LOST] + n_lost if is_counted else -1
        sources[source, NOW], sources[source, AT] = start, page + shape[1]
        is_empty = start < 0 or n_bytes < _LEAST_BYTES
        sources[source, DATA_END] = page + shape[1] + (0 if is_empty else n_bytes)


def corrected(timestamp: int, shifts: Shifts, source: int) -> int:
    """Return a guest CPU's timestamp as the host's clock would have shown it.

    Between two corrections the one before holds, or a line from it to the next, as the
    recording says (trace-cmd, lib/trace-cmd/trace-input.c, timestamp_host_sync).
    """
    firsts, interpolates, time, offset, factor, fraction = shifts
    first, n = int(firsts[source]), int(firsts[source + 1] - firsts[source])
    if n == 0:
        return timestamp
    guest = np.uint64(timestamp)
    if n == 1:
        return _signed(guest + np.uint64(offset[first]))
    low = first
    while low + 2 < first + n and time[low + 1] <= guest:
        low += 1
    moved = offset[low]
    if interpolates[source]:
        delta = np.int64(time[low + 1] - time[low])
        rise = np.int64(guest - time[low]) * (offset[low + 1] - offset[low]) + delta // 2
        whole = abs(rise) // max(delta, np.int64(1))
        moved = moved + (whole if rise >= 0 else -whole)
    return _signed((guest * factor[low] >> fraction[low]) + np.uint64(moved))


def _signed(timestamp: np.uint64) -> int:
    return int(np.int64(timestamp)) if timestamp < np.uint64(FAR) else FAR


Columns = tuple[I64Array, I64Array, I32Array, I32Array, I8Array, I32Array, I32Array, I64Array]
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
    threads: tuple[BoolArray, I32Array],
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
            fields (records.layouts).
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
