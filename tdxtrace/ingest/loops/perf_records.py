"""Queue the samples of perf.data records, and copy them to rows in time order.

Input is ``int64_at``, the 64-bit number at each byte (records.layouts.int64_at).  Layouts: Linux
include/uapi/linux/perf_event.h, PERF_RECORD_SAMPLE.
"""

from __future__ import annotations

from typing import Any, Final

from numpy.typing import NDArray

from tdxtrace.ingest.batch import MAX_CPUS, I64Array
from tdxtrace.ingest.loops.pages import (
    EVENT,
    FIELDS_END,
    FIRST_FIELD,
    LINE,
    MAX_ROW_WORDS,
    MIN_BYTES,
    N_SHORT,
    SHORT_LINE,
    SLOTS,
    CommonFields,
    N,
    context,
    event_number,
    read_fields,
    record_thread,
)

# Why queue_samples stopped: at the end of the block, or before a record that the caller must
# handle (TRACING_DATA and the like, cut off, or damaged); the output is full; before the first
# sample; before a sample of an event that is not interned yet.
END, FULL, FIRST_SAMPLE, NEW_EVENT = range(4)
# Columns of sample layouts: bytes of the parts of fixed size; offsets of time, thread and CPU from
# the end of the header, -1: absent; whether the tracepoint's record is there; words that READ adds,
# and words per item counted by its first word; whether there is a call chain.
FIXED, TIME, THREAD, CPU, RAW, READ_WORDS, READ_EACH, CALLCHAIN = range(8)
# Columns of queued samples: CPU; process ID (low half) and thread ID; layout and state; first word.
ON_CPU, PID_TID, LAYOUT_STATE, FIRST_WORD, N_COLUMNS = range(5)
# State of a sample: 1 + in_irq if it becomes a row (0: context unknown), or NO_ROW or TOO_SHORT.
STATE_BITS: Final = 3
NO_ROW, TOO_SHORT = 3, 4

_SAMPLE: Final = 9  # PERF_RECORD_SAMPLE
# Records followed by raw data, or with compressed contents; enum perf_user_event_type,
# tools/perf/lib/include/perf/event.h.
TRACING_DATA, AUXTRACE, COMPRESSED, COMPRESSED2 = 66, 71, 81, 83
_HEADER: Final = 8
_LOW: Final = 0xFFFF_FFFF
_MAX_TIME: Final = (1 << 63) - 1
SIGN: Final = -(1 << 63)

Arrays = tuple[NDArray[Any], ...]
Shape = tuple[int, int, int, int, int, int]
"""A row of sample layouts: columns FIXED to RAW, and the sum of the rest, 0 if READ and CALLCHAIN
add nothing."""


def queue_samples(
    int64_at: I64Array,
    at: int,
    n_bytes: int,
    samples: tuple[Any, ...],
    events: tuple[Any, ...],
    queue: Arrays,
    sideband: Arrays,
    n: int,
    n_words: int,
    newest: int,
) -> tuple[int, int, int, int, int, int, int]:
    """Walk the records of a block; append samples to the queue, with fields if they become rows.

    Args:
        int64_at: The 64-bit number at each byte of a block that ends with records.layouts.PADDING.
        at: The byte at which a record begins.
        n_bytes: The byte at which the block's records end.
        samples: The table of sample layouts, empty before the first sample; by attribute, its row
            in that table; offset of a sample's ID from the end of the header (-1: none), the IDs
            with their sign flipped, ascending, and the attribute of each; by attribute, the
            layout of samples without a record.
        events: Common fields (loops.pages.CommonFields); number of bytes up to the end of the
            event ID; by event ID, its layout, or -1: not interned; and the tables of layouts and
            of fields (records.layouts).
        queue: Filled: time in ns of samples; N_COLUMNS columns; the words of their fields.
        sideband: Filled, for each record that is not a sample: its byte, and ``newest`` there.
        n: Number of queued samples.
        n_words: Number of words of their fields.
        newest: Time of the newest sample so far.

    Returns:
        Why it stopped; for NEW_EVENT the byte of the record in the sample; the byte at which it
        stopped; the new ``n`` and ``n_words``; the number of other records; the new ``newest``.
    """
    table, row_of_attr, attr_ids, _ = samples
    common, _, _, layouts, fields = events
    times, columns, words = queue
    n_sideband, row, shape_row = 0, 0, -1
    shape = (0, -1, -1, -1, 0, 0)
    while at + _HEADER <= n_bytes:
        header = int(int64_at[at])
        kind, stop, body = header & _LOW, at + ((header >> 48) & 0xFFFF), at + _HEADER
        if stop < body or stop > n_bytes:
            break
        if kind in (TRACING_DATA, AUXTRACE, COMPRESSED, COMPRESSED2):
            break
        is_full = n == len(times) or n_words + MAX_ROW_WORDS > len(words)
        if is_full or n_sideband == len(sideband[0]):
            return FULL, 0, at, n, n_words, n_sideband, newest
        if kind != _SAMPLE:
            sideband[0][n_sideband], sideband[1][n_sideband] = at, newest
            at, n_sideband = stop, n_sideband + 1
            continue
        if len(table) == 0:
            return FIRST_SAMPLE, 0, at, n, n_words, n_sideband, newest
        if len(table) > 1:
            row = int(row_of_attr[_attr_of(int64_at, body, stop, attr_ids)])
        if row != shape_row:
            shape, shape_row = _shape(table, row), row
        time, pid_tid, cpu = _time_and_ids(int64_at, body, stop, shape)
        record, n_record = _record(int64_at, body, stop, shape, table, row)
        layout = _layout(int64_at, body, stop, record, n_record, samples, events)
        if layout < 0:
            return NEW_EVENT, record, at, n, n_words, n_sideband, newest
        state = _state(int64_at, record, n_record, common, int(layouts[layout, MIN_BYTES]))
        times[n], columns[n, ON_CPU], columns[n, PID_TID] = time, cpu, pid_tid
        columns[n, LAYOUT_STATE], columns[n, FIRST_WORD] = (layout << STATE_BITS) | state, n_words
        if state < NO_ROW:
            first, fields_end = int(layouts[layout, FIRST_FIELD]), int(layouts[layout, FIELDS_END])
            n_words = read_fields(int64_at, record, first, fields_end, fields, words, n_words)
        at, n, newest = stop, n + 1, max(newest, time)
    return END, 0, at, n, n_words, n_sideband, newest


