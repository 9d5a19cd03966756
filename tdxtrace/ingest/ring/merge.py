"""In which order did the events of all CPUs happen: pages in, rounds of events out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.errors import FormatError
from tdxtrace.ingest.records.formats import PageLayout
from tdxtrace.ingest.records.gather import PADDING, Block, Bytes
from tdxtrace.ingest.ring.pages import PageEvents, PageHeads, join_heads, page_heads, walk
from tdxtrace.ingest.ring.rounds import Gap, Round
from tdxtrace.ingest.ring.windows import NEVER, CpuPages, Window

# Pages decoded at a time: enough to spread the cost of a numpy call over many
# pages, few enough for their events to stay in a core's cache.
ROUND_PAGES: Final = 2048
_MAX_BLOCK: Final = 512 << 20


@dataclass(slots=True)
class Merge:
    """Gives the events of all CPUs, in order, in rounds of bounded size."""

    sources: list[CpuPages]
    layout: PageLayout
    round_pages: int = ROUND_PAGES
    is_large: bool = False
    """Whether compiled loops pay."""
    _walk: Callable[[Block, PageLayout, PageHeads], PageEvents] = walk
    """Finds the events of pages; what it gave may be overwritten when it is asked again."""
    _windows: list[Window] = field(default_factory=list)
    _block: Block = field(init=False)
    _free: list[Bytes] = field(default_factory=list)
    """What was a block that nothing refers to any more."""

    def __post_init__(self) -> None:
        n_pages = min(self.round_pages, _MAX_BLOCK // self.layout.size)
        capacity = max(2, -(-n_pages // max(1, len(self.sources))))
        part = capacity * self.layout.size
        if self.is_large and not self.layout.big_endian:
            from tdxtrace.ingest.ring.loops import Walker  # noqa: PLC0415 - imports numba

            self._walk = Walker().walk
        if part * len(self.sources) > _MAX_BLOCK:
            raise FormatError(f"{len(self.sources)} CPUs with pages of {self.layout.size} bytes")
        self._free.append(np.zeros(len(self.sources) * part + PADDING, np.uint8))
        self._block = self._new_block(self._free[0])
        none = page_heads(self._block, self.layout, np.zeros(0, np.intp))
        self._windows = [
            Window(source, self.layout, place * part, capacity, none.take(slice(None)))
            for place, source in enumerate(self.sources)
        ]

    def _new_block(self, like: Bytes) -> Block:
        """A block to fill: an old one, if there is one that is not needed any more."""
        data = self._free.pop() if self._free else np.zeros_like(like)
        made = Block(data, self.layout.order)
        weakref.finalize(made, self._free.append, data).atexit = False
        return made

    @property
    def n_damaged(self) -> int:
        """Pages so far of which something could not be read."""
        return sum(window.n_damaged for window in self._windows)

    def spans(self) -> list[tuple[int, int, int]]:
        """CPU, first and last stamp of every buffer that had events so far."""
        return [
            (window.source.cpu, window.first_stamp, window.last_stamp)
            for window in self._windows
            if window.first_stamp is not None and window.last_stamp is not None
        ]

    def n_events(self) -> list[int]:
        """Events so far of each source."""
        return [window.n_events for window in self._windows]

    def lost_at_end(self) -> list[Gap]:
        """Losses after which no event came."""
        return [
            Gap(w.source.cpu, _count(w.n_lost), w.last_stamp, None, 0)
            for w in self._windows
            if w.n_lost
        ]

    def rounds(self) -> Iterator[Round]:
        """Yield the events, round by round."""
        is_stuck = is_kept = False
        while True:
            full = self._block
            if is_kept:
                self._block = self._new_block(full.data)
            for window in self._windows:
                window.fill(self._block, full)
            del full
            taken = self._choose()
            if not sum(taken):
                return
            moment, limit = (NEVER, len(taken)) if is_stuck else self._horizon(taken)
            before = [(len(window.begin), window.n_given) for window in self._windows]
            made = self._decode(taken, moment, limit)
            is_stuck = before == [(len(w.begin), w.n_given) for w in self._windows]
            if len(made):
                yield made
            is_kept = made.is_kept
            del made

    def _choose(self) -> list[int]:
        """How many pages of each CPU to decode: those before which nothing can come."""
        bound = min((int(w.begin[-1]) for w in self._windows if w.has_more), default=NEVER)
        taken = [int(np.searchsorted(w.begin, bound, "left")) for w in self._windows]
        if not sum(taken):
            earliest = [(int(w.begin[0]), n) for n, w in enumerate(self._windows) if len(w.begin)]
            for _, place in [min(earliest)] if earliest else []:
                taken[place] = 1
        return taken

    def _horizon(self, taken: list[int]) -> tuple[int, int]:
        """Up to which moment, and of which CPUs that moment too, all events are at hand."""
        left = [
            (int(w.begin[n]), place)
            for place, (w, n) in enumerate(zip(self._windows, taken, strict=True))
            if n < len(w.begin)
        ]
        return min(left, default=(NEVER, len(taken)))

    def _decode(self, taken: list[int], moment: int, limit: int) -> Round:
        heads = join_heads(
            [w.heads.take(slice(n)) for w, n in zip(self._windows, taken, strict=True)]
        )
        events = self._walk(self._block, self.layout, heads)
        keep: list[slice] = []
        gaps: list[Gap] = []
        first, n_kept = 0, 0
        for place, (window, n) in enumerate(zip(self._windows, taken, strict=True)):
            if window.source.correct is not None:
                mine = slice(int(events.ends[first]), int(events.ends[first + n]))
                events.stamp[mine] = window.corrected(events.stamp[mine])
            run = _Run(window, slice(first, first + n), heads, events)
            mine = run.give(moment + 1 if place <= limit else moment)
            gaps += run.gaps(mine, n_kept)
            run.finish(mine)
            keep.append(mine)
            first += n
            n_kept += mine.stop - mine.start
        return self._round(events, keep, gaps)

    def _round(self, events: PageEvents, keep: list[slice], gaps: list[Gap]) -> Round:
        cpus = np.array([w.source.cpu for w in self._windows], np.int32)
        starts = np.array([mine.start for mine in keep], np.intp)
        stops = np.array([mine.stop for mine in keep], np.intp)
        made = Round(self._block, events, cpus, starts, stops)
        if gaps:
            rank = np.empty(len(made), np.intp)
            rank[made.order()] = np.arange(len(rank))
            gaps = [Gap(g.cpu, g.n_events, g.after, g.before, int(rank[g.rank])) for g in gaps]
            made.gaps = sorted(gaps, key=lambda gap: gap.rank)
        return made


def _count(n_lost: int) -> int | None:
    return None if n_lost < 0 else n_lost


@dataclass(frozen=True, slots=True)
class _Run:
    """The pages of one CPU in a round."""

    window: Window
    pages: slice
    heads: PageHeads
    events: PageEvents

    def give(self, until: int) -> slice:
        """Which events of it happened before the moment ``until`` and are not yet given."""
        end = int(self.events.ends[self.pages.stop])
        begin = min(int(self.events.ends[self.pages.start]) + self.window.n_given, end)
        stamps = self.events.stamp[begin:end]
        return slice(begin, begin + int(np.searchsorted(stamps, np.uint64(until), "left")))

    def _n_done(self, mine: slice) -> int:
        """Pages that are given out whole."""
        ends = self.events.ends[self.pages.start + 1 : self.pages.stop + 1]
        return int(np.searchsorted(ends, mine.stop, "right"))

    def gaps(self, mine: slice, n_before: int) -> list[Gap]:
        """The losses that lie before events of ``mine``; ranks count CPU by CPU."""
        found: list[Gap] = []
        window, lost = self.window, self.heads.lost[self.pages]
        if not window.n_lost and not lost.any():
            return found
        for page in range(self.pages.start, self.pages.stop):
            first, end = int(self.events.ends[page]), int(self.events.ends[page + 1])
            if end > mine.stop and first >= mine.stop:
                break
            if page == self.pages.start and window.n_given:
                continue
            window.n_lost = _added(window.n_lost, int(self.heads.lost[page]))
            if window.n_lost and first < end:
                found.append(self._gap(first, mine, n_before))
                window.n_lost = 0
            if end > mine.stop:
                break
        return found

    def _gap(self, first: int, mine: slice, n_before: int) -> Gap:
        stamp, window = self.events.stamp, self.window
        after = int(stamp[first - 1]) if first > mine.start else window.last_stamp
        n_events, rank = _count(window.n_lost), n_before + first - mine.start
        return Gap(window.source.cpu, n_events, after, int(stamp[first]), rank)

    def finish(self, mine: slice) -> None:
        """Note how far the CPU has come."""
        window, stamp = self.window, self.events.stamp
        if mine.stop > mine.start:
            window.last_stamp = int(stamp[mine.stop - 1])
            if window.first_stamp is None:
                window.first_stamp = int(stamp[mine.start])
        start, done = self.pages.start, self._n_done(mine)
        window.n_events += mine.stop - mine.start
        window.n_damaged += int(np.count_nonzero(self.events.damaged[start : start + done]))
        is_whole = start + done == self.pages.stop
        window.drop(
            done, 0 if is_whole else max(0, mine.stop - int(self.events.ends[start + done]))
        )


def _added(n_lost: int, more: int) -> int:
    return -1 if n_lost < 0 or more < 0 else n_lost + more
