"""Compiled loops over pages of little-endian machines: where events are, what heads them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.compiled import compiled
from tdxtrace.ingest.memory import roomy
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, I8Array, I32Array, I64Array, U64Array
from tdxtrace.ingest.records.formats import Common, PageLayout
from tdxtrace.ingest.records.gather import Block, Places
from tdxtrace.ingest.records.known import ByLayout
from tdxtrace.ingest.ring.pages import PageEvents, PageHeads

# As in pages.py, from Linux include/linux/ring_buffer.h and kernel/trace/ring_buffer.c.
_PADDING: Final = 29
_TIME_EXTEND: Final = 30
_TIME_STAMP: Final = 31
_TYPE_BITS: Final = np.uint64(5)
_DELTA_BITS: Final = np.uint64(27)
_TYPE_MASK: Final = np.uint64(31)
_STAMP_BITS: Final = np.uint64(59)
_HIGH: Final = np.uint64(31 << 59)
_FAR: Final = np.uint64((1 << 63) - 1)
# The shortest record is a header and one word.
_LEAST_BYTES: Final = 8

_NUMBERS: Final = 1 << 16  # common_type has 16 bits: struct trace_entry
# As in known.py, from enum trace_flag_type, Linux include/linux/trace_events.h.
_IN_IRQ: Final = 0x08 | 0x40
_NO_CONTEXT: Final = np.uint64(0xFF)

Records = tuple[U64Array, Places, Places, U64Array, I32Array]
"""Stamp, place, size, first eight bytes and CPU of each record."""


@dataclass(slots=True)
class Walker:
    """Walks over pages; what it gives is overwritten when it is asked again."""

    _stamp: U64Array = field(default_factory=lambda: np.empty(0, np.uint64))
    _base: Places = field(default_factory=lambda: np.empty(0, np.intp))
    _size: Places = field(default_factory=lambda: np.empty(0, np.intp))
    _head: U64Array = field(default_factory=lambda: np.empty(0, np.uint64))

    def walk(self, block: Block, layout: PageLayout, heads: PageHeads) -> PageEvents:
        """Find every event of some pages: as :func:`tdxtrace.ingest.ring.pages.walk` does."""
        n = int(heads.data_size[heads.sound].sum()) // _LEAST_BYTES
        if len(self._stamp) < n:
            self._stamp, self._head = np.empty(n, np.uint64), np.empty(n, np.uint64)
            self._base, self._size = np.empty(n, np.intp), np.empty(n, np.intp)
        ends = np.zeros(len(heads) + 1, np.intp)
        damaged = ~heads.sound
        _walk(
            block.data.view(np.uint32),
            heads.at + layout.data,
            heads.data_size,
            heads.start,
            (damaged, ends, self._stamp, self._base, self._size, self._head),
        )
        n = int(ends[-1])
        return PageEvents(
            self._stamp[:n], self._base[:n], self._size[:n], ends, damaged, self._head[:n]
        )


@compiled
def _two(words: NDArray[np.uint32], at: int) -> np.uint64:
    """Eight bytes at a place that is a multiple of four."""
    place = np.uint64(at) >> np.uint64(2)
    low, high = words[place], words[place + np.uint64(1)]
    return np.uint64(low) | np.uint64(high) << np.uint64(32)


@compiled
def _passed(now: np.uint64, kind: np.uint64, delta: np.uint64, word: np.uint64) -> np.uint64:
    """The moment after a record that is not a short event; ``word`` is its second."""
    if kind == np.uint64(_TIME_STAMP):
        full = delta | word << _DELTA_BITS | now & _HIGH
        return full + (np.uint64(1) << _STAMP_BITS if full < now else np.uint64(0))
    return now + delta + (word << _DELTA_BITS if kind == np.uint64(_TIME_EXTEND) else np.uint64(0))


@compiled
def _walk(
    words: NDArray[np.uint32],
    begin: Places,
    data_size: I64Array,
    start: U64Array,
    into: tuple[BoolArray, Places, U64Array, Places, Places, U64Array],
) -> None:
    """Write what the records of every page are; ``damaged`` pages are left out."""
    damaged, ends, stamp, base, size, first = into
    n = 0
    for page in range(len(begin)):
        at, now = int(begin[page]), start[page]
        end = at + int(data_size[page])
        if damaged[page] or data_size[page] < _LEAST_BYTES:
            ends[page + 1] = n
            continue
        while at < end:
            head = np.uint64(words[at >> 2])
            kind, delta = head & _TYPE_MASK, head >> _TYPE_BITS
            if np.uint64(0) < kind < np.uint64(_PADDING):
                step = (int(kind) + 1) * 4
                if at + step > end:
                    damaged[page] = True
                    break
                now += delta
                stamp[n], base[n], size[n] = min(now, _FAR), at + 4, step - 4
                first[n] = _two(words, at + 4)
                n += 1
                at += step
                continue
            word = np.uint64(words[(at >> 2) + 1])
            step = 8 if kind >= np.uint64(_TIME_EXTEND) else 4 + ((int(word) + 3) & ~3)
            if kind == np.uint64(_PADDING) and delta == np.uint64(0):
                break  # the unused rest of the page
            if at + step > end or (kind < np.uint64(_TIME_EXTEND) and word < np.uint64(4)):
                damaged[page] = True
                break
            now = _passed(now, kind, delta, word)
            if kind == np.uint64(0):
                stamp[n], base[n], size[n] = min(now, _FAR), at + 8, int(word) - 4
                first[n] = _two(words, at + 8)
                n += 1
            at += step
        ends[page + 1] = n


@dataclass(frozen=True, slots=True)
class Heads:
    """What heads some records, in the order asked for."""

    stamp: U64Array
    base: Places
    index: Places
    """Of each record's layout."""
    cpu: I32Array
    tid: I32Array
    in_irq: I8Array
    event: I32Array
    """Index into the vocabulary's events."""
    fresh: I32Array
    """Threads that were not met before; those of unusual numbers may come again."""
    layouts: Places
    """Those that occur."""
    fits: bool = True
    """False if a record is too short for the fields of its layout: reading ended there."""


