"""Compiled loops over little-endian records: what their fields hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tdxtrace.ingest.compiled import compiled, inlined
from tdxtrace.ingest.memory import behind
from tdxtrace.ingest.raw import BoolArray, Fields, I32Array, Index, U64Array, Values, Words
from tdxtrace.ingest.records.gather import PADDING, Block, Bytes, Places
from tdxtrace.ingest.records.layouts import Layout


@dataclass(frozen=True, slots=True)
class Table:
    """Where records have each slot: arrays of one row per slot, one column per layout."""

    names: tuple[str, ...]
    offset: Places
    bits: U64Array
    """Of the number; 0 where the layout lacks the slot."""
    is_signed: BoolArray
    size: Places
    """By layout: bytes that a record must have."""
    event: Index
    """By layout: index into the registry's events."""
    is_printed: bool = False
    """Whether the numbers are as KVM prints them, not as it records them."""


def table_of(layouts: Sequence[Layout]) -> Table:
    """Say where each slot is."""
    names = tuple(sorted({name for layout in layouts for name in layout.reads}))
    shape = len(names), len(layouts)
    made = Table(
        names,
        np.zeros(shape, np.intp),
        np.zeros(shape, np.uint64),
        np.zeros(shape, np.bool_),
        np.array([layout.size for layout in layouts], np.intp),
        np.array([layout.event for layout in layouts], np.intp),
    )
    for column, layout in enumerate(layouts):
        for name, place in layout.reads.items() if layout.is_wanted else ():
            at = names.index(name), column
            made.offset[at], made.bits[at] = place.offset, 8 * place.size
            made.is_signed[at] = place.signed
    return made


@dataclass(slots=True)
class RecordFields:
    """The fields of some records, read all at once when the first is asked for.

    Every record must have room for the fields of its own layout.
    """

    block: Block
    before: Block
    """Records that were copied from blocks before."""
    base: Places
    """Byte of the block at which each record begins; of one in ``before`` its complement."""
    layout: Index
    table: Table
    met: Index | None = None
    """The layouts that occur, if that is known."""
    has_room: bool = False
    """Whether ``base`` and ``layout`` were made by memory.roomy."""
    _read: dict[str, Words] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.base)

    def layouts(self) -> Index:
        """The layouts that occur, ascending."""
        if self.met is None:
            self.met = np.flatnonzero(np.bincount(self.layout, minlength=1))
        return self.met

    def names(self) -> frozenset[str]:
        """The slots that any of the records has."""
        has = self.table.bits[:, self.layouts()].max(axis=1, initial=0)
        return frozenset(self.table.names[row] for row in np.flatnonzero(has))

    def pick(self, at: Index | BoolArray) -> RecordFields:
        """The fields of the records at ``at``, in that order."""
        base, layout = self.base[at], self.layout[at]
        return RecordFields(self.block, self.before, base, layout, self.table)

    def get(self, name: str) -> Words:
        """Return a slot that is among :meth:`names`."""
        if not self._read:
            self._read_all()
        return self._read[name]

    def _read_all(self) -> None:
        names = sorted(self.names())
        rows = [self.table.names.index(name) for name in names]
        value = np.empty((len(names), len(self)), np.uint64)
        there = np.empty((len(names), len(self)), np.bool_)
        table = self.table
        of = table.offset[rows], table.bits[rows], table.is_signed[rows]
        _read(self.block.longs, self.before.longs, self.base, self.layout, of, value, there)
        self._read = {name: (value[row], there[row]) for row, name in enumerate(names)}

    def settle(self) -> Values:
        """Return all of them as arrays."""
        found = {name: self.get(name) for name in sorted(self.names())}
        values = {name: value for name, (value, _) in found.items()}
        present = {name: there for name, (_, there) in found.items()}
        return values, present

    def apart(self) -> RecordFields:
        """The same fields, in copies of their records: the block is not needed any more."""
        size = (self.table.size[self.layout] + 7) & ~7
        place = np.cumsum(size) - size
        copy = np.zeros(int(size.sum()) + PADDING, np.uint8)
        _copy(self.block.data, self.before.data, self.base, size, copy)
        block = Block(copy, self.block.order)
        return RecordFields(block, block, ~place, self.layout, self.table)

    def after(self, first: Fields) -> RecordFields | None:
        """Put these behind others; None if those are not apart, or of other layouts."""
        if not isinstance(first, RecordFields) or first.table is not self.table:
            return None
        if (first.base >= 0).any():
            return None
        if self.has_room:
            base, layout = behind(first.base, self.base), behind(first.layout, self.layout)
        else:
            base = np.concatenate([first.base, self.base])
            layout = np.concatenate([first.layout, self.layout])
        met = np.union1d(first.layouts(), self.layouts())
        return RecordFields(self.block, first.before, base, layout, self.table, met)


@inlined
def met(tid: np.int32, is_met: BoolArray, tids: I32Array, n: int) -> int:
    """Put a thread behind the first ``n`` of ``tids`` unless it was met; return how many then.

    ``is_met`` says it of threads by their numbers, up to some: unusual ones come again.
    """
    is_usual = 0 <= tid < len(is_met)
    if is_usual and is_met[np.uint64(tid)]:
        return n
    tids[n] = tid
    if is_usual:
        is_met[np.uint64(tid)] = True
    return n + 1


@compiled
def _read(
    data: U64Array,
    before: U64Array,
    base: Places,
    layout: Index,
    table: tuple[Places, U64Array, BoolArray],
    value: U64Array,
    there: BoolArray,
) -> None:
    """Read every slot of every record; 0 where it lacks it."""
    offset, bits, is_signed = table
    for i in range(len(base)):
        column, at = layout[i], base[i]
        words = data if at >= 0 else before
        start = at if at >= 0 else ~at
        for slot in range(len(offset)):
            n = bits[slot, column]
            there[slot, i] = n != 0
            value[slot, i] = 0
            if n != 0:
                place = start + offset[slot, column]
                shift = np.uint64(place & 7) * np.uint64(8)
                low, high = words[place >> 3], words[(place >> 3) + 1]
                word = low >> shift | high << np.uint64(1) << np.uint64(63) - shift
                unused = np.uint64(64) - n
                if is_signed[slot, column]:
                    value[slot, i] = np.int64(word << unused) >> np.int64(unused)
                else:
                    value[slot, i] = word << unused >> unused


@compiled
def _copy(data: Bytes, before: Bytes, base: Places, size: Places, into: Bytes) -> None:
    """Copy records behind one another."""
    place = 0
    for i in range(len(base)):
        for k in range(size[i]):
            into[place + k] = data[base[i] + k] if base[i] >= 0 else before[~base[i] + k]
        place += size[i]
