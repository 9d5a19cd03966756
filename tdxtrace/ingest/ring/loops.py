"""Compiled loops over pages of little-endian machines: where events are, what heads them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.compiled import compiled
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, I8Array, I32Array, I64Array, U64Array
from tdxtrace.ingest.records.formats import Common, Field, PageLayout
from tdxtrace.ingest.records.gather import PADDING, Block, Bytes, Places
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
_NO_CONTEXT: Final = 0xFF
# Bytes of the type, thread, flags and preempt count in every kernel so far: struct
# trace_entry, Linux include/linux/trace_events.h.
_SIZES: Final = (2, 4, 1, 1)

Records = tuple[U64Array, Places, Places, Places, I32Array]
"""Stamp, place, size, event number and CPU of each record."""


@dataclass(slots=True)
class Walker:
    """Walks over pages; what it gives is overwritten when it is asked again."""

    _stamp: U64Array = field(default_factory=lambda: np.empty(0, np.uint64))
    _base: Places = field(default_factory=lambda: np.empty(0, np.intp))
    _size: Places = field(default_factory=lambda: np.empty(0, np.intp))

    def walk(self, block: Block, layout: PageLayout, heads: PageHeads) -> PageEvents:
        """Find every event of some pages: as :func:`tdxtrace.ingest.ring.pages.walk` does."""
        n = int(heads.data_size[heads.sound].sum()) // _LEAST_BYTES
        if len(self._stamp) < n:
            self._stamp = np.empty(n, np.uint64)
            self._base, self._size = np.empty(n, np.intp), np.empty(n, np.intp)
        ends = np.zeros(len(heads) + 1, np.intp)
        damaged = ~heads.sound
        _walk(
            block.data.view(np.uint32),
            heads.at + layout.data,
            heads.data_size,
            heads.start,
            (damaged, ends, self._stamp, self._base, self._size),
        )
        found = slice(int(ends[-1]))
        return PageEvents(self._stamp[found], self._base[found], self._size[found], ends, damaged)


@compiled
def _walk(
    words: NDArray[np.uint32],
    begin: Places,
    data_size: I64Array,
    start: U64Array,
    into: tuple[BoolArray, Places, U64Array, Places, Places],
) -> None:
    """Write what the records of every page are; ``damaged`` pages are left out."""
    damaged, ends, stamp, base, size = into
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
            if kind == np.uint64(_TIME_STAMP):
                full = delta | word << _DELTA_BITS | now & _HIGH
                now = full + (np.uint64(1) << _STAMP_BITS if full < now else np.uint64(0))
            else:
                now += delta
                if kind == np.uint64(_TIME_EXTEND):
                    now += word << _DELTA_BITS
            if kind == np.uint64(0):
                stamp[n], base[n], size[n] = min(now, _FAR), at + 8, int(word) - 4
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
    fits: bool = True
    """False if a record is too short for the fields of its layout: reading ended there."""


@dataclass(slots=True)
class HeadReader:
    """Reads what every record has."""

    common: Common
    _number: Places = field(default_factory=lambda: np.empty(0, np.intp))

    @property
    def can_read(self) -> bool:
        """Whether the common fields have the sizes that they have in every kernel so far."""
        places = self._places()
        sizes = tuple(place.size if place and place.is_number else 0 for place in places)
        # The records of a page begin at multiples of four.
        return sizes == _SIZES and all(
            place.end <= PADDING and place.offset % place.size == 0 for place in places if place
        )

    def _places(self) -> tuple[Field | None, ...]:
        common = self.common
        return common.type, common.pid, common.flags, common.preempt_count

    def numbers(self, block: Block, base: Places) -> tuple[Places, Places]:
        """Return the event numbers of the records at ``base``, and how often each occurs.

        They are overwritten when it is asked again.
        """
        if len(self._number) < len(base):
            self._number = np.empty(len(base), np.intp)
        number, counts = self._number[: len(base)], np.zeros(_NUMBERS, np.intp)
        at = self.common.type.offset
        _numbers(block.data.view(np.uint16), at, base, number, counts)
        return number, counts

    def heads(
        self, block: Block, records: Records, at: Places, known: ByLayout, is_met: BoolArray
    ) -> Heads:
        """Read what heads the records at the places ``at``, in that order.

        Args:
            block: Their bytes.
            records: Among which they are.
            at: Their places there.
            known: Of their numbers.
            is_met: By thread number, up to some: whether it was met; set for those that are.
        """
        n = len(at)
        made = Heads(
            np.empty(n, np.uint64),
            np.empty(n, np.intp),
            np.empty(n, np.intp),
            np.empty(n, np.int32),
            np.empty(n, np.int32),
            np.empty(n, np.int8),
            np.empty(n, np.int32),
            np.empty(n, np.int32),
        )
        _, *places = self._places()
        n_fresh = _heads(
            block.data,
            block.data.view(np.int32),
            tuple(place.offset for place in places if place),
            records,
            at,
            (known.index, known.size, known.event),
            is_met,
            (made.stamp, made.base, made.index, made.cpu),
            (made.tid, made.in_irq, made.event, made.fresh),
        )
        return replace(made, fresh=made.fresh[: max(n_fresh, ~n_fresh)], fits=n_fresh >= 0)


@compiled
def _numbers(
    halves: NDArray[np.uint16], offset: int, base: Places, number: Places, counts: Places
) -> None:
    for i in range(len(base)):
        value = halves[np.uint64(base[i] + offset) >> np.uint64(1)]
        number[i] = value
        counts[value] += 1


@compiled
def _heads(
    data: Bytes,
    words: NDArray[np.int32],
    offsets: tuple[int, ...],
    records: Records,
    at: Places,
    known: tuple[Places, Places, I32Array],
    is_met: BoolArray,
    where: tuple[U64Array, Places, Places, I32Array],
    who: tuple[I32Array, I8Array, I32Array, I32Array],
) -> int:
    """Write what heads records; return the number of new threads, ~it if a record is too short."""
    pid, flags, count = offsets
    stamp, base, size, number, cpu = records
    index_of, least, event_of = known
    new_stamp, new_base, index, new_cpu = where
    tid, in_irq, event, fresh = who
    n_fresh = 0
    for k in range(len(at)):
        # Unsigned, so that no place is looked up from the end.
        i = np.uint64(at[k])
        place = base[i]
        layout = np.uint64(index_of[np.uint64(number[i])])
        if size[i] < least[layout]:
            return ~n_fresh
        thread = words[np.uint64(place + pid) >> np.uint64(2)]
        new_stamp[k], new_base[k], index[k], new_cpu[k] = stamp[i], place, layout, cpu[i]
        tid[k], event[k] = thread, event_of[layout]
        context = 1 if data[np.uint64(place + flags)] & _IN_IRQ else 0
        in_irq[k] = UNKNOWN if data[np.uint64(place + count)] == _NO_CONTEXT else context
        is_usual = 0 <= thread < len(is_met)
        if not is_usual or not is_met[np.uint64(thread)]:
            fresh[n_fresh] = thread
            n_fresh += 1
            if is_usual:
                is_met[np.uint64(thread)] = True
    return n_fresh
