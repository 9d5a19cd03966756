"""Calls that are whole, many at once: their rows are made in one compiled loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.ingest.compiled import compiled
from tdxtrace.ingest.decoding.frames import Column, Room, frame, series
from tdxtrace.ingest.decoding.kinds import Kinds
from tdxtrace.ingest.decoding.pairing import Index
from tdxtrace.ingest.decoding.rowwords import SIMPLE, Words, words_of
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, I8Array, I32Array, I64Array, RawEvents, U64Array
from tdxtrace.ingest.records.gather import Places
from tdxtrace.ingest.records.loops import RecordFields, Table
from tdxtrace.tables.events import SEAMCALLS

U8Array = NDArray[np.uint8]
U16Array = NDArray[np.uint16]

_Columns = tuple[I64Array, U16Array, I32Array, U8Array, U64Array, BoolArray, BoolArray]

_PAIR_LINES: Final = 2
_MOST_CPU: Final = 0xFFFF
_MOST_LEVEL: Final = 0xFF
# Columns begin where Arrow wants them if their rows are a multiple of this.
_ROWS: Final = 64


class _Shape(NamedTuple):
    """What the rows of a frame have in common."""

    table: Table
    slots: frozenset[str]
    """That their events may have."""
    words: Words
    probe: int | None
    """None: they differ."""
    has_tgid: bool


@dataclass(slots=True)
class _Filled:
    """Columns of which the first ``n`` rows are filled."""

    shape: _Shape
    when: I64Array
    """Place in the source, begin and end."""
    small: U16Array
    """Leaf, CPU of the entry, CPU of the return."""
    tid: I32Array
    level: U8Array
    value: U64Array
    """The other words."""
    tgid: I32Array
    """Empty if none is known."""
    flags: BoolArray
    """Whether the begin is not after the end; whether in interrupt context; whether known."""
    seen: BoolArray
    """Whether there is a level, and each of the other words."""
    probe: I8Array
    n: int = 0
    n_given: int = 0
    """Rows that a frame has already."""

    @classmethod
    def new(cls, shape: _Shape, room: Room, n_rows: int) -> _Filled:
        """Columns for ``n_rows``, but not for more than the room gives at once."""
        n_words = len(shape.words.names)
        parts = (
            *((3, np.int64), (3, np.uint16), (1, np.int32), (1, np.uint8)),
            *((n_words - 1, np.uint64), (int(shape.has_tgid), np.int32)),
        )
        width = sum(n * np.dtype(kind).itemsize for n, kind in parts)
        most = max(1, room.at_once // (width * _ROWS))
        n_rows = min(most, n_rows // _ROWS + 1) * _ROWS
        memory, at = room.give((n_rows * width,), np.uint8), 0
        made: list[NDArray[Any]] = []
        for n, kind in parts:
            end = at + n * n_rows * np.dtype(kind).itemsize
            made.append(memory[at:end].view(kind).reshape(n, n_rows))
            at = end
        when, small, tid, level, value, tgid = made
        flags, seen = np.empty((3, n_rows), np.bool_), np.empty((n_words, n_rows), np.bool_)
        probe = np.empty(n_rows if shape.probe is None else 0, np.int8)
        return cls(shape, when, small, tid[0], level[0], value, tgid, flags, seen, probe)

    @property
    def n_rows(self) -> int:
        """Rows that there can be."""
        return len(self.tid)

    def add(self, batch: RawEvents, kinds: Kinds, pairs: tuple[Index, Index]) -> bool:
        """Fill the next rows, which must be left; False, and nothing, if a level is none."""
        fields, words = batch.kept, self.shape.words
        assert isinstance(fields, RecordFields)
        if not _rows(
            pairs,
            (batch.line, batch.ts_ns),
            (batch.cpu, batch.tid, batch.event, kinds.leaf),
            batch.in_irq,
            (fields.block.longs, fields.before.longs),
            (fields.base, fields.layout),
            (len(fields.table.size), words.of_return, words.offset, words.mask, words.sign),
            self.n,
            (self.when, self.small, self.tid, self.level, self.value, self.flags, self.seen),
        ):
            return False
        mine = slice(self.n, self.n + len(pairs[0]))
        if len(self.tgid):
            first, last = (batch.tgid.take(at) for at in pairs)
            np.maximum(first, last, out=self.tgid[0, mine])
        if len(self.probe):
            self.probe[mine] = kinds.probe[batch.event[pairs[1]]]
        self.n = mine.stop
        return True

    def frame(self, source: int) -> pl.DataFrame:
        """The rows that no frame has yet, as ``seamcalls``."""
        mine, n = slice(self.n_given, self.n), self.n - self.n_given
        self.n_given = self.n
        made: dict[str, tuple[NDArray[Any], BoolArray | None]] = {
            "seq": (self.when[0].view(np.uint64), None),
            "start_ns": (self.when[1], self.flags[0, mine]),
            "end_ns": (self.when[2], None),
            "leaf": (self.small[0], None),
            "start_cpu": (self.small[1], None),
            "cpu": (self.small[2], None),
            "tid": (self.tid, None),
            "in_irq": (self.flags[1], self.flags[2, mine]),
        }
        if len(self.tgid):
            made["tgid"] = self.tgid[0], self.tgid[0, mine] != UNKNOWN
        for i, name in enumerate(self.shape.words.names):
            made[name] = self.value[i - 1] if i else self.level, self.seen[i, mine]
        columns: dict[str, Column] = {
            "source": source,
            "n_lines": _PAIR_LINES,
            "probe": self.probe[mine] if self.shape.probe is None else self.shape.probe,
        }
        given = {
            name: series(name, values[mine], seen)
            for name, (values, seen) in made.items()
            if seen is None or seen.any()
        }
        return frame(SEAMCALLS, n, columns, {}, given)


@dataclass(slots=True)
class RowMaker:
    """Makes the rows of one source: of many batches those of one frame."""

    source: int
    room: Room
    """Where they are put."""
    _filled: _Filled | None = None
    """Where the next rows are put."""
    _full: list[pl.DataFrame] = field(default_factory=list)

    def add(self, batch: RawEvents, kinds: Kinds, pairs: tuple[Index, Index]) -> bool:
        """Make the rows of ``seamcalls`` of pairs of events, in the order of their returns.

        They are those that :class:`tdxtrace.ingest.decoding.attempts.Attempts` makes.

        Returns:
            False if the events say more than is read here: then there are none of them.
        """
        fields = batch.kept
        if not isinstance(fields, RecordFields):
            return False
        names, met = fields.names(), fields.table.event[fields.layouts()]
        if not _is_simple(batch, kinds, names, met):
            return False
        has_tgid = bool(batch.tgid.max(initial=UNKNOWN) != UNKNOWN)
        probes = np.unique(kinds.probe[met]).tolist()
        probe = probes[0] if len(probes) == 1 else None
        n_pairs = len(pairs[0])
        filled = first = self._fitting((fields.table, names, probe, has_tgid), n_pairs)
        n_before, done, whole = first.n, 0, []
        while done < n_pairs:
            if filled.n == filled.n_rows:
                whole.append(filled)
                filled = _Filled.new(filled.shape, self.room, 2 * filled.n_rows)
            which = slice(done, done + filled.n_rows - filled.n)
            if not filled.add(batch, kinds, (pairs[0][which], pairs[1][which])):
                first.n = n_before
                return False
            done = which.stop
        for one in whole:
            self._give(one)
        self._filled = filled
        return True

    def _fitting(self, of: tuple[Table, frozenset[str], int | None, bool], n_rows: int) -> _Filled:
        """Where rows are put that have this in common, now and if they come in turn with others.

        What is not filled of columns is lost: they are no longer than ``n_rows`` at first.
        """
        table, slots, probe, has_tgid = of
        if self._filled is not None:
            before = self._filled.shape
            probe = probe if probe == before.probe else None
            has_tgid = has_tgid or before.has_tgid
            slots = slots | before.slots if table is before.table else slots
            is_same = (slots, probe, has_tgid) == (before.slots, before.probe, before.has_tgid)
            if is_same and table is before.table:
                return self._filled
            self._give(self._filled)
        shape = _Shape(table, slots, words_of(table, slots), probe, has_tgid)
        self._filled = _Filled.new(shape, self.room, n_rows)
        return self._filled

    def _give(self, filled: _Filled) -> None:
        if filled.n > filled.n_given:
            self._full.append(filled.frame(self.source))

    def full(self) -> list[pl.DataFrame]:
        """The frames that were filled since this was asked last."""
        full, self._full = self._full, []
        return full

    def rest(self) -> list[pl.DataFrame]:
        """The same and the rows that no frame has yet."""
        if self._filled is not None:
            self._give(self._filled)
        return self.full()


def _is_simple(batch: RawEvents, kinds: Kinds, names: frozenset[str], met: Index) -> bool:
    """Whether every event is of a wrapper of one leaf, and all is known that is always known."""
    return (
        not kinds.has_seamcalls
        and names <= SIMPLE
        and not (kinds.leaf[met] == UNKNOWN).any()
        and not (batch.tid == UNKNOWN).any()
        and int(batch.cpu.min(initial=0)) >= 0
        and int(batch.cpu.max(initial=0)) <= _MOST_CPU
    )


@compiled
def _rows(
    pairs: tuple[Index, Index],
    moments: tuple[I64Array, I64Array],
    who: tuple[I32Array, I32Array, I32Array, I32Array],
    in_irq: I8Array,
    blocks: tuple[U64Array, U64Array],
    records: tuple[Places, Index],
    words: tuple[int, BoolArray, Places, U64Array, U64Array],
    n_before: int,
    into: _Columns,
) -> bool:
    """Write the columns of every pair; return whether every level is as small as it should be."""
    entry, back = pairs
    line, ts_ns = moments
    cpu_of, tid_of, event, leaf_of = who
    base, layout = records
    data, before = blocks
    n_layouts, of_return, offset, mask, sign = words
    when, small, tid, level, value, flags, seen = into
    greatest = np.uint64(0)
    for i in range(len(entry)):
        # Unsigned, so that no place is looked up from the end.
        first, last, to = np.uint64(entry[i]), np.uint64(back[i]), np.uint64(n_before + i)
        when[0, to], when[1, to], when[2, to] = line[last], ts_ns[first], ts_ns[last]
        small[0, to] = leaf_of[event[last]]
        small[1, to], small[2, to] = cpu_of[first], cpu_of[last]
        tid[to] = tid_of[last]
        context = in_irq[last] if in_irq[last] != UNKNOWN else in_irq[first]
        flags[0, to], flags[1, to] = ts_ns[first] <= ts_ns[last], context == 1
        flags[2, to] = context != UNKNOWN
        kind = np.uint64(layout[first] * n_layouts + layout[last])
        for column in range(mask.shape[1]):
            at = np.uint64(column)
            bits, word = mask[kind, at], np.uint64(0)
            if bits:
                record = base[last] if of_return[kind, at] else base[first]
                begin = (record if record >= 0 else ~record) + offset[kind, at]
                shift, place = np.uint64((begin & 7) * 8), np.uint64(begin >> 3)
                after = place + np.uint64(1)
                if record >= 0:
                    low, high = data[place], data[after]
                else:
                    low, high = before[place], before[after]
                word = (low >> shift | high << np.uint64(1) << np.uint64(63) - shift) & bits
                word = (word ^ sign[kind, at]) - sign[kind, at]
            seen[at, to] = bits != np.uint64(0)
            if column:
                value[at - np.uint64(1), to] = word
            else:
                level[to] = word
                greatest = max(greatest, word)
    return bool(greatest <= np.uint64(_MOST_LEVEL))
