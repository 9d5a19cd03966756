"""Compiled loops over pages of little-endian machines: where their events are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.compiled import compiled
from tdxtrace.ingest.raw import BoolArray, I64Array, U64Array
from tdxtrace.ingest.records.formats import PageLayout
from tdxtrace.ingest.records.gather import Block, Places
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
