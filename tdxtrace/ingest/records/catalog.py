"""The events of a binary recording by number, with the layouts of their records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.batch import I64Array
from tdxtrace.ingest.events.registry import EventRegistry, function_named
from tdxtrace.ingest.records.formats import Common, EventFormat
from tdxtrace.ingest.records.layouts import FieldTables, Layout, layout_of
from tdxtrace.ingest.stats import SourceStats

NOT_INTERNED: Final = -1
_NUMBERS: Final = 1 << 16  # common_type has 16 bits: struct trace_entry
_STAND_INS: Final = 1 << 10


def _no_index() -> I64Array:
    return np.full(_NUMBERS + _STAND_INS + 1, NOT_INTERNED, np.int64)


@dataclass(slots=True)
class EventCatalog:
    """Gives a layout to each event number when its first record comes, and counts records."""

    formats: Mapping[int, EventFormat]
    common: Common
    registry: EventRegistry
    stats: SourceStats
    printed_name: Callable[[EventFormat], str]
    """What the recording's own tool prints as the name of an event."""
    symbol_at: Callable[[int], str | None] = lambda _: None
    """Names the kernel function at an address."""
    tables: FieldTables = field(default_factory=FieldTables)
    """By layout: where records have their fields."""
    layouts: list[Layout] = field(default_factory=list)
    index: I64Array = field(default_factory=_no_index)
    """By event number: index into ``layouts``, or NOT_INTERNED."""
    _numbers: list[int] = field(default_factory=list)
    """By layout: the event number."""

    def intern(self, number: int, int64_at: I64Array, record: int) -> int:
        """Return the layout of an event number, made from its first record if it is new.

        Args:
            number: What the record says it is.
            int64_at: The number that begins at each byte of a block.
            record: Byte of the block at which the record begins.
        """
        if self.index[number] == NOT_INTERNED:
            made = self.formats.get(number)
            if made is None:
                layout = Layout(0, "undecoded", f"event {number} without a format", {}, 0)
            else:
                symbol = self._symbol(made, int64_at, record)
                layout = layout_of(made, self.printed_name(made), self.registry, symbol)
            self._add(number, layout)
        return int(self.index[number])

    def add_stand_in(self, kind: str, name: str) -> int:
        """Return a number, which no record has, for records of which only this is known."""
        free = np.flatnonzero(self.index[_NUMBERS:-1] == NOT_INTERNED)
        number = _NUMBERS + (int(free[0]) if len(free) else _STAND_INS)
        self._add(number, Layout(0, kind, name, {}, 0))
        return number

    def _add(self, number: int, layout: Layout) -> None:
        self.index[number] = len(self.layouts)
        self.layouts.append(layout)
        self.tables.add(layout)
        self._numbers.append(number)

    def _symbol(self, made: EventFormat, int64_at: I64Array, record: int) -> str | None:
        """The function at an event's probe, where its name does not say it."""
        place = made.fields.get("__probe_func") or made.fields.get("__probe_ip")
        if place is None or not place.is_number or function_named(made.name) is not None:
            return None
        at = record + place.offset
        word = int(int64_at[at]) if at < len(int64_at) else 0
        return self.symbol_at(word & (1 << 8 * place.size) - 1)

    def wanted_numbers(self) -> Iterator[int]:
        """The numbers so far whose records become rows."""
        pairs = zip(self._numbers, self.layouts, strict=True)
        return (number for number, layout in pairs if layout.is_wanted)

    def count(self, counts: I64Array) -> None:
        """Account for records: those of rows by their name, others as losses.

        Args:
            counts: By layout: how many records came, the number of the first of them; how many
                of them lack room for their fields and are no rows, and the first of these.
        """
        n, line, n_short, short_line = (column.tolist() for column in counts.T)
        for _, which in sorted((self._numbers[x], x) for x in range(len(self.layouts)) if n[x]):
            layout = self.layouts[which]
            if layout.is_wanted:
                self.stats.events[layout.name] += n[which] - n_short[which]
            else:
                self.stats.count(layout.kind, layout.name, line[which], n[which])
        short = [x for x in range(len(self.layouts)) if n_short[x]]
        for which in sorted(short, key=lambda x: short_line[x]):
            name = self.layouts[which].name
            self.stats.count("undecoded", name, short_line[which], n_short[which])
