"""Samples that waited come out in order of time, as rows; what is younger goes on waiting."""

from __future__ import annotations

from tdxtrace.ingest.loops.fields import BEHIND, EVENT, FIRST, SLOTS, I64Array, record_thread
from tdxtrace.ingest.loops.merge import LINE, N_SHORT, SHORT_LINE, N
from tdxtrace.ingest.loops.perf_records import (
    FIRST_WORD,
    MAX_CPUS,
    N_COLUMNS,
    NO_ROW,
    ON_CPU,
    STATE_BITS,
    TOO_SHORT,
    WHAT,
    WHO,
    Arrays,
)

_STATE = (1 << STATE_BITS) - 1
_LOW = 0xFFFF_FFFF
_HIGH_BIT = 1 << 31


def take_in_order(
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
    """Copy samples to where rows are made of them, and count them.

    Args:
        order: Places of the samples in ``queue``, by time.
        n_before: Samples before these.
        queue: As perf_records.queue_samples fills it.
        layouts: The table of layouts (records.fields).
        counts: By layout, the columns of EventCatalog.count; changed.
        spans: By CPU and, at MAX_CPUS, of all: times in ns of the first and the last sample.
        threads: By number, whether a thread was met; filled: the threads of rows that were not
            (those without a place there more than once), and the first row of each.
        rows: Filled, one entry a row: line, ts_ns, tid, tgid, cpu, in_irq, event, layout and
            first word, as in batch.RecordBatch.
        words: Filled with their fields; with room for all words in ``queue``.

    Returns:
        How many rows, words and threads.
    """
    times, columns, queued = queue
    first_ns, last_ns = spans
    is_met, tids, first_row = threads
    line_out, ts_out, tid_out, tgid_out, cpu_out, irq_out, event_out, layout_out, word_out = rows
    n, n_words, n_threads = 0, 0, 0
    line = n_before
    for k in range(len(order)):
        i = order[k]
        line += 1
        ts_ns, cpu, what = int(times[i]), int(columns[i, ON_CPU]), int(columns[i, WHAT])
        layout, state = what >> STATE_BITS, what & _STATE
        _count(counts, layout, N, LINE, line)
        if state == TOO_SHORT:
            _count(counts, layout, N_SHORT, SHORT_LINE, line)
        if cpu >= 0:
            first_ns[cpu] = min(first_ns[cpu], ts_ns)
            last_ns[cpu] = max(last_ns[cpu], ts_ns)
        if state >= NO_ROW:
            continue
        who, word = int(columns[i, WHO]), int(columns[i, FIRST_WORD])
        tid = who >> 32
        n_known, n_threads = n_threads, record_thread(tid, is_met, tids, n_threads)
        if n_threads > n_known:
            first_row[n_known] = n
        line_out[n], ts_out[n], cpu_out[n], irq_out[n] = line, ts_ns, cpu, state - 1
        tid_out[n], tgid_out[n] = tid, ((who & _LOW) ^ _HIGH_BIT) - _HIGH_BIT
        event_out[n], layout_out[n] = layouts[layout, EVENT], layouts[layout, SLOTS]
        word_out[n] = n_words
        behind = word + int(layouts[layout, BEHIND]) - int(layouts[layout, FIRST])
        for source in range(word, behind):
            words[n_words] = queued[source]
            n_words += 1
        n += 1
    if len(order):
        first_ns[MAX_CPUS] = min(first_ns[MAX_CPUS], times[order[0]])
        last_ns[MAX_CPUS] = max(last_ns[MAX_CPUS], times[order[len(order) - 1]])
    return n, n_words, n_threads


def _count(counts: I64Array, layout: int, n: int, first_line: int, line: int) -> None:
    """Raise the column ``n`` of a layout by 1; fill ``first_line`` with the first of them."""
    if counts[layout, n] == 0:
        counts[layout, first_line] = line
    counts[layout, n] += 1


def drop_until(limit: int, n: int, queue: Arrays, layouts: I64Array) -> tuple[int, int]:
    """Drop samples up to ``limit``; the others move up, in the order in which they came.

    Args:
        limit: Time in ns.
        n: Samples that wait.
        queue: As perf_records.queue_samples fills it; changed.
        layouts: The table of layouts (records.fields).

    Returns:
        How many samples wait then, and how many words they have.
    """
    times, columns, words = queue
    left, n_words = 0, 0
    for i in range(n):
        if times[i] <= limit:
            continue
        what, word = int(columns[i, WHAT]), int(columns[i, FIRST_WORD])
        times[left] = times[i]
        for column in range(N_COLUMNS - 1):
            columns[left, column] = columns[i, column]
        columns[left, FIRST_WORD] = n_words
        left += 1
        if what & _STATE < NO_ROW:
            layout = what >> STATE_BITS
            behind = word + int(layouts[layout, BEHIND]) - int(layouts[layout, FIRST])
            for source in range(word, behind):
                words[n_words] = words[source]
                n_words += 1
    return left, n_words
