"""Calls that are whole, many at once: their rows are made in one compiled loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.ingest.compiled import compiled
from tdxtrace.ingest.decoding.frames import Column, Room, frame, series
from tdxtrace.ingest.decoding.kinds import Kinds
from tdxtrace.ingest.decoding.pairing import Index
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, I8Array, I32Array, I64Array, RawEvents, U64Array
from tdxtrace.ingest.records.gather import Places
from tdxtrace.ingest.records.loops import RecordFields, Table
from tdxtrace.tables.events import SEAMCALLS

U8Array = NDArray[np.uint8]
U16Array = NDArray[np.uint16]

_Columns = tuple[I64Array, U16Array, I32Array, BoolArray, U8Array, U64Array, Index, BoolArray]

# Slots of the entry or, if it has none, of the return: decoding/attempts.py.
_OF_ENTRY: Final[Mapping[str, tuple[str, ...]]] = {
    name: (name,) for name in ("level", "td_id", "vp_id", "gpa", "page", "ext_err1", "ext_err2")
}
# Slots of the return, the first that it has: among them what a SEAMCALL answered.
_OF_RETURN: Final[Mapping[str, tuple[str, ...]]] = {
    **_OF_ENTRY,
    "ext_err1": ("ext_err1", "out_rcx"),
    "ext_err2": ("ext_err2", "out_rdx"),
    "status": ("status",),
}
# Others, as registers and numbers of functions, say more of a call than is read here.
_SIMPLE: Final = frozenset(slot for slots in _OF_RETURN.values() for slot in slots)
_PAIR_LINES: Final = 2
_LEVEL: Final = "level"
_MOST_CPU: Final = 0xFFFF
_MOST_LEVEL: Final = 0xFF


@dataclass(frozen=True, slots=True)
class _Words:
    """Where the words of some columns are, by the layouts of entry and return, and column."""

    names: tuple[str, ...]
    """The first is ``level``, whose numbers are small."""
    of_return: BoolArray
    """Whether it is the return that has the word."""
    offset: Places
    mask: U64Array
    """The bits that count; 0 where neither has the word."""
    sign: U64Array
    """The highest of them, if the number has a sign."""


@dataclass(slots=True)
class RowMaker:
    """Makes the rows of one source."""

    source: int
    room: Room
    """Where they are put."""
    _table: Table | None = None
    _names: frozenset[str] = frozenset()
    _words: _Words | None = None

    def rows(
        self, batch: RawEvents, kinds: Kinds, pairs: tuple[Index, Index]
    ) -> pl.DataFrame | None:
        """Make the rows of ``seamcalls`` of pairs of events, in the order of their returns.

        They are those that :class:`tdxtrace.ingest.decoding.attempts.Attempts` makes.

        Returns:
            None if the events say more than is read here.
        """
        fields = batch.kept
        if not isinstance(fields, RecordFields):
            return None
        names, met = fields.names(), fields.table.event[fields.layouts()]
        if not _is_simple(batch, kinds, names, met):
            return None
        n, words = len(pairs[0]), self._words_of(fields.table, names)
        made = _Made(
            self.room.give((3, n), np.int64),
            self.room.give((3, n), np.uint16),
            self.room.give((n,), np.int32),
            np.empty((3, n), np.bool_),
            self.room.give((n,), np.uint8),
            self.room.give((len(words.names) - 1, n), np.uint64),
            np.empty(n, np.intp),
            np.zeros(len(words.mask), np.bool_),
        )
        if not _rows(
            pairs,
            (batch.line, batch.ts_ns),
            (batch.cpu, batch.tid, batch.event, kinds.leaf),
            batch.in_irq,
            (fields.block.longs, fields.before.longs),
            (fields.base, fields.layout),
            (len(fields.table.size), words.of_return, words.offset, words.mask, words.sign),
            made.columns(),
        ):
            return None
        probes = np.unique(kinds.probe[met])
        columns: dict[str, Column] = {
            "source": self.source,
            "n_lines": _PAIR_LINES,
            "probe": int(probes[0]) if len(probes) == 1 else kinds.probe[batch.event[pairs[1]]],
        }
        seen: dict[str, BoolArray] = {}
        if batch.tgid.max(initial=UNKNOWN) != UNKNOWN:
            tgid = np.maximum(*(batch.tgid.take(at) for at in pairs))
            columns["tgid"], seen["tgid"] = tgid, tgid != UNKNOWN
        return frame(SEAMCALLS, n, columns, seen, made.series(words), self.room)

    def _words_of(self, table: Table, names: frozenset[str]) -> _Words:
        """Say where the words are of the columns that ``names`` can fill."""
        if self._words is None or self._table is not table or self._names != names:
            self._words, self._table, self._names = _words_of(table, names), table, names
        return self._words


@dataclass(frozen=True, slots=True)
class _Made:
    """The columns of some rows."""

    when: I64Array
    """Place in the source, begin and end."""
    small: U16Array
    """Leaf, CPU of the entry, CPU of the return."""
    tid: I32Array
    flags: BoolArray
    """Whether the begin is not after the end; whether in interrupt context; whether known."""
    level: U8Array
    value: U64Array
    """The other words."""
    kind: Index
    """Which row of :class:`_Words` each is of."""
    met: BoolArray
    """Which of those there are."""

    def columns(self) -> _Columns:
        """All of it, as a loop takes it."""
        whole = self.when, self.small, self.tid, self.flags
        return *whole, self.level, self.value, self.kind, self.met

    def series(self, words: _Words) -> dict[str, pl.Series]:
        """The columns that have anything."""
        made: dict[str, tuple[NDArray[Any], BoolArray | None]] = {
            "seq": (self.when[0].view(np.uint64), None),
            "start_ns": (self.when[1], self.flags[0]),
            "end_ns": (self.when[2], None),
            "leaf": (self.small[0], None),
            "start_cpu": (self.small[1], None),
            "cpu": (self.small[2], None),
            "tid": (self.tid, None),
            "in_irq": (self.flags[1], self.flags[2]),
        }
        for i, name in enumerate(words.names):
            has = words.mask[:, i] != 0
            seen = None if has[self.met].all() else has.take(self.kind)
            made[name] = (self.value[i - 1] if i else self.level), seen
        return {
            name: series(name, values, seen)
            for name, (values, seen) in made.items()
            if seen is None or seen.any()
        }


def _is_simple(batch: RawEvents, kinds: Kinds, names: frozenset[str], met: Index) -> bool:
    """Whether every event is of a wrapper of one leaf, and all is known that is always known."""
    return (
        not kinds.has_seamcalls
        and names <= _SIMPLE
        and not (kinds.leaf[met] == UNKNOWN).any()
        and not (batch.tid == UNKNOWN).any()
        and int(batch.cpu.min(initial=0)) >= 0
        and int(batch.cpu.max(initial=0)) <= _MOST_CPU
    )


def _words_of(table: Table, names: frozenset[str]) -> _Words:
    """Say where the words are of the columns that ``names`` can fill."""
    columns = tuple(
        column
        for column, slots in _OF_RETURN.items()
        if column == _LEVEL or not names.isdisjoint(slots)
    )
    n = len(table.size)
    shape = n, n, len(columns)
    made = _Words(
        columns,
        np.zeros(shape, np.bool_),
        np.zeros(shape, np.intp),
        np.zeros(shape, np.uint64),
        np.zeros(shape, np.uint64),
    )
    for at, column in enumerate(columns):
        # The last that is written counts: the entry's, else the first of the return's.
        for slot in reversed(_OF_RETURN[column]):
            _put(made, table, slot, np.s_[:, :, at], of_return=True)
        for slot in _OF_ENTRY.get(column, ()):
            _put(made, table, slot, np.s_[:, :, at], of_return=False)
    flat = n * n, len(columns)
    return _Words(
        columns,
        made.of_return.reshape(flat),
        made.offset.reshape(flat),
        made.mask.reshape(flat),
        made.sign.reshape(flat),
    )


def _put(made: _Words, table: Table, slot: str, where: Any, *, of_return: bool) -> None:  # noqa: ANN401
    """Say where a slot is, for the layouts that have it."""
    if slot not in table.names:
        return
    row = table.names.index(slot)
    bits = table.bits[row]
    has = bits > 0
    ones = np.where(has, ~np.uint64(0) >> (np.uint64(64) - np.where(has, bits, 1)), np.uint64(0))
    top = np.where(table.is_signed[row], ones ^ (ones >> np.uint64(1)), np.uint64(0))
    every = np.s_[:] if of_return else np.s_[:, None]
    for array, values in (
        (made.of_return, np.full(len(bits), of_return)),
        (made.offset, table.offset[row]),
        (made.mask, ones),
        (made.sign, top),
    ):
        into = array[where]
        np.copyto(into, values[every], where=np.broadcast_to(has[every], into.shape))


@compiled
def _rows(
    pairs: tuple[Index, Index],
    moments: tuple[I64Array, I64Array],
    who: tuple[I32Array, I32Array, I32Array, I32Array],
    in_irq: I8Array,
    blocks: tuple[U64Array, U64Array],
    records: tuple[Places, Index],
    words: tuple[int, BoolArray, Places, U64Array, U64Array],
    into: _Columns,
) -> bool:
    """Write the columns of every pair; return whether every level is as small as it should be."""
    entry, back = pairs
    line, ts_ns = moments
    cpu_of, tid_of, event, leaf_of = who
    base, layout = records
    data, before = blocks
    n_layouts, of_return, offset, mask, sign = words
    when, small, tid, flags, level, value, kinds, met = into
    greatest = np.uint64(0)
    for i in range(len(entry)):
        # Unsigned, so that no place is looked up from the end.
        first, last = np.uint64(entry[i]), np.uint64(back[i])
        when[0, i], when[1, i], when[2, i] = line[last], ts_ns[first], ts_ns[last]
        small[0, i], small[1, i], small[2, i] = leaf_of[event[last]], cpu_of[first], cpu_of[last]
        tid[i] = tid_of[last]
        context = in_irq[last] if in_irq[last] != UNKNOWN else in_irq[first]
        flags[0, i], flags[1, i] = ts_ns[first] <= ts_ns[last], context == 1
        flags[2, i] = context != UNKNOWN
        kind = np.uint64(layout[first] * n_layouts + layout[last])
        kinds[i] = kind
        met[kind] = True
        for column in range(mask.shape[1]):
            record = base[last] if of_return[kind, column] else base[first]
            at = (record if record >= 0 else ~record) + offset[kind, column]
            shift, place = np.uint64((at & 7) * 8), np.uint64(at >> 3)
            after = place + np.uint64(1)
            if record >= 0:
                low, high = data[place], data[after]
            else:
                low, high = before[place], before[after]
            word = low >> shift | high << np.uint64(1) << np.uint64(63) - shift
            word &= mask[kind, column]
            word = (word ^ sign[kind, column]) - sign[kind, column]
            if column:
                value[column - 1, i] = word
            else:
                level[i] = word
                greatest = max(greatest, word)
    return bool(greatest <= np.uint64(_MOST_LEVEL))
