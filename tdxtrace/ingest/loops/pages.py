"""From one event of a CPU's ring-buffer pages to the next: when it was, where its record is.

A page is a header, the time at which it begins and the length of its data, and records, each of
which says how much later than the one before it was.  Linux include/linux/ring_buffer.h and
kernel/trace/ring_buffer.c; of 64-bit little-endian machines.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

I64Array = NDArray[np.int64]
U64Array = NDArray[np.uint64]
PageShape = tuple[int, int, int]
"""Bytes of a page, and where on it its events begin, and the length of its data is."""
Shifts = tuple[I64Array, I64Array, U64Array, I64Array, U64Array, U64Array]
"""Corrections of clocks (tracedat.clocks.shifts_of): by source and one more, its first; by
source, whether to interpolate; and by correction its time, offset, factor, and binary fraction."""

# Columns of the table of sources, each a CPU's buffer: the byte of its next page and of the end
# of the pages that are in memory; of its next record and of the end of its page's data; the
# clock there.  Of the event that was found: its time, its record's first byte or -1 if none
# was found, and bytes.  Events lost before it (-1: an unknown number); times of the first and
# the last event before, -1: none; damaged pages and events so far; the number of its CPU, and
# whether its file has more pages.
(NEXT_PAGE, PAGES_END, AT, END, NOW, TIME, RECORD, SIZE, N_LOST) = range(9)
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
        at, end = int(sources[source, AT]), int(sources[source, END])
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
        sources[source, END] = page + shape[1] + (0 if is_empty else n_bytes)


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
