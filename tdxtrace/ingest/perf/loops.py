"""The loops over the records and samples of a large perf.data, compiled.

Imported only where compiled.pays says so.  No loop checks bounds; each says in its
docstring what keeps it inside its arrays.  Words are signed here: numba makes floats
of mixed signs.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.compiled import compiled, inlined
from tdxtrace.ingest.perf import chain
from tdxtrace.ingest.raw import I64Array

# What a row of the table of sample layouts says; offsets from a sample's first byte
# behind its header, -1 for what it has not.
FIXED, TIME, THREAD, CPU, RAW, VARIES, READ_WORDS, READ_EACH, CHAIN = range(9)
# Where samples wait, each takes some words: its event's number and CPU; then, if it becomes
# a row, its layout and whether it was an interrupt's, its thread and process, and its record;
# else -1.  Words of one without its record, and of one that is no row:
HEAD, BARE = 3, 2
# Words that may be written behind a record: to copy four at a time costs less than a
# loop of few.
SLACK = 4
MAX_CPUS: Final = 8192  # tally.MAX_CPUS
LOW: Final = 0xFFFFFFFF
_A, _B, _C, _D = chain.SPECIAL
_SAMPLE: Final = 9  # PERF_RECORD_SAMPLE, Linux include/uapi/linux/perf_event.h
_IN_IRQ: Final = 0x08 | 0x40  # as known.KnownEvents.context
_FAR: Final = (1 << 63) - 1
PLACE: Final = (1 << 60) - 1
Columns = tuple[NDArray[Any], ...]


@compiled
def follow(longs: I64Array, n_bytes: int, start: I64Array, others: I64Array) -> tuple[int, ...]:
    """Follow the records from byte 0: as chain.follow does, of the machine's byte order.

    Args:
        longs: The block; a record's header is read only if 8 bytes of the ``n_bytes``
            are left, which ``longs`` must hold.
        n_bytes: How many bytes of it are records.
        start: Filled with the begin of each; no record is shorter than 8 bytes, so that
            it needs ``n_bytes // 8`` entries.
        others: Filled with the indices of those that are no samples; as long.

    Returns:
        How many records, how many others, where what was not followed begins, and
        whether a record stands there that cannot be one.
    """
    at, n, n_others, is_damaged = 0, 0, 0, 0
    while at + 8 <= n_bytes and at & 7 == 0:
        word = longs[at >> 3]
        size, kind = (word >> 48) & 0xFFFF, word & 0xFFFFFFFF
        if size < 8:
            is_damaged = 1
            break
        if at + size > n_bytes:
            break
        if kind != _SAMPLE:
            if kind in (_A, _B, _C, _D):
                break
            others[n_others] = n
            n_others += 1
        start[n] = at
        n += 1
        at += size
    return n, n_others, at, is_damaged


@compiled
def _id_word(body: int, id_at: int, stop: int) -> int:
    """The word that is a sample's id: its header, if it is too short for one."""
    return (body + id_at if body + id_at + 8 <= stop else body - 8) >> 3


@compiled
def _attr_of(wanted: int, ids: NDArray[np.uint64], attr_of_id: I64Array) -> int:
    """Whose a sample is: of the first of the sorted ``ids`` that is not below its id."""
    key = np.uint64(wanted)
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) >> 1
        if ids[middle] < key:
            low = middle + 1
        else:
            high = middle
    made: int = attr_of_id[low]
    return made


@compiled
def _raw_at(longs: I64Array, at: int, end: int, table: NDArray[np.int64], row: int) -> int:
    """Where a sample's record is counted: at most ``end``, as attrs.SampleLayout.raw_at finds."""
    if table[row, READ_EACH]:
        at += 8 * table[row, READ_EACH] * _count(longs, at, end)
    at += 8 * table[row, READ_WORDS]
    if table[row, CHAIN]:
        at += 8 * (1 + _count(longs, at, end))
    return at if at < end else end


@compiled
def _count(longs: I64Array, at: int, end: int) -> int:
    """The number at ``at``, at most as many words as are left."""
    if at + 8 > end:
        return 0
    n = longs[at >> 3]
    left = (end - at) >> 3
    return left if n < 0 or n > left else int(n)


@inlined
def _said(
    longs: I64Array, body: int, stop: int, table: NDArray[np.int64], row: int
) -> tuple[int, int, int, int, int]:
    """What a sample says of itself, and where its record is.

    When it was taken, its thread and process in one word, its CPU, the word in whose middle
    its record begins, and the record's bytes.
    """
    at, ts_ns, who, cpu, size = body + table[row, FIXED], 0, -1, -1, 0
    # One shorter than its fixed part says nothing.
    if at <= stop:
        if table[row, TIME] >= 0:
            ts_ns = longs[((body + table[row, TIME]) >> 3) & PLACE]
            ts_ns = _FAR if ts_ns < 0 else ts_ns
        if table[row, THREAD] >= 0:
            who = longs[((body + table[row, THREAD]) >> 3) & PLACE]
        if table[row, CPU] >= 0:
            cpu = longs[((body + table[row, CPU]) >> 3) & PLACE] & LOW
        if table[row, RAW]:
            if table[row, VARIES]:
                at = _raw_at(longs, at, stop, table, row)
            size = longs[(at >> 3) & PLACE] & LOW if at + 4 <= stop else 0
            size = size if at + 4 + size <= stop else 0
    return ts_ns, who, cpu if cpu < MAX_CPUS else -1, min(at, stop) >> 3, size


