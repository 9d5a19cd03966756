"""Parse ring-buffer pages and merge the events of all CPUs by time.

A page is a header (its start time and the length of its data) followed by records, each with the
time since the record before it.  Linux include/linux/ring_buffer.h and
kernel/trace/ring_buffer.c; pages of 64-bit little-endian machines only.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tdxtrace.ingest.batch import BoolArray, I8Array, I32Array, I64Array, U64Array

CommonFields = tuple[int, int, int, int, int]
"""Byte offsets of the common fields of records: event ID and its mask, thread ID, flags, preempt
count; -1 for a field that the records lack."""

# Columns of the table of layouts and of the table of fields: see records.layouts.FieldTables.
FIRST_FIELD, FIELDS_END, MIN_BYTES, EVENT, SLOTS = range(5)
OFFSET, MASK, SIGN = range(3)

# enum trace_flag_type, Linux include/linux/trace_events.h: HARDIRQ and NMI.
_IN_IRQ: Final = 0x08 | 0x40
_NO_CONTEXT: Final = 0xFF  # preempt count of uprobe events: the context is unknown
_LOW: Final = 0xFFFF_FFFF
_SIGN: Final = 1 << 31
_UNKNOWN: Final = -1


def event_number(int64_at: I64Array, record: int, common: CommonFields) -> int:
    """Return the event ID of the record at byte ``record``."""
    return int(int64_at[record + common[0]]) & common[1]


def context(int64_at: I64Array, record: int, common: CommonFields) -> tuple[int, int]:
    """Return the thread ID of a record, and 1 if in hard interrupt context, else 0; -1: unknown."""
    tid, in_irq = _UNKNOWN, _UNKNOWN
    if common[2] >= 0:
        tid = ((int(int64_at[record + common[2]]) & _LOW) ^ _SIGN) - _SIGN
    if common[3] >= 0:
        in_irq = 1 if int(int64_at[record + common[3]]) & _IN_IRQ else 0
        if common[4] >= 0 and int(int64_at[record + common[4]]) & 0xFF == _NO_CONTEXT:
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
    """Append a record's fields to ``words``; return the new number of words.

    Args:
        int64_at: The 64-bit number at each byte.
        record: The byte at which the record begins.
        first: Row in ``fields`` of the first field of its layout.
        end: Row after the last one.
        fields: By field: OFFSET in bytes, MASK, and SIGN bit; 0: unsigned.
        words: Filled; must have room for the fields.
        n_words: Number of words before the call.
    """
    for field in range(first, end):
        word = int64_at[record + fields[field, OFFSET]] & fields[field, MASK]
        sign = fields[field, SIGN]
        words[n_words] = (word ^ sign) - sign
        n_words += 1
    return n_words


def record_thread(tid: int, is_known: BoolArray, new_threads: I32Array, n_new: int) -> int:
    """Append a thread to ``new_threads`` unless it is known; return the new number of threads.

    ``is_known`` is indexed by thread ID; IDs beyond its end are appended each time they occur.
    """
    if 0 <= tid < len(is_known):
        if is_known[tid]:
            return n_new
        is_known[tid] = True
    new_threads[n_new] = tid
    return n_new + 1


PageShape = tuple[int, int, int]
"""Size of a page, offset of its first record, and offset of the length of its data; in bytes."""
Shifts = tuple[I64Array, I64Array, U64Array, I64Array, U64Array, U64Array]
"""Clock corrections (tracedat.options.shifts_of): index of the first one by source, with one entry
more than sources; whether to interpolate, by source; and by correction its time, offset, factor,
and number of binary fraction digits of the factor."""

# Columns of the table of sources; a source is the buffer of one CPU.  Bytes of its next page, of
# the end of its pages in memory, of its next record, and of the end of the data of its current
# page; the clock at the next record.  Of the pending event: its time, the first byte of its record
# (-1: no pending event), its size in bytes, and the number of events lost before it (-1: unknown).
# Times of the first and the last event returned so far (-1: none); number of damaged pages and of
# events so far; CPU number; whether its file has more pages.
(NEXT_PAGE, PAGES_END, AT, DATA_END, NOW, TIME, RECORD, SIZE, N_LOST) = range(9)
(FIRST_TIME, LAST_TIME, N_DAMAGED, N_EVENTS, CPU, HAS_MORE, N_COLUMNS) = range(9, 16)

MAX_TIME: Final = (1 << 63) - 1
"""Times from here on are treated as damage, as they would overflow."""
# enum ring_buffer_type: 1 to 28 is the record's length in 32-bit words; 0: the length is in its
# first word.
_PADDING: Final = 29
_TIME_EXTEND: Final = 30
_TIME_STAMP: Final = 31
_TYPE_MASK: Final = 31
_TYPE_BITS: Final = 5
_DELTA_BITS: Final = 27
_DELTA_MASK: Final = (1 << _DELTA_BITS) - 1
_WORD_MASK: Final = (1 << 32) - 1
# An absolute timestamp has 59 bits; its high bits are those of the previous time (rb_fix_abs_ts).
_TIMESTAMP_BITS: Final = 59
_TIMESTAMP_MASK: Final = (1 << _TIMESTAMP_BITS) - 1
# Flags in the word with the length of a page's data: events were lost before the page; their
# number follows the data.
_MISSED_EVENTS: Final = 1 << 31
_MISSED_STORED: Final = 1 << 30
_COMMIT_MASK: Final = (1 << 27) - 1  # libtraceevent src/kbuffer-parse.c, COMMIT_MASK
# The shortest record is a header and one word.
_MIN_RECORD_BYTES: Final = 8
_NONE: Final = -1
_DAMAGED: Final = -2


def page_start(int64_at: I64Array, page: int, shape: PageShape) -> tuple[int, int, int]:
    """Read the header of the page at byte ``page``.

    Returns:
        Its start time in the clock's unit, -1 if it is not a valid page; bytes of its data; and
        the number of events lost before it, -1: unknown.
    """
    page_size, data, commit_at = shape
    start, commit = int(int64_at[page]), int(int64_at[page + commit_at])
    n_bytes, capacity, n_lost = commit & _COMMIT_MASK, page_size - data, 0
    if start < 0 or start >= MAX_TIME or n_bytes > capacity:
        start = -1
    if commit & _MISSED_EVENTS:
        n_lost = -1
        if commit & _MISSED_STORED and n_bytes + 8 <= capacity and n_bytes % 4 == 0 and start >= 0:
            n = int(int64_at[page + data + n_bytes]) & _WORD_MASK
            n_lost = n if n > 0 else -1
    return start, n_bytes, n_lost


def next_record(int64_at: I64Array, at: int, end: int, now: int) -> tuple[int, int, int, int]:
    """Find the next event of a page.

    Time extends, absolute timestamps and padding advance the clock or the position only.

    Args:
        int64_at: The 64-bit number at each byte.
        at: The byte at which the next record begins.
        end: The byte at which the page's data ends.
        now: The clock at ``at``.

    Returns:
        Byte and clock after the event, the first byte of its record, and the record's size in
        bytes: _NONE at the end of the page, _DAMAGED at an invalid record.
    """
    while at < end:
        header = int(int64_at[at])
        kind, delta = header & _TYPE_MASK, header >> _TYPE_BITS & _DELTA_MASK
        if 0 < kind < _PADDING:
            next_at = at + 4 + 4 * kind
            if next_at > end:
                break
            return next_at, _later(now, delta), at + 4, 4 * kind
        word = header >> 32 & _WORD_MASK
        if kind == _PADDING and delta == 0:
            return end, now, at, _NONE  # the unused rest of the page
        next_at = at + (8 if kind >= _TIME_EXTEND else 4 + ((word + 3) & ~3))
        if next_at > end or (kind < _TIME_EXTEND and word < 4):
            break
        if kind == _TIME_STAMP:
            full = (delta | word << _DELTA_BITS) + (now & ~_TIMESTAMP_MASK)
            now = full if full >= now else _later(full, _TIMESTAMP_MASK + 1)
        else:
            now = _later(now, delta | word << _DELTA_BITS if kind == _TIME_EXTEND else delta)
        if kind == 0:
            return next_at, now, at + 8, word - 4
        at = next_at
    return end, now, at, _DAMAGED if at < end else _NONE


def _later(now: int, delta: int) -> int:
    return now + delta if now <= MAX_TIME - delta else MAX_TIME


def next_event(
    int64_at: I64Array, shape: PageShape, shifts: Shifts, sources: I64Array, source: int
) -> bool:
    """Find the next event of a source; return False if its pages in memory hold no further one."""
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
        is_empty = start < 0 or n_bytes < _MIN_RECORD_BYTES
        sources[source, DATA_END] = page + shape[1] + (0 if is_empty else n_bytes)


def corrected(timestamp: int, shifts: Shifts, source: int) -> int:
    """Return a guest CPU's timestamp converted to the host's clock.

    Between two corrections the earlier one applies, or a linear interpolation of both, as the
    recording specifies (trace-cmd, lib/trace-cmd/trace-input.c, timestamp_host_sync).
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
    return int(np.int64(timestamp)) if timestamp < np.uint64(MAX_TIME) else MAX_TIME


