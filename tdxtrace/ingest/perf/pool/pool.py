"""Samples of a large perf.data that wait for their turn, read by compiled loops.

What becomes of every sample is what held.Held makes of it.  Records that become rows
are copied out of their block to where samples wait, the *store*, and are read there: when
samples are given out, those that wait on move to another one.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.perf import attrs, loops
from tdxtrace.ingest.perf.attrs import SampleLayout
from tdxtrace.ingest.perf.blocks import Records
from tdxtrace.ingest.perf.held import Given, StandIns
from tdxtrace.ingest.perf.pool import loops as waiting
from tdxtrace.ingest.perf.samples import SampleReader
from tdxtrace.ingest.raw import MANY_EVENTS, BoolArray, I32Array, I64Array, RawEvents, U64Array
from tdxtrace.ingest.records.gather import PADDING, Block, Places
from tdxtrace.ingest.records.known import KnownEvents
from tdxtrace.ingest.records.loops import RecordFields, Table, table_of
from tdxtrace.ingest.tally import USUAL_TIDS, Tally

_COLUMNS: Final = ("ts_ns", "place")
_ROWS: Final = (
    *(np.int64, np.int64),
    *(np.int32, np.int32, np.int32, np.int8, np.int32),
    *(np.intp, np.intp),
)
assert loops.SLACK * 8 >= PADDING


def _none() -> I64Array:
    return np.zeros(0, np.int64)


class Shape(NamedTuple):
    """What loops.hold needs to know of samples."""

    table: NDArray[np.int64]
    """A row for each layout of samples: see loops."""
    layout_of: Places
    """By attribute; one row needs none."""
    id_at: int
    """Where every sample has its id; -1 if none tells whose it is: then of the first attribute."""
    ids: U64Array
    attr_of_id: Places
    room: int
    """Bytes that a record must have to say what event it is."""


@dataclass(slots=True)
class Pool:
    """Samples that wait, in columns that are filled again and again."""

    known: KnownEvents
    samples: SampleReader
    names: StandIns
    tally: Tally
    shape: Shape
    places: tuple[int, int, int, int]
    """What loops.hold needs to know of records."""
    _n: int = 0
    _n_words: int = 0
    _n_rows: int = 0
    _columns: list[I64Array] = field(default_factory=lambda: [_none()] * len(_COLUMNS))
    """When each sample was taken, and where it is in the store."""
    _store: I64Array = field(default_factory=_none)
    _free: list[I64Array] = field(default_factory=list)
    """What was a store, and nothing refers to any more."""
    _is_met: BoolArray = field(default_factory=lambda: np.zeros(USUAL_TIDS, np.bool_))
    """By thread number: all false between one batch and the next."""
    _spare: I64Array = field(default_factory=_none)
    """What samples are ordered in."""
    _least: I64Array = field(default_factory=_none)
    """Bytes of each layout's records, -1 for those that are no rows."""
    _words: I64Array = field(default_factory=_none)
    _table: Table = field(default_factory=lambda: table_of([]))
    _index: I64Array = field(default_factory=_none)
    _event: I32Array = field(default_factory=lambda: _none().astype(np.int32))
    _short: I64Array = field(default_factory=_none)
    _silent: I64Array = field(default_factory=_none)
    _n_numbers: int = 0
    _given: int | None = None
    """Up to when samples were given out that are still in the columns."""

    def __post_init__(self) -> None:
        self._look_up()

    def __len__(self) -> int:
        self._drop()
        return self._n

    def times(self) -> I64Array:
        """When the samples that wait were taken."""
        self._drop()
        return self._columns[0][: self._n]

    def hold(self, records: Records) -> I64Array:
        """Take the samples of a block."""
        self._drop()
        longs = records.block.data.view(np.int64)
        self._make_room(records.n_samples, len(longs))
        newest = np.empty(len(records.others) + 1, np.int64)
        if not self._hold(longs, records, newest):
            self.names.learn(self.samples.read(records))
            self._look_up()
            if not self._hold(longs, records, newest):
                raise AssertionError("compiled loops ask for what numpy does not find")
        return newest

    def _hold(self, longs: I64Array, records: Records, newest: I64Array) -> bool:
        """Put samples where they wait, if all about them is known."""
        n, n_words, n_rows = loops.hold(
            longs,
            (records.start, records.end, records.others),
            tuple(self.shape),
            (self._index, self._least, self._short, self._silent),
            self.places,
            (*self._columns, self._store),
            self._n,
            self._n_words,
            newest,
        )
        if n_words < 0:
            return False
        self._n, self._n_words, self._n_rows = n, n_words, self._n_rows + n_rows
        return True

    def _look_up(self) -> None:
        """Take what the loops need to know of layouts, of which there may be more now."""
        layouts, names, known = self.known.layouts, self.names, self.known.by_layout()
        self._least = np.array([x.size if x.is_wanted else -1 for x in layouts], np.int64)
        self._words = (self._least + 7) >> 3
        self._table = table_of(layouts)
        self._index, self._event = known.index, known.event
        self._short = np.array([names.short.get(n, -1) for n in range(len(layouts))], np.int64)
        n_attrs = max(1, len(self.samples.attrs))
        self._silent = np.array([names.silent.get(n, -1) for n in range(n_attrs)], np.int64)
        self._n_numbers = int(np.flatnonzero(known.index >= 0).max(initial=-1)) + 1

    def give(self, limit: int, n_before: int, is_plain: bool) -> Given | None:
        """Give out the samples up to a moment."""
        self._drop()
        n, store, tally = self._n, self._store, self.tally
        if len(self._spare) < 5 * n + 1:
            self._spare = np.empty(5 * len(self._columns[0]) + 1, np.int64)
        time, order, spare, bounds = np.split(self._spare[: 5 * n + 1], (n, 2 * n, 4 * n))
        ts_ns, place = self._columns
        n_due = waiting.sort(ts_ns, place, n, limit, time, order, spare, bounds)
        if not n_due:
            return None
        time, order = time[:n_due], order[:n_due]
        rows = tuple(np.empty(min(n_due, self._n_rows), kind) for kind in _ROWS)
        found = np.zeros(self._n_numbers, np.intp)
        heard = tally.first_ns, tally.last_ns
        if not is_plain:
            heard = heard[0].copy(), heard[1].copy()
        tids = np.empty(len(rows[0]), np.int32)
        threads = self._is_met, tids
        n_rows, n_tids = waiting.give(
            time, order, n_before, store, self._event, found, heard, rows, threads
        )
        self._given = limit
        raw = self._raw([row[:n_rows] for row in rows])
        tids = np.unique(tids[:n_tids])
        self._is_met[tids[(tids >= 0) & (tids < len(self._is_met))]] = False
        halves = store.view(np.int32)
        return Given(
            n_due,
            raw,
            found,
            lambda: halves[1::2][order],
            None if is_plain else lambda: (halves[order << 1], time),
            tids,
        )

    def _raw(self, rows: list[NDArray[Any]]) -> RawEvents:
        line, ts_ns, tid, tgid, cpu, in_irq, event, base, layout = rows
        block = Block(self._store.view(np.uint8), "<")
        weakref.finalize(block, self._free.append, self._store).atexit = False
        fields = RecordFields(block, block, base, layout, self._table)
        raw = RawEvents(line, ts_ns, tid, tgid, cpu, in_irq, event, kept=fields)
        return raw if len(raw) >= MANY_EVENTS else raw.settled()

    def _drop(self) -> None:
        """Let go what was given out."""
        if self._given is not None:
            ts_ns, place = self._columns
            store, self._store = self._store, store_of(len(self._store), self._free)
            of = self._n, self._given, ts_ns, place
            made = waiting.keep(*of, store, self._words, self._store)
            self._n, self._n_words, self._n_rows = made
            self._given = None

    def _make_room(self, n_samples: int, n_words: int) -> None:
        """Have room for so many more samples of a block of so many words."""
        n = self._n + n_samples
        if n > len(self._columns[0]):
            self._columns = [_grown(column, self._n, n) for column in self._columns]
        n_words += self._n_words + loops.HEAD * n_samples + loops.SLACK
        if n_words > len(self._store):
            self._store = _grown(self._store, self._n_words, n_words)