@inlined
def _put(
    longs: I64Array,
    said: tuple[int, int, int, int],
    known: Columns,
    places: tuple[int, int, int, int],
    store: I64Array,
    used: int,
) -> int:
    """Put a sample where it waits; return the words used then, -1 if something is not known.

    Of one without a record the size is -1 less its attribute.
    """
    who, cpu, word, n_bytes = said
    index, least, stand_in, silent = known
    shift, mask, flags_at, count_at = places
    word &= PLACE
    last = len(longs) - 1
    head = ((longs[word] >> 32) & LOW) | (longs[word + 1] << 32)
    number = (head >> shift) & mask if n_bytes >= 0 else silent[-1 - n_bytes]
    which = index[number] if number >= 0 else -1
    if which >= 0 and 0 <= n_bytes < least[which]:
        number = stand_in[which]
        which = index[number] if number >= 0 else -1
    if which < 0:
        return -1
    to = used & PLACE
    store[to], store[to + 1] = number << 32 | (cpu & LOW), -1
    if least[which] < 0:
        return to + BARE
    in_irq: Any = np.int64(((head >> max(flags_at, 0)) & _IN_IRQ) != 0)
    if flags_at < 0 or (count_at >= 0 and (head >> count_at) & 0xFF == 0xFF):
        in_irq = -1
    store[to + 1], store[to + 2] = (in_irq + 1) << 32 | which, who
    to += HEAD
    end: int = to + ((least[which] + 7) >> 3)
    while to < end:
        # Close to the block's end there may be no four words.
        a, b = longs[word + 1], longs[min(word + 2, last)]
        c, d = longs[min(word + 3, last)], longs[min(word + 4, last)]
        store[to] = head
        store[to + 1] = ((a >> 32) & LOW) | (b << 32)
        store[to + 2] = ((b >> 32) & LOW) | (c << 32)
        store[to + 3] = ((c >> 32) & LOW) | (d << 32)
        head = ((d >> 32) & LOW) | (longs[min(word + 5, last)] << 32)
        word, to = word + 4, to + 4
    return end


@compiled
def hold(
    longs: I64Array,
    records: tuple[Any, ...],
    shape: tuple[Any, ...],
    known: Columns,
    places: tuple[int, int, int, int],
    into: Columns,
    n: int,
    used: int,
    newest: I64Array,
) -> tuple[int, int, int]:
    """Put the samples of a block where they wait, those that become rows with their records.

    Args:
        longs: The block, 16 bytes longer than its records.
        records: Begin of each, a multiple of 8, as :func:`follow` finds; where the last
            one ends; and the indices of those that are no samples, ascending.
        shape: See pool.Shape.
        known: By number, its layout; by layout, the bytes its records must have, or -1
            if they are no rows; by layout, the number of those that are too short; by
            attribute, the number of samples that hold no record.  Negative: not known.
        places: Of the first eight bytes of a record: shift and mask of its event's
            number, shift of its flags and of its preempt count, -1 if it has none.
        into: Filled from ``n`` on: when each sample was taken, and where it is in the
            store; and, from ``used`` on, that store, with room for HEAD words for each
            sample, those of the block, and SLACK.
        n: Samples that wait.
        used: Words of the store that are used.
        newest: Filled for each other record with the moment of the newest sample in
            front of it, or -1, and behind these with that of all; one longer than they are.

    Returns:
        How many samples wait then, how many words are used, and how many of the samples of
        the block become rows; -1 words if there is one of which something is not known.
    """
    start, end, others = records
    table, layout_of, id_at, ids, attr_of_id, room = shape
    ts_out, place, store = into
    latest: Any = np.int64(-1)
    at_other, row, attr, n_rows = 0, 0, 0, 0
    for i in range(len(start)):
        if at_other < len(others) and others[at_other] == i:
            newest[at_other] = latest
            at_other += 1
            continue
        body, stop = start[i] + 8, end if i == len(start) - 1 else start[i + 1]
        if len(table) > 1:
            row = layout_of[_attr_of(longs[_id_word(body, id_at, stop)], ids, attr_of_id)]
        ts_ns, who, cpu, word, size = _said(longs, body, stop, table, row)
        if size < room:
            if id_at >= 0:
                attr = _attr_of(longs[_id_word(body, id_at, stop)], ids, attr_of_id)
            size = -1 - attr
        to = n & PLACE
        ts_out[to], place[to] = ts_ns, used
        used = _put(longs, (who, cpu, word, size), known, places, store, used)
        if used < 0:
            return n, -1, 0
        n_rows += store[(place[to] & PLACE) + 1] >= 0
        latest = max(latest, ts_ns)
        n += 1
    newest[at_other] = latest
    return n, used, n_rows