Columns = tuple[I64Array, I64Array, I32Array, I32Array, I8Array, I32Array, I32Array, I64Array]
"""Columns of a RecordBatch: line, ts_ns, tid, cpu, in_irq, event, layout, first_word; one entry
per row."""
Done = tuple[int, int, int, int, int, int]
"""Number of sources that may have further events, and of events so far; of rows, their words, gaps
and threads in the batch."""

# Why the loop ended: no event is left; the first source of ``order`` needs further pages; its
# event ID has no layout yet; the output is full.
END, NEEDS_PAGES, NEEDS_LAYOUT, FULL = range(4)
MAX_ROW_WORDS: Final = 64
"""Free words required for another row: more than there are slots in batch.SLOTS."""
# Columns of the gaps: index of the source, events lost, time of its last event before the gap or
# -1, time of the first one after it, and the line of the latter.
GAP_COLUMNS: Final = 5
# Columns of the counts: see EventCatalog.count.
N, LINE, N_SHORT, SHORT_LINE, N_COUNTS = range(5)


def merge(
    int64_at: I64Array,
    shapes: tuple[PageShape, CommonFields, Shifts],
    sources: I64Array,
    order: I64Array,
    catalog: tuple[I64Array, I64Array, I64Array],
    into: tuple[Columns, I64Array, I64Array, I64Array],
    threads: tuple[BoolArray, I32Array],
    done: Done,
) -> tuple[int, Done]:
    """Merge the events of all sources by time, ties by source; write rows of those with a table.

    Events of one source keep their order, even if a damaged page makes its time go backwards.

    Args:
        int64_at: The 64-bit number at each byte of the pages in memory.
        shapes: Layout of pages and of common fields, and clock corrections.
        sources: By source, the columns that this module names; changed.
        order: The sources that may have further events, as a heap by the time of their next
            event; changed.
        catalog: By event ID its layout, negative if it has none; and the tables of layouts and of
            fields (records.layouts).
        into: Filled: columns and words of the rows, gaps, and counts by layout.
        threads: Whether a thread is known, by thread ID up to the array's length; filled: threads
            that were not.
        done: Counts before the call.

    Returns:
        Why the loop ended, and the counts after the call.
    """
    shape, common, shifts = shapes
    number_to_layout, layouts, fields = catalog
    columns, words, gaps, counts = into
    max_rows, max_words, max_gaps = len(columns[0]), len(words) - MAX_ROW_WORDS, len(gaps)
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
            _sift_down(order, n_sources, sources)
            continue
        layout = int(number_to_layout[event_number(int64_at, record, common)])
        if layout < 0:
            return NEEDS_LAYOUT, (n_sources, n_events, n_rows, n_words, n_gaps, n_threads)
        if n_rows == max_rows or n_words > max_words or n_gaps == max_gaps:
            return FULL, (n_sources, n_events, n_rows, n_words, n_gaps, n_threads)
        n_events += 1
        n_gaps = _take_event(sources, source, n_events, gaps, n_gaps)
        if not _count(counts, layout, n_events, int(sources[source, SIZE]), layouts):
            continue
        tid, in_irq = context(int64_at, record, common)
        n_threads = record_thread(tid, threads[0], threads[1], n_threads)
        _write(columns, n_rows, n_events, sources, source, tid, in_irq, layouts, layout, n_words)
        first, fields_end = int(layouts[layout, FIRST_FIELD]), int(layouts[layout, FIELDS_END])
        n_words = read_fields(int64_at, record, first, fields_end, fields, words, n_words)
        n_rows += 1
    return END, (n_sources, n_events, n_rows, n_words, n_gaps, n_threads)


def _sift_down(order: I64Array, n: int, sources: I64Array) -> None:
    """Restore the heap order after the time of its first source grew (sift down)."""
    if n < 2:
        return
    index, moving = 0, int(order[0])
    time = int(sources[moving, TIME])
    while 2 * index + 1 < n:
        child = 2 * index + 1
        other = int(order[child])
        other_time = int(sources[other, TIME])
        if child + 1 < n:
            right = int(order[child + 1])
            right_time = int(sources[right, TIME])
            if right_time < other_time or (right_time == other_time and right < other):
                child, other, other_time = child + 1, right, right_time
        if time < other_time or (time == other_time and moving < other):
            break
        order[index] = other
        index = child
    order[index] = moving


def _take_event(sources: I64Array, source: int, line: int, gaps: I64Array, n_gaps: int) -> int:
    """Mark the pending event of a source as returned; record the loss before it."""
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
    """Count a record of ``size`` bytes for its layout; return whether it becomes a row."""
    if counts[layout, N] == 0:
        counts[layout, LINE] = line
    counts[layout, N] += 1
    min_bytes = layouts[layout, MIN_BYTES]
    if size >= min_bytes:
        return bool(min_bytes >= 0)
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
