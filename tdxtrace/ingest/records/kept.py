"""Fields of records that are read when rows are made of them, not before.

Most fields are wanted of one of the two events that make a row: read late, they are
read once, to where they stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tdxtrace.ingest.raw import BoolArray, Index, U64Array, Values, Words
from tdxtrace.ingest.records.formats import Field
from tdxtrace.ingest.records.gather import Block, Places
from tdxtrace.ingest.records.layouts import Layout


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the records of some layouts have a slot, as numbers of one size."""

    field: Field
    """Of those that have it; its offset is 0 where they do not agree."""
    offsets: Places | None
    """By layout; None where all of them agree."""
    has: BoolArray
    """By layout."""


Slots = Mapping[str, tuple[Slot, ...]]
"""By name: one for each size in which it occurs, the commonest first."""


def slots_of(layouts: Sequence[Layout]) -> Slots | None:
    """Say where each slot is; None where some records cannot be read so simply."""
    wanted = [layout for layout in layouts if layout.is_wanted]
    if any(layout.kind != "call" for layout in wanted):
        return None
    made: dict[str, tuple[Slot, ...]] = {}
    for name in sorted({name for layout in wanted for name in layout.reads}):
        places = [layout.reads.get(name) if layout.is_wanted else None for layout in layouts]
        shapes = Counter((place.size, place.signed) for place in places if place is not None)
        made[name] = tuple(_slot(places, *shape) for shape, _ in shapes.most_common())
    return made


def _slot(every: Sequence[Field | None], size: int, signed: bool) -> Slot:
    places = [p if p is not None and (p.size, p.signed) == (size, signed) else None for p in every]
    first = next(place for place in places if place is not None)
    same = all(place.offset == first.offset for place in places if place is not None)
    offsets = np.array([0 if place is None else place.offset for place in places], np.intp)
    has = np.array([place is not None for place in places], np.bool_)
    return Slot(first if same else replace(first, offset=0), None if same else offsets, has)


@dataclass(frozen=True, slots=True)
class KeptFields:
    """The fields of some records, in their block.

    Every record must have room for the fields of its own layout; what is read of
    one whose layout lacks a slot is replaced by 0.
    """

    block: Block
    base: Places
    layout: Index
    """Index of each record's layout."""
    slots: Slots
    read: Callable[[Block, Places, Index], Values]
    """Reads all fields of records of any layout."""

    def __len__(self) -> int:
        return len(self.base)

    def names(self) -> frozenset[str]:
        """The slots that any of the records may have."""
        return frozenset(self.slots)

    def pick(self, at: Index | BoolArray) -> KeptFields:
        """The fields of the records at ``at``, in that order."""
        return replace(self, base=self.base[at], layout=self.layout[at])

    def get(self, name: str) -> Words:
        """Return a slot that is among :meth:`names`."""
        first, *others = self.slots[name]
        there = first.has.take(self.layout)
        value = self._read(first, there)
        for slot in others:
            where = np.flatnonzero(slot.has.take(self.layout))
            if len(where):
                mine = self.pick(where)
                there[where] = True
                value[where] = mine._read(slot, np.ones(len(where), np.bool_))
        return value, there

    def _read(self, slot: Slot, there: BoolArray) -> U64Array:
        """Read a slot of the records that have it; of others it is 0."""
        if not there.any():
            return np.zeros(len(there), np.uint64)
        base, place, every = self.base, slot.field, bool(there.all())
        if slot.offsets is not None:
            base = base + slot.offsets.take(self.layout)
        elif not every and int(base.max()) + place.end > len(self.block.data):
            # Those that lack it may be too short for it: they read what begins them.
            base = np.where(there, base, base - place.offset)
        value = self.block.column(base, place)
        return value if every else value * there

    def settle(self) -> Values:
        """Return all of them as arrays."""
        return self.read(self.block, self.base, self.layout)
