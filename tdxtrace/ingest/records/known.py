"""Which event numbers of a binary recording are ours, and what their records hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.events.met import Vocabulary
from tdxtrace.ingest.events.vocabulary import function_named
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, I8Array, I32Array, U64Array, Values
from tdxtrace.ingest.records.formats import Common, EventFormat, Field
from tdxtrace.ingest.records.gather import Block, Places
from tdxtrace.ingest.records.kept import KeptFields, Slots, slots_of
from tdxtrace.ingest.records.layouts import Layout, layout_of
from tdxtrace.ingest.tally import Tally

Numbers = NDArray[np.intp]
Found = NDArray[np.intp]

# enum trace_flag_type, Linux include/linux/trace_events.h: HARDIRQ and NMI.
_IN_IRQ: Final = np.uint64(0x08 | 0x40)
_NO_CONTEXT: Final = np.uint64(0xFF)  # preempt count of uprobe events: it tells nothing
_NUMBERS: Final = 1 << 16  # common_type has 16 bits: struct trace_entry
_STAND_INS: Final = 1 << 10
_NOT_MET: Final = -1


def _no_index() -> Numbers:
    return np.full(_NUMBERS + _STAND_INS + 1, _NOT_MET, np.intp)


def _none_wanted() -> BoolArray:
    return np.zeros(_NUMBERS + _STAND_INS + 1, np.bool_)


@dataclass(frozen=True, slots=True)
class ByLayout:
    """What is known of event numbers and, by the index of their layouts, of those."""

    index: Numbers
    """By number: of its layout."""
    size: Places
    """Bytes a record must have."""
    event: I32Array
    """Index into the vocabulary's events."""
    is_wanted: BoolArray
    """Whether its records become rows."""