def are_usual(common: Common) -> bool:
    """Whether the common fields are where they are in every kernel so far."""
    places = common.type, common.pid, common.flags, common.preempt_count
    found = [(place.offset, place.size) for place in places if place and place.is_number]
    return found == [(0, 2), (4, 4), (2, 1), (3, 1)]


def numbers(head: U64Array) -> tuple[Places, Places]:
    """Return the event numbers of records with these heads, and how often each occurs."""
    number, counts = np.empty(len(head), np.intp), np.zeros(_NUMBERS, np.intp)
    greatest = _numbers(head, number, counts)
    return number, counts[: greatest + 1]


def heads(records: Records, at: Places, known: ByLayout, is_met: BoolArray) -> Heads:
    """Read what heads the records at the places ``at``, in that order.

    Args:
        records: Among which they are.
        at: Their places there.
        known: Of their numbers.
        is_met: By thread number, up to some: whether it was met; set for those that are.
    """
    n = len(at)
    made = Heads(
        roomy(n, np.uint64),
        roomy(n, np.intp),
        roomy(n, np.intp),
        roomy(n, np.int32),
        roomy(n, np.int32),
        roomy(n, np.int8),
        roomy(n, np.int32),
        np.empty(n, np.int32),
        np.zeros(len(known.size), np.intp),
    )
    n_fresh = _heads(
        records,
        at,
        (known.index, known.size, known.event),
        is_met,
        (made.stamp, made.base, made.index, made.cpu),
        (made.tid, made.in_irq, made.event, made.fresh),
        made.layouts,
    )
    fresh, met = made.fresh[: max(n_fresh, ~n_fresh)], np.flatnonzero(made.layouts)
    return replace(made, fresh=fresh, layouts=met, fits=n_fresh >= 0)


@compiled
def _numbers(head: U64Array, number: Places, counts: Places) -> int:
    """Write the numbers and how often each occurs; return the greatest."""
    greatest = np.uint64(0)
    for i in range(len(head)):
        value = head[i] & np.uint64(0xFFFF)
        number[i] = value
        counts[value] += 1
        greatest = max(greatest, value)
    return int(greatest)


@compiled
def _heads(
    records: Records,
    at: Places,
    known: tuple[Places, Places, I32Array],
    is_met: BoolArray,
    where: tuple[U64Array, Places, Places, I32Array],
    who: tuple[I32Array, I8Array, I32Array, I32Array],
    met: Places,
) -> int:
    """Write what heads records; return the number of new threads, ~it if a record is too short."""
    stamp, base, size, head, cpu = records
    index_of, least, event_of = known
    new_stamp, new_base, index, new_cpu = where
    tid, in_irq, event, fresh = who
    n_fresh = 0
    for k in range(len(at)):
        # Unsigned, so that no place is looked up from the end.
        i = np.uint64(at[k])
        word = head[i]
        layout = np.uint64(index_of[word & np.uint64(0xFFFF)])
        if size[i] < least[layout]:
            return ~n_fresh
        met[layout] = 1
        thread = np.int32(word >> np.uint64(32))
        new_stamp[k], new_base[k], index[k], new_cpu[k] = stamp[i], base[i], layout, cpu[i]
        tid[k], event[k] = thread, event_of[layout]
        context = 1 if word >> np.uint64(16) & np.uint64(_IN_IRQ) else 0
        in_irq[k] = UNKNOWN if word >> np.uint64(24) & np.uint64(0xFF) == _NO_CONTEXT else context
        is_usual = 0 <= thread < len(is_met)
        if not is_usual or not is_met[np.uint64(thread)]:
            fresh[n_fresh] = thread
            n_fresh += 1
            if is_usual:
                is_met[np.uint64(thread)] = True
    return n_fresh
