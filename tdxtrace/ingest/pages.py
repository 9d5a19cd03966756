"""When did the events of ring-buffer pages happen, and where on the pages are they?

Pages do not depend on each other: the first event of every page is read in one
step, then the second of every page, and so on, so that a step is a handful of
numpy calls over thousands of pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.formats import PageLayout
from tdxtrace.ingest.gather import Block, Places
from tdxtrace.ingest.raw import BoolArray, I64Array, U64Array

# enum ring_buffer_type, Linux include/linux/ring_buffer.h: 1 to 28 is a record of
# so many words, 0 one whose length is in its first word.
_PADDING: Final = 29
_TIME_EXTEND: Final = 30
_TIME_STAMP: Final = 31
_TYPE_BITS: Final = 5
_DELTA_BITS: Final = 27
# An absolute stamp has 59 bits; the five above are those of the stamp before it
# (Linux kernel/trace/ring_buffer.c, rb_fix_abs_ts).
_STAMP_BITS: Final = 59
_HIGH: Final = np.uint64(((1 << 64) - 1) ^ ((1 << _STAMP_BITS) - 1))
# Flags beside the length of a page's data, ring_buffer.c: events were lost before
# it, and their number follows the data.
_MISSED_EVENTS: Final = 1 << 31
_MISSED_STORED: Final = 1 << 30
_COMMIT_MASK: Final = (1 << 27) - 1  # libtraceevent src/kbuffer-parse.c, COMMIT_MASK
_FAR: Final = np.uint64((1 << 63) - 1)


@dataclass(slots=True)
class PageHeads:
    """What the headers of pages say, one entry per page."""

    start: U64Array
    """Stamp of the page, in the clock's unit."""
    data_size: I64Array
    """Bytes of events."""
    lost: I64Array
    """Events lost before the page: 0 none, -1 unknown how many."""
    sound: BoolArray
    """False where the header cannot be one: the page is skipped."""


def page_heads(block: Block, layout: PageLayout, n_pages: int) -> PageHeads:
    """Read the header of each of the ``n_pages`` pages that fill ``block``."""
    base = np.arange(n_pages, dtype=np.intp) * layout.size
    low = _u32_of_long(block, layout, base + layout.commit.offset)
    data_size = (low & _COMMIT_MASK).astype(np.int64)
    start = _stamp(block, layout, base)
    sound = (data_size <= layout.size - layout.data) & (start < _FAR)
    lost = np.where(low & _MISSED_EVENTS, np.int64(-1), np.int64(0))
    stored = np.flatnonzero((low & _MISSED_EVENTS > 0) & (low & _MISSED_STORED > 0) & sound)
    after = base[stored] + layout.data + data_size[stored]
    fits = data_size[stored] + layout.commit.size <= layout.size - layout.data
    fits &= after % 4 == 0
    counts = _u32_of_long(block, layout, after[fits]).astype(np.int64)
    lost[stored[fits]] = np.where(counts > 0, counts, -1)
    return PageHeads(start, data_size, lost, sound)


def _u32_of_long(block: Block, layout: PageLayout, at: Places) -> NDArray[np.uint32]:
    """The low half of the longs at ``at``: no page length or count needs more."""
    low = layout.commit.size - 4 if layout.big_endian else 0
    words: NDArray[np.uint32] = block.words[(at + low) >> 2].astype(np.uint32)
    return words


def _stamp(block: Block, layout: PageLayout, base: Places) -> U64Array:
    first, second = block.words[base >> 2], block.words[(base >> 2) + 1]
    low, high = (second, first) if layout.big_endian else (first, second)
    stamp: U64Array = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return stamp


@dataclass(slots=True)
class PageEvents:
    """The events of a run of pages: page after page, each in the order of its record."""

    at: Places
    """Byte of the block at which each event's header begins."""
    stamp: U64Array
    count: NDArray[np.intp]
    """Events on each page."""
    damaged: BoolArray
    """Pages of which something could not be read."""

    def payload(self, block: Block, big_endian: bool) -> tuple[Places, Places]:
        """Where each event's record begins, and how many bytes it has."""
        return payload_of(block, self.at, big_endian)


def payload_of(block: Block, at: Places, big_endian: bool) -> tuple[Places, Places]:
    """Where the records of the events at ``at`` begin, and how many bytes they have."""
    head = block.words[at >> 2]
    size = _kind(head, big_endian).astype(np.intp) << 2
    base = at + 4
    long = np.flatnonzero(size == 0)
    if len(long):
        size[long] = block.words[base[long] >> 2].astype(np.intp) - 4
        base[long] += 4
    return base, size


def _kind(head: NDArray[np.uint32], big_endian: bool) -> NDArray[np.uint32]:
    return head >> np.uint32(_DELTA_BITS) if big_endian else head & np.uint32(0x1F)