def store_of(n_words: int, free: list[I64Array]) -> I64Array:
    """A store of so many words: one of ``free``, if it is long enough; others are let go."""
    while free:
        store = free.pop()
        if len(store) >= n_words:
            return store
    return np.empty(n_words, np.int64)


def _grown(column: I64Array, n: int, least: int) -> I64Array:
    """A longer column with the same first ``n`` entries."""
    made = np.empty(max(least, len(column) * 5 // 4), np.int64)
    made[:n] = column[:n]
    return made


def pool_of(
    known: KnownEvents, samples: SampleReader, names: StandIns, tally: Tally
) -> Pool | None:
    """Return a pool for samples of the attributes that were learnt; None if loops cannot read them.

    They can where records say within their first eight bytes what all of them say.
    """
    common = known.common
    flags, count = (x if x and x.is_number else None for x in (common.flags, common.preempt_count))
    if any(x is not None and x.end > 8 for x in (flags, count)):
        return None
    if flags is None or count is None:
        count = None
    elif count.size != 1 or count.signed:
        return None
    ids, attr_of_id = samples.ids()
    every = [SampleLayout(attr.sample_type, attr.read_format) for attr in samples.attrs]
    ids_at = {layout.id_at for layout in every}
    id_at = ids_at.pop() if len(ids_at) == 1 and len(ids) else None
    # Where none tells whose they are, all are taken for samples of the first attribute.
    layouts = list(dict.fromkeys(every if id_at is not None else every[:1]))
    layout_of = [layouts.index(layout) if layout in layouts else 0 for layout in every]
    shape = Shape(
        np.array([_row(layout) for layout in layouts], np.int64),
        np.array(layout_of, np.intp),
        -1 if id_at is None else id_at,
        ids,
        attr_of_id,
        common.type.end,
    )
    places = (
        8 * common.type.offset,
        0xFF if common.type.size == 1 else 0xFFFF,
        -1 if flags is None else 8 * flags.offset,
        -1 if count is None else 8 * count.offset,
    )
    return Pool(known, samples, names, tally, shape, places)


def _row(layout: SampleLayout) -> list[int]:
    fixed = layout.fixed
    made = {
        loops.FIXED: 8 * len(fixed),
        loops.TIME: fixed.get(attrs.TIME, -1),
        loops.THREAD: fixed.get(attrs.TID, -1),
        loops.CPU: fixed.get(attrs.CPU, -1),
        loops.RAW: int(bool(layout.sample_type & attrs.RAW)),
        loops.VARIES: int(bool(layout.sample_type & (attrs.READ | attrs.CALLCHAIN))),
        loops.READ_WORDS: layout.read_words[0],
        loops.READ_EACH: layout.read_words[1],
        loops.CHAIN: int(bool(layout.sample_type & attrs.CALLCHAIN)),
    }
    return [made[part] for part in sorted(made)]