def _shape(table: I64Array, row: int) -> Shape:
    """Return a row of the table of sample layouts, with its last columns summed."""
    return (
        int(table[row, FIXED]),
        int(table[row, TIME]),
        int(table[row, THREAD]),
        int(table[row, CPU]),
        int(table[row, RAW]),
        int(table[row, READ_WORDS]) + int(table[row, CALLCHAIN]),
    )


def _time_and_ids(int64_at: I64Array, body: int, stop: int, shape: Shape) -> tuple[int, int, int]:
    """Return a sample's time, process and thread in one word, and CPU; 0, -1, -1 if too short."""
    fixed, time_at, thread_at, cpu_at, _, _ = shape
    time, pid_tid, cpu = 0, -1, -1
    if body + fixed <= stop:
        if time_at >= 0:
            time = int(int64_at[body + time_at])
            if time < 0:
                time = _MAX_TIME
        if thread_at >= 0:
            pid_tid = int(int64_at[body + thread_at])
        if cpu_at >= 0:
            cpu = int(int64_at[body + cpu_at]) & _LOW
            if cpu >= MAX_CPUS:
                cpu = -1
    return time, pid_tid, cpu


def _record(
    int64_at: I64Array, body: int, stop: int, shape: Shape, table: I64Array, row: int
) -> tuple[int, int]:
    """Return first byte and size of a sample's record; size 0 if it is absent or cut off."""
    at, n_bytes = body + shape[0], 0
    if shape[4] and at <= stop:
        if shape[5]:
            at = _end_of_varying(int64_at, at, stop, table, row)
        if at + 4 <= stop:
            n_bytes = int(int64_at[at]) & _LOW
        if at + 4 + n_bytes > stop:
            n_bytes = 0
    return at + 4, n_bytes


def _state(
    int64_at: I64Array, record: int, n_bytes: int, common: CommonFields, min_bytes: int
) -> int:
    """Return the state of a sample; ``min_bytes`` is the bytes its layout needs, -1: no rows."""
    if n_bytes < min_bytes:
        return TOO_SHORT
    if min_bytes < 0:
        return NO_ROW
    return context(int64_at, record, common)[1] + 1


def _layout(
    int64_at: I64Array,
    body: int,
    stop: int,
    record: int,
    n_bytes: int,
    samples: tuple[Any, ...],
    events: tuple[Any, ...],
) -> int:
    """Return the layout for a sample's record; -1: its event is not interned."""
    _, _, attr_ids, no_record = samples
    common, n_type_bytes, index, _, _ = events
    if n_bytes < n_type_bytes:
        return int(no_record[_attr_of(int64_at, body, stop, attr_ids)])
    return int(index[event_number(int64_at, record, common)])


def _attr_of(int64_at: I64Array, body: int, stop: int, attr_ids: tuple[Any, ...]) -> int:
    """Return the attribute of a sample: that of the first ID not below the sample's ID.

    Samples without an ID get the first attribute.  If a sample is too short for its ID, its header
    is used as the ID.
    """
    id_at, ids, attr_of_id = attr_ids
    if id_at < 0:
        return 0
    sample_id = int(int64_at[body + id_at if body + id_at + 8 <= stop else body - _HEADER]) ^ SIGN
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) >> 1
        if int(ids[middle]) < sample_id:
            low = middle + 1
        else:
            high = middle
    return int(attr_of_id[low])


def _end_of_varying(int64_at: I64Array, at: int, stop: int, table: I64Array, row: int) -> int:
    """Return the byte after the READ and CALLCHAIN parts that begin at ``at``, at most ``stop``."""
    each = int(table[row, READ_EACH])
    if each:
        at += 8 * each * _read_count(int64_at, at, stop)
    at += 8 * int(table[row, READ_WORDS])
    if table[row, CALLCHAIN]:
        at += 8 * (1 + _read_count(int64_at, at, stop))
    return min(at, stop)