@dataclass(slots=True)
class KnownEvents:
    """Learns what each event number means when its first record comes."""

    formats: Mapping[int, EventFormat]
    common: Common
    vocabulary: Vocabulary
    tally: Tally
    printed_name: Callable[[EventFormat], str]
    """What the recording's own tool prints as the name of an event."""
    symbol_at: Callable[[int], str | None] = lambda _: None
    """Names the kernel function at an address."""
    layouts: list[Layout] = field(default_factory=list)
    _index: Numbers = field(default_factory=_no_index)
    _wanted: BoolArray = field(default_factory=_none_wanted)
    _slots: Slots | None = None
    """Where the slots of the first layouts are, if all can be read late."""
    _n_slots: int = 0
    """Layouts that this is of."""

    def meet(
        self, number: Numbers, base: Places, block: Block, found: Found | None = None
    ) -> Found:
        """Learn the numbers that are new; return how often each occurs.

        Args:
            number: What the records say they are.
            base: Where they begin in ``block``.
            block: Their bytes.
            found: How often each number occurs, if that is known.
        """
        found = np.bincount(number, minlength=1) if found is None else found
        for value in np.flatnonzero(found).tolist():
            if self._index[value] == _NOT_MET:
                first = int(base[np.argmax(number == value)])
                self._take(value, self._layout(value, first, block))
        return found

    def count(self, found: Found, by_time: Callable[[], Numbers | I32Array], n_before: int) -> None:
        """Account for records: rows by their name, others as losses.

        Args:
            found: How often each number occurs.
            by_time: Gives the numbers of the records, by time; asked where a loss is met
                for the first time.
            n_before: Records before these.
        """
        for value in np.flatnonzero(found).tolist():
            layout, n = self.layouts[self._index[value]], int(found[value])
            if layout.is_wanted:
                self.tally.events[layout.name] += n
                continue
            line = None
            if (layout.kind, layout.name) not in self.tally.entries:
                line = int(np.argmax(by_time() == value)) + n_before + 1
            self.tally.count(layout.kind, layout.name, line, n)

    def are_met(self, found: Found) -> bool:
        """Whether all records have numbers that were met, by how often each number occurs."""
        return not (self._index[np.flatnonzero(found)] == _NOT_MET).any()

    def is_wanted(self, number: Numbers) -> BoolArray:
        """Which records become rows, by their numbers."""
        mask: BoolArray = self._wanted.take(number)
        return mask

    def are_wanted(self, found: Found) -> bool:
        """Whether all records become rows, by how often each number occurs."""
        return bool(self._wanted[np.flatnonzero(found)].all())

    def n_wanted(self, found: Found) -> int:
        """How many records become rows, by how often each number occurs."""
        return int(found[self._wanted[: len(found)]].sum())

    def index(self, number: Numbers) -> Found:
        """The indices of the layouts of numbers that were met."""
        made: Found = self._index.take(number)
        return made

    def stand_in(self, kind: str, name: str) -> int:
        """Return a number, which no record has, for records of which only this is known."""
        free = np.flatnonzero(self._index[_NUMBERS:-1] == _NOT_MET)
        value = _NUMBERS + int(free[0]) if len(free) else _NUMBERS + _STAND_INS
        self._take(value, Layout(0, kind, name, {}, 0))
        return value

    def _take(self, value: int, layout: Layout) -> None:
        self._index[value] = len(self.layouts)
        self._wanted[value] = layout.is_wanted
        self.layouts.append(layout)

    def has_room(self, index: Found, size: Places) -> BoolArray:
        """Which records are long enough for every field that their format promises."""
        least = np.array([layout.size for layout in self.layouts] or [0], np.intp)
        mask: BoolArray = size >= least.take(index)
        return mask

    def by_layout(self) -> ByLayout:
        """What a loop has to look up of every record."""
        sizes = np.array([layout.size for layout in self.layouts] or [0], np.intp)
        events = np.array([layout.event for layout in self.layouts] or [0], np.int32)
        wanted = np.array([layout.is_wanted for layout in self.layouts] or [False], np.bool_)
        return ByLayout(self._index, sizes, events, wanted)

    def wanted_numbers(self) -> Iterator[int]:
        """The numbers met so far whose records become rows."""
        for number in np.flatnonzero(self._index != _NOT_MET).tolist():
            if self.layouts[self._index[number]].is_wanted:
                yield number

    def events(self, index: Found) -> I32Array:
        """Index into the vocabulary's events for each record."""
        made: I32Array = np.array([x.event for x in self.layouts] or [0], np.int32).take(index)
        return made

    def kept(self, block: Block, base: Places, index: Found) -> KeptFields | None:
        """Leave the fields of the records at ``base`` where they are; None if that cannot be.

        The block must not be written again while they are needed.
        """
        if self._n_slots != len(self.layouts):
            self._slots, self._n_slots = slots_of(self.layouts), len(self.layouts)
        if self._slots is None:
            return None
        return KeptFields(block, base, index, self._slots, self.fields)

    def fields(self, block: Block, base: Places, index: Found) -> Values:
        """Read every slot of the records that begin at ``base``."""
        values: dict[str, U64Array] = {}
        present: dict[str, BoolArray] = {}
        for which in np.flatnonzero(np.bincount(index, minlength=1)).tolist():
            mine = np.flatnonzero(index == which)
            read, there = self.layouts[which].read(block, base[mine])
            for slot, column in read.items():
                if slot not in values:
                    values[slot] = np.zeros(len(base), np.uint64)
                    present[slot] = np.zeros(len(base), np.bool_)
                values[slot][mine] = column
                present[slot][mine] = there[slot]
        return values, present

    def context(self, block: Block, base: Places) -> tuple[I32Array, I8Array]:
        """Say of each record which thread made it, and whether in hard interrupt context."""
        common = self.common
        asked = {"tid": common.pid, "flags": common.flags, "count": common.preempt_count}
        places = {name: place for name, place in asked.items() if place and place.is_number}
        found = block.columns(base, places)
        tid = in_irq = np.full(len(base), UNKNOWN, np.int8)
        if "flags" in found:
            in_irq = ((found["flags"] & _IN_IRQ) != 0).astype(np.int8)
            if "count" in found:
                in_irq[found["count"] == _NO_CONTEXT] = UNKNOWN
        return found.get("tid", tid).astype(np.int32), in_irq

    def too_short(self, index: Found, lines: Iterable[int]) -> None:
        """Account for records that lack room for their fields; they are no rows."""
        for which, line in zip(index.tolist(), lines, strict=True):
            name = self.layouts[which].name
            self.tally.events[name] -= 1
            self.tally.count("undecoded", name, line)

    def _layout(self, value: int, first: int, block: Block) -> Layout:
        made = self.formats.get(value)
        if made is None:
            return Layout(0, "undecoded", f"event {value} without a format", {}, 0)
        name = self.printed_name(made)
        symbol = self._symbol(made, first, block)
        return layout_of(made, name, self.vocabulary, symbol)

    def _symbol(self, made: EventFormat, base: int, block: Block) -> str | None:
        """The function at an event's probe, where its name does not say it."""
        place: Field | None = made.fields.get("__probe_func") or made.fields.get("__probe_ip")
        if place is None or not place.is_number or function_named(made.name) is not None:
            return None
        return self.symbol_at(int(block.column(np.array([base], np.intp), place)[0]))
