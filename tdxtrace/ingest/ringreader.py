"""From rounds of ring-buffer events to raw events: which are ours, what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.clocks import Clock
from tdxtrace.ingest.formats import Common, EventFormat, Field
from tdxtrace.ingest.gather import Block, Places
from tdxtrace.ingest.layouts import Layout, layout_of
from tdxtrace.ingest.lines import Vocabulary
from tdxtrace.ingest.merge import Merge, Round
from tdxtrace.ingest.pages import payload_of
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, I8Array, I32Array, RawEvents, U64Array
from tdxtrace.ingest.tally import Tally

# What trace-cmd and the kernel print for a thread whose name was not saved.
_NO_NAME: Final = "<...>"
_IDLE: Final = "<idle>"
# enum trace_flag_type, Linux include/linux/trace_events.h: HARDIRQ and NMI.
_IN_IRQ: Final = np.uint64(0x08 | 0x40)
_NO_CONTEXT: Final = np.uint64(0xFF)  # preempt count of uprobe events: it tells nothing
_NUMBERS: Final = 1 << 16
_NOT_MET: Final = -1


@dataclass(slots=True)
class RingReader:
    """Reads the events of one recording's ring buffers, and counts the rest."""

    merge: Merge
    formats: Mapping[int, EventFormat]
    common: Common
    clock: Clock
    vocabulary: Vocabulary
    tally: Tally
    comms: Mapping[int, str]
    tgids: Mapping[int, int]
    symbol_at: Callable[[int], str | None] = lambda _: None
    """Names the kernel function at an address."""
    layouts: list[Layout] = field(default_factory=list)
    _layout: NDArray[np.int32] = field(init=False)
    """Index into ``layouts`` by event number."""
    _wanted: BoolArray = field(init=False)
    _tids: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._layout = np.full(_NUMBERS, _NOT_MET, np.int32)
        self._wanted = np.zeros(_NUMBERS, np.bool_)

    def batches(self) -> Iterator[RawEvents]:
        """Yield the events that may become rows, in the order of their time."""
        for made in self.merge.rounds():
            yield self._events(made)
        for cpu, first, last in self.merge.spans():
            first_ns, last_ns = self.clock.one(first), self.clock.one(last)
            if first_ns is not None and last_ns is not None:
                self.tally.heard(cpu, first_ns, last_ns)
        for gap in self.merge.lost_at_end():
            after = self.clock.one(gap.after)
            self.tally.gap(gap.cpu, gap.n_events, self.tally.n_lines + 1, after, None)

    def _events(self, made: Round) -> RawEvents:
        block, big_endian = made.block, self.merge.layout.big_endian
        base, size = payload_of(block, made.at, big_endian)
        word = block.column(base, self.common.type) & np.uint64(_NUMBERS - 1)
        number: NDArray[np.int64] = word.view(np.int64)
        self._count(number, base, made)
        rank = np.flatnonzero(self._wanted[number][made.order])
        at = made.order[rank]
        line = rank + (self.tally.n_lines + 1)
        self.tally.n_lines += len(made.at)
        which = self._layout[number[at]]
        fits = size[at] >= np.array([made.size for made in self.layouts] or [0])[which]
        if not fits.all():
            self._cut(which[~fits], line[~fits])
            at, line, which = at[fits], line[fits], which[fits]
        return self._raw(made, base[at], at, line, which)

    def _raw(
        self, made: Round, base: Places, at: Places, line: NDArray[np.int64], which: I32Array
    ) -> RawEvents:
        block, n = made.block, len(at)
        tid = _column(block, base, self.common.pid).astype(np.int32)
        event = np.array([layout.event for layout in self.layouts] or [0], np.int32)[which]
        raw = RawEvents(
            line,
            self.clock.to_ns(made.stamp[at]),
            tid,
            self._tgids_of(tid),
            made.cpu[at],
            self._in_irq(block, base),
            event,
        )
        for index in np.flatnonzero(np.bincount(which, minlength=len(self.layouts))).tolist():
            mine = np.flatnonzero(which == index)
            layout = self.layouts[index]
            self.tally.events[layout.name] += len(mine)
            values, present = layout.read(block, base[mine])
            for slot, column in values.items():
                if slot not in raw.values:
                    raw.values[slot] = np.zeros(n, np.uint64)
                    raw.present[slot] = np.zeros(n, np.bool_)
                raw.values[slot][mine] = column
                raw.present[slot][mine] = present[slot]
        self._meet_threads(tid)
        return raw

    def _count(self, number: NDArray[np.int64], base: Places, made: Round) -> None:
        """Account for events that are not ours, and for gaps."""
        found = np.bincount(number, minlength=_NUMBERS)
        for value in np.flatnonzero(found).tolist():
            if self._layout[value] == _NOT_MET:
                self._meet(value, number, base, made.block)
            layout = self.layouts[self._layout[value]]
            if not layout.is_wanted:
                line = None
                if (layout.kind, layout.name) not in self.tally.entries:
                    line = int(np.argmax(number[made.order] == value)) + self.tally.n_lines + 1
                self.tally.count(layout.kind, layout.name, line, int(found[value]))
        for gap in made.gaps:
            line = gap.rank + self.tally.n_lines + 1
            start, end = self.clock.one(gap.after), self.clock.one(gap.before)
            self.tally.gap(gap.cpu, gap.n_events, line, start, end)

    def _meet(self, value: int, number: NDArray[np.int64], base: Places, block: Block) -> None:
        """Find out what events of a number are, when the first of them comes."""
        made = self.formats.get(value)
        if made is None:
            layout = Layout(0, "undecoded", f"event {value} without a format", {}, 0)
        else:
            layout = layout_of(made, self._name(made), self.vocabulary)
        if made is not None and layout.kind in ("unmapped", "noise"):
            symbol = self._symbol(made, base[np.argmax(number == value)], block)
            if symbol is not None:
                layout = layout_of(made, self._name(made), self.vocabulary, symbol)
        self._layout[value] = len(self.layouts)
        self._wanted[value] = layout.is_wanted
        self.layouts.append(layout)

    def _name(self, made: EventFormat) -> str:
        """What trace-cmd report prints: the group only where the name alone is not clear."""
        return made.name

    def _symbol(self, made: EventFormat, base: int, block: Block) -> str | None:
        place = made.fields.get("__probe_func") or made.fields.get("__probe_ip")
        if place is None or not place.is_number:
            return None
        return self.symbol_at(int(block.column(np.array([base], np.intp), place)[0]))

    def _cut(self, which: I32Array, line: NDArray[np.int64]) -> None:
        """Account for records too short for the fields that their format promises."""
        for index in np.unique(which).tolist():
            mine = line[which == index]
            self.tally.count("undecoded", self.layouts[index].name, int(mine[0]), len(mine))

    def _tgids_of(self, tid: I32Array) -> I32Array:
        if not self.tgids:
            return np.full(len(tid), UNKNOWN, np.int32)
        known = np.array(sorted(self.tgids), np.int32)
        process = np.array([self.tgids[t] for t in known.tolist()], np.int32)
        place = np.minimum(np.searchsorted(known, tid), len(known) - 1)
        return np.where(known[place] == tid, process[place], UNKNOWN).astype(np.int32)

    def _in_irq(self, block: Block, base: Places) -> I8Array:
        if self.common.flags is None:
            return np.full(len(base), UNKNOWN, np.int8)
        found = (_column(block, base, self.common.flags) & _IN_IRQ) != 0
        made: I8Array = found.astype(np.int8)
        if self.common.preempt_count is not None:
            silent = _column(block, base, self.common.preempt_count) == _NO_CONTEXT
            made[silent] = UNKNOWN
        return made

    def _meet_threads(self, tid: I32Array) -> None:
        for one in np.unique(tid).tolist():
            if one not in self._tids:
                self._tids.add(one)
                comm = self.comms.get(one, _IDLE if one == 0 else _NO_NAME)
                self.tally.threads[one, comm] = self.tgids.get(one, UNKNOWN)


def _column(block: Block, base: Places, place: Field | None) -> U64Array:
    if place is None or not place.is_number:
        return np.full(len(base), np.uint64((1 << 64) - 1))
    return block.column(base, place)