def _read_count(int64_at: I64Array, at: int, stop: int) -> int:
    """Return the count at ``at``, limited to the number of words left."""
    if at + 8 > stop:
        return 0
    n, n_left = int(int64_at[at]), (stop - at) >> 3
    return n_left if n < 0 or n > n_left else n


_STATE = (1 << STATE_BITS) - 1
_HIGH_BIT = 1 << 31


def copy_in_order(
    order: I64Array,
    n_before: int,
    queue: Arrays,
    layouts: I64Array,
    counts: I64Array,
    spans: Arrays,
    threads: Arrays,
    rows: Arrays,
    words: I64Array,
) -> tuple[int, int, int]:
    """Copy queued samples to rows in time order, and count them.

    Args:
        order: Indexes of the samples in ``queue``, by time.
        n_before: Number of samples taken before.
        queue: As queue_samples fills it.
        layouts: The table of layouts (records.layouts).
        counts: By layout, the columns of EventCatalog.count; changed.
        spans: Times in ns of the first and the last sample, by CPU, and at index MAX_CPUS of all
            CPUs; changed.
        threads: By thread ID, whether the thread was seen; filled: threads of rows that were not
            seen before (IDs beyond the array's end more than once), and the first row of each.
        rows: Filled, one entry per row: line, ts_ns, tid, tgid, cpu, in_irq, event, layout and
            first word, as in batch.RecordBatch.
        words: Filled with their fields; must have room for all words in ``queue``.

    Returns:
        The number of rows, words and threads.
    """
    times, columns, queued = queue
    first_ns, last_ns = spans
    is_known, tids, first_row = threads
    line_out, ts_out, tid_out, tgid_out, cpu_out, irq_out, event_out, layout_out, word_out = rows
    n, n_words, n_threads = 0, 0, 0
    line = n_before
    for k in range(len(order)):
        i = order[k]
        line += 1
        ts_ns, cpu = int(times[i]), int(columns[i, ON_CPU])
        layout_state = int(columns[i, LAYOUT_STATE])
        layout, state = layout_state >> STATE_BITS, layout_state & _STATE
        _count(counts, layout, N, LINE, line)
        if state == TOO_SHORT:
            _count(counts, layout, N_SHORT, SHORT_LINE, line)
        if cpu >= 0:
            first_ns[cpu] = min(first_ns[cpu], ts_ns)
            last_ns[cpu] = max(last_ns[cpu], ts_ns)
        if state >= NO_ROW:
            continue
        pid_tid, word = int(columns[i, PID_TID]), int(columns[i, FIRST_WORD])
        tid = pid_tid >> 32
        n_known, n_threads = n_threads, record_thread(tid, is_known, tids, n_threads)
        if n_threads > n_known:
            first_row[n_known] = n
        line_out[n], ts_out[n], cpu_out[n], irq_out[n] = line, ts_ns, cpu, state - 1
        tid_out[n], tgid_out[n] = tid, ((pid_tid & _LOW) ^ _HIGH_BIT) - _HIGH_BIT
        event_out[n], layout_out[n] = layouts[layout, EVENT], layouts[layout, SLOTS]
        word_out[n] = n_words
        words_end = word + int(layouts[layout, FIELDS_END]) - int(layouts[layout, FIRST_FIELD])
        for source in range(word, words_end):
            words[n_words] = queued[source]
            n_words += 1
        n += 1
    if len(order):
        first_ns[MAX_CPUS] = min(first_ns[MAX_CPUS], times[order[0]])
        last_ns[MAX_CPUS] = max(last_ns[MAX_CPUS], times[order[len(order) - 1]])
    return n, n_words, n_threads


def _count(counts: I64Array, layout: int, n: int, first_line: int, line: int) -> None:
    """Increment column ``n`` of a layout; set column ``first_line`` at the first increment."""
    if counts[layout, n] == 0:
        counts[layout, first_line] = line
    counts[layout, n] += 1


def drop_until(limit: int, n: int, queue: Arrays, layouts: I64Array) -> tuple[int, int]:
    """Remove samples up to ``limit`` from the queue; the others keep their order.

    Args:
        limit: Time in ns, inclusive.
        n: Number of queued samples.
        queue: As queue_samples fills it; changed.
        layouts: The table of layouts (records.layouts).

    Returns:
        The number of samples left, and the number of their words.
    """
    times, columns, words = queue
    left, n_words = 0, 0
    for i in range(n):
        if times[i] <= limit:
            continue
        layout_state, word = int(columns[i, LAYOUT_STATE]), int(columns[i, FIRST_WORD])
        times[left] = times[i]
        for column in range(N_COLUMNS - 1):
            columns[left, column] = columns[i, column]
        columns[left, FIRST_WORD] = n_words
        left += 1
        if layout_state & _STATE < NO_ROW:
            layout = layout_state >> STATE_BITS
            words_end = word + int(layouts[layout, FIELDS_END]) - int(layouts[layout, FIRST_FIELD])
            for source in range(word, words_end):
                words[n_words] = words[source]
                n_words += 1
    return left, n_words
