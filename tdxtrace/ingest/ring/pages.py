"""When did the events of ring-buffer pages happen, and where on the pages are they?

Pages do not depend on each other: the first record of every page is measured in
one step, then the second of every page, and so on, so that a step is a handful of
numpy calls over thousands of pages.  What is not needed to reach the next record,
times above all, is worked out afterwards, for all records at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.raw import BoolArray, I64Array, U64Array
from tdxtrace.ingest.records.formats import PageLayout
from tdxtrace.ingest.records.gather import Block, Places

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
# A step that leaves every page: what stands there is no record.
_BEYOND: Final = np.intp(1 << 40)


@dataclass(slots=True)
class PageHeads:
    """What the headers of pages say, one entry per page."""

    at: Places
    """Byte of the block at which the page begins."""
    start: U64Array
    """Stamp of the page, in the clock's unit."""
    data_size: I64Array
    """Bytes of events."""
    lost: I64Array
    """Events lost before the page: 0 none, -1 unknown how many."""
    sound: BoolArray
    """False where the header cannot be one: the page is skipped."""

    def __len__(self) -> int:
        return len(self.at)

    def take(self, which: slice) -> PageHeads:
        """Some of the pages."""
        return PageHeads(
            self.at[which],
            self.start[which],
            self.data_size[which],
            self.lost[which],
            self.sound[which],
        )


def join_heads(parts: list[PageHeads]) -> PageHeads:
    """Put pages behind one another."""
    return PageHeads(
        np.concatenate([p.at for p in parts]),
        np.concatenate([p.start for p in parts]),
        np.concatenate([p.data_size for p in parts]),
        np.concatenate([p.lost for p in parts]),
        np.concatenate([p.sound for p in parts]),
    )


def page_heads(block: Block, layout: PageLayout, base: Places) -> PageHeads:
    """Read the headers of the pages that begin at ``base``."""
    low = _low_half(block, layout, base + layout.commit.offset)
    data_size = (low & _COMMIT_MASK).astype(np.int64)
    start = _stamp(block, layout, base)
    sound = (data_size <= layout.size - layout.data) & (start < _FAR)
    lost = np.where(low & _MISSED_EVENTS, np.int64(-1), np.int64(0))
    stored = np.flatnonzero((low & _MISSED_EVENTS > 0) & (low & _MISSED_STORED > 0) & sound)
    after = base[stored] + layout.data + data_size[stored]
    fits = data_size[stored] + layout.commit.size <= layout.size - layout.data
    fits &= after % 4 == 0
    counts = _low_half(block, layout, after[fits]).astype(np.int64)
    lost[stored[fits]] = np.where(counts > 0, counts, -1)
    return PageHeads(base, start, data_size, lost, sound)


def _low_half(block: Block, layout: PageLayout, at: Places) -> NDArray[np.uint32]:
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

    stamp: U64Array
    base: Places
    """Byte of the block at which each event's record begins."""
    size: Places
    """How many bytes it has."""
    ends: Places
    """Events up to and with each page; the first entry is 0."""
    damaged: BoolArray
    """Pages of which something could not be read."""
    head: U64Array | None = None
    """The first eight bytes of each record, if they were read on the way."""


def walk(block: Block, layout: PageLayout, heads: PageHeads) -> PageEvents:
    """Find every event of some pages.

    Time extends, absolute stamps and padding move the clock or the place and are
    no events.  A record that does not fit its page ends the page, which is then
    marked as damaged.
    """
    damaged = ~heads.sound
    at, first = _places(block, layout, heads, damaged)
    head = block.words.take(at >> 2)
    kind, delta = _parts(head, layout.big_endian)
    passed = delta.astype(np.uint64)
    rare = np.flatnonzero((kind - np.uint32(1)) > np.uint32(_PADDING - 2))
    stamp = _stamps(block, at, kind, passed, rare, first, heads)
    base, size = at + 4, kind.astype(np.intp) << 2
    if not len(rare):
        return PageEvents(stamp, base, size, first, damaged)
    # Those whose length is in front of them, not in their header.
    long = rare[kind[rare] == 0]
    size[long] = block.words[base[long] >> 2].astype(np.intp) - 4
    base[long] += 4
    is_event = np.ones(len(at), np.bool_)
    is_event[rare] = kind[rare] == 0
    ends = np.concatenate([[0], np.cumsum(is_event)])[first]
    return PageEvents(stamp[is_event], base[is_event], size[is_event], ends, damaged)