def _delta(head: NDArray[np.uint32], big_endian: bool) -> NDArray[np.uint32]:
    if big_endian:
        return head & np.uint32((1 << _DELTA_BITS) - 1)
    return head >> np.uint32(_TYPE_BITS)


@dataclass(slots=True)
class _Lanes:
    """Where the walk stands on each page that has events left."""

    page: NDArray[np.intp]
    word: Places
    end: Places
    stamp: U64Array
    slot: Places
    """Where the next event goes."""

    def keep(self, live: BoolArray) -> None:
        """Drop the pages that are done."""
        self.page, self.word, self.end = self.page[live], self.word[live], self.end[live]
        self.stamp, self.slot = self.stamp[live], self.slot[live]


def walk(block: Block, layout: PageLayout, heads: PageHeads) -> PageEvents:
    """Find every event of the pages that fill ``block``.

    Time extends, absolute stamps and padding move the clock or the place and are
    no events.  A record that does not fit its page ends the page, which is then
    marked as damaged.
    """
    n_pages, big = len(heads.start), layout.big_endian
    # The shortest record is a header and one word.
    capacity = (layout.size - layout.data) // 8 + 1
    at = np.zeros(n_pages * capacity, np.uint32)
    stamps = np.empty(n_pages * capacity, np.uint64)
    damaged = ~heads.sound
    lanes = _lanes(layout, heads, capacity)
    words = block.words.astype(np.uint32) if big else block.words
    while len(lanes.page):
        head = words[lanes.word]
        kind = _kind(head, big)
        lanes.stamp += _delta(head, big)
        step = kind.astype(np.intp)
        is_event: BoolArray | None = None
        if ((kind - np.uint32(1)) > np.uint32(27)).any():
            is_event = _rare(words, head, lanes, step, big)
        step += 1
        at[lanes.slot] = lanes.word if is_event is None else lanes.word * is_event
        stamps[lanes.slot] = lanes.stamp
        lanes.slot += 1
        lanes.word += step
        live = lanes.word < lanes.end
        if not live.all():
            over = lanes.word > lanes.end
            damaged[lanes.page[over]] = True
            at[lanes.slot[over] - 1] = 0
            lanes.keep(live)
    return _collect(at.reshape(n_pages, capacity), stamps, damaged)


def _lanes(layout: PageLayout, heads: PageHeads, capacity: int) -> _Lanes:
    """The start of the walk: the first event of every page that has one."""
    page = np.flatnonzero(heads.sound & (heads.data_size >= 8))
    word = page * (layout.size >> 2) + (layout.data >> 2)
    end = word + (heads.data_size[page] >> 2)
    return _Lanes(page, word, end, heads.start[page], page * capacity)


def _collect(at: NDArray[np.uint32], stamps: U64Array, damaged: BoolArray) -> PageEvents:
    # Word 0 is a page's header: no event begins there.
    found = np.flatnonzero(at)
    count = np.count_nonzero(at, axis=1).astype(np.intp)
    return PageEvents(at.ravel()[found].astype(np.intp) << 2, stamps[found], count, damaged)


def _rare(
    words: NDArray[np.uint32], head: NDArray[np.uint32], lanes: _Lanes, step: Places, big: bool
) -> BoolArray:
    """Read what is no short record: long ones, padding, time; return which are events.

    ``step`` becomes the words after the header; a step beyond any page marks a
    record that cannot be.
    """
    kind, delta = _kind(head, big), _delta(head, big)
    word = words[lanes.word + 1]
    beyond = np.intp(1 << 40)
    # Long records and padding: bytes after the header, the length itself included.
    long = (word.astype(np.intp) + 3) >> 2
    long = np.where(word < 4, beyond, long)
    np.copyto(step, long, where=kind == 0)
    # Padding at no distance in time is the unused rest of the page.
    padding = kind == _PADDING
    np.copyto(step, np.where(delta == 0, lanes.end - lanes.word - 1, long), where=padding)
    timed = (kind == _TIME_EXTEND) | (kind == _TIME_STAMP)
    step[timed] = 1
    full = delta.astype(np.uint64) + (word.astype(np.uint64) << np.uint64(_DELTA_BITS))
    before = lanes.stamp - delta
    absolute = full | (before & _HIGH)
    absolute += np.where(absolute < before, np.uint64(1 << _STAMP_BITS), np.uint64(0))
    np.copyto(lanes.stamp, before + full, where=kind == _TIME_EXTEND)
    np.copyto(lanes.stamp, absolute, where=kind == _TIME_STAMP)
    # Stamps that no clock reaches come from damage; they would overflow a signed number.
    np.minimum(lanes.stamp, _FAR, out=lanes.stamp)
    return kind < _PADDING