def _parts(
    head: NDArray[np.uint32], big_endian: bool
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Type and time of headers: big-endian compilers put the first bit field highest."""
    if big_endian:
        return head >> np.uint32(_DELTA_BITS), head & np.uint32((1 << _DELTA_BITS) - 1)
    return head & np.uint32((1 << _TYPE_BITS) - 1), head >> np.uint32(_TYPE_BITS)


def _steps(big_endian: bool) -> Places:
    """Bytes to the next record by the first byte of a header; 0: it has to be looked up.

    In either byte order the type is in the byte that comes first.
    """
    kind = np.arange(256) >> 3 if big_endian else np.arange(256) & 31
    step = (kind + 1) * 4
    step[(kind == 0) | (kind == _PADDING)] = 0
    step[kind > _PADDING] = 8
    return step.astype(np.intp)


def _places(
    block: Block, layout: PageLayout, heads: PageHeads, damaged: BoolArray
) -> tuple[Places, Places]:
    """Where records begin, in order, and how many there are before and on each page."""
    data, steps = block.data, _steps(layout.big_endian)
    # The shortest record is a header and one word.
    page = np.flatnonzero(heads.sound & (heads.data_size >= 8))
    at = heads.at[page] + layout.data
    end = at + heads.data_size[page]
    count = np.zeros(len(heads), np.intp)
    found: list[tuple[Places, Places]] = []
    while len(at):
        step = steps.take(data.take(at))
        if not step.all():
            _look_up(block, layout, at, end, step)
        found.append((page, at))
        at = at + step
        live = at < end
        if not live.all():
            over = at > end
            if over.any():
                damaged[page[over]] = True
                found[-1] = page[~over], found[-1][1][~over]
            count[page[~live]] = len(found) - over[~live]
            page, at, end = page[live], at[live], end[live]
    first = np.concatenate([np.zeros(1, np.intp), np.cumsum(count)])
    return _in_order(found, first), first


def _in_order(found: list[tuple[Places, Places]], first: Places) -> Places:
    """Put what was found step by step page by page: the k-th step gave the k-th of a page."""
    places = np.empty(int(first[-1]), np.intp)
    lanes: Places | None = None
    target = first
    for step, (page, at) in enumerate(found):
        if page is not lanes:
            lanes, target = page, first[page] + step
        places[target] = at
        target += 1
    return places


def _look_up(block: Block, layout: PageLayout, at: Places, end: Places, step: Places) -> None:
    """Set the step of long records and of padding, which their second word tells."""
    rare = np.flatnonzero(step == 0)
    where = at[rare] >> 2
    kind, delta = _parts(block.words[where], layout.big_endian)
    word = block.words[where + 1].astype(np.intp)
    # Bytes after the header, the length itself included.
    long = np.where(word < 4, _BEYOND, 4 + ((word + 3) & ~3))
    # Padding at no distance in time is the unused rest of the page.
    is_rest = (kind == _PADDING) & (delta == 0)
    step[rare] = np.where(is_rest, end[rare] - at[rare], long)


def _stamps(  # noqa: PLR0913, PLR0917 - what a record is, column by column
    block: Block,
    at: Places,
    kind: NDArray[np.uint32],
    delta: U64Array,
    rare: Places,
    first: Places,
    heads: PageHeads,
) -> U64Array:
    """The moment of every record: the page's and all distances since."""
    count = np.diff(first)
    timed = rare[kind[rare] >= _TIME_EXTEND]
    word = block.words[(at[timed] >> 2) + 1].astype(np.uint64)
    delta[timed] += word << np.uint64(_DELTA_BITS)
    absolute = timed[kind[timed] == _TIME_STAMP]
    stamps = delta[absolute]
    delta[absolute] = 0
    passed = np.cumsum(delta, dtype=np.uint64)
    before = np.concatenate([np.zeros(1, np.uint64), passed])[first[:-1]]
    begin = np.repeat(heads.start - before, count)
    if len(absolute):
        begin = _restarted(begin, passed, absolute, stamps, first)
    # Stamps that no clock reaches come from damage; they would overflow a signed number.
    return np.minimum(begin + passed, _FAR)


def _restarted(
    begin: U64Array, passed: U64Array, absolute: Places, stamps: U64Array, first: Places
) -> U64Array:
    """Let time go on from each absolute stamp to the page's end or to the next one."""
    start = begin[absolute] + passed[absolute]
    full = stamps | (start & _HIGH)
    full += np.where(full < start, np.uint64(1 << _STAMP_BITS), np.uint64(0))
    last = np.full(len(begin), -1, np.intp)
    last[absolute] = np.arange(len(absolute))
    place = np.maximum.accumulate(last)
    page = np.searchsorted(first, np.arange(len(begin)), "right")
    of_page = np.searchsorted(first, absolute, "right")
    here = (place >= 0) & (of_page[np.maximum(place, 0)] == page)
    again = (full - passed[absolute])[np.maximum(place, 0)]
    return np.where(here, again, begin)
