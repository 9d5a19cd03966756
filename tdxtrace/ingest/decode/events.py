"""Events of one batch: properties for the decoder, pairs, and fields as columns and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.compiler import Runner
from tdxtrace.ingest.batch import UNKNOWN, BoolArray, I32Array, I64Array, RecordBatch, U64Array
from tdxtrace.ingest.events.registry import HANDLE_EXIT, Event
from tdxtrace.ingest.loops import pairing, rows
from tdxtrace.ingest.loops.rows import copy_fields
from tdxtrace.tables.events import PROBES
from tdxtrace.tables.schema import Table

Values = NDArray[Any]
Column = Values | pl.Series | int
"""The values of all rows, or one value for all of them."""

# Length of the constant columns that are cached and shared by the frames of all batches.
_SHARED_ROWS: Final = 1 << 17
_TYPES: Final[Mapping[type[pl.DataType], type[np.generic]]] = {
    pl.UInt8: np.uint8,
    pl.UInt16: np.uint16,
    pl.UInt32: np.uint32,
    pl.UInt64: np.uint64,
    pl.Int32: np.int32,
    pl.Int64: np.int64,
    pl.Boolean: np.bool_,
}


def frame(
    table: Table, n: int, columns: Mapping[str, Column], present: Mapping[str, BoolArray]
) -> pl.DataFrame:
    """Build rows of ``table``.

    Args:
        table: Table whose columns are made; one without values is null, or missing if optional.
        n: Number of rows.
        columns: Values by column; for an enumeration, indexes into its categories.  Values that do
            not fit a column's type become null.
        present: Where a value was observed; a column without an entry is observed everywhere.
    """
    if not n:
        return table.empty()
    series = []
    for name, dtype, is_optional in ((c.name, c.dtype, c.optional) for c in table.columns):
        column, mask = columns.get(name), present.get(name)
        if column is None or (mask is not None and not mask.any()):
            if not is_optional:
                series.append(_constant(dtype, None, n).alias(name))
        elif isinstance(column, int):
            series.append(_constant(dtype, column, n).alias(name))
        elif isinstance(column, pl.Series):
            series.append(column.alias(name))
        else:
            mask = None if mask is None or mask.all() else mask
            series.append(_series(name, column, dtype, mask))
    return pl.DataFrame(series)


def _series(name: str, values: Values, dtype: pl.DataType, mask: BoolArray | None) -> pl.Series:
    if isinstance(dtype, pl.Enum):
        if (values == values[0]).all():
            return _constant(dtype, values[0].item(), len(values)).alias(name)
        return pl.Series(name, values, pl.UInt32).cat.to(dtype)
    expected = np.dtype(_TYPES[type(dtype)])
    if values.dtype == expected or _fits(values, expected):
        # polars references an array of the right type; copy a view, which would pin its base.
        values = values.astype(expected, copy=mask is None and values.base is not None)
    column = pl.Series(name, values)
    if values.dtype != expected:
        column = column.cast(dtype, strict=False)
    return column if mask is None else column.zip_with(pl.Series(mask), _constant(dtype, None, 1))


def _fits(values: Values, expected: np.dtype[np.generic]) -> bool:
    if expected.kind not in "iu" or values.dtype.kind not in "iu":
        return False
    limits = np.iinfo(expected.str)
    return bool(values.min() >= limits.min and values.max() <= limits.max)


# At most 1 MB each; the recurring values are null and categories of enumerations.
@lru_cache(maxsize=32)
def _shared_constant(dtype: pl.DataType, value: int | None) -> pl.Series:
    if isinstance(dtype, pl.Enum) and value is not None:
        single = pl.Series([dtype.categories[value]], dtype=dtype)
    else:
        single = pl.Series([value], dtype=dtype)
    return single.new_from_index(0, _SHARED_ROWS)


def _constant(dtype: pl.DataType, value: int | None, n: int) -> pl.Series:
    """Return a column of one value: a slice of the shared one, if that is long enough."""
    shared = _shared_constant(dtype, value)
    return shared.slice(0, n) if n <= _SHARED_ROWS else shared.new_from_index(0, n)


Words = tuple[U64Array, BoolArray]
"""A field's value in every row, and where it was observed."""
Reads = tuple[I64Array, Mapping[str, str]]
"""Index of each row's event, ABSENT where it has none; and the column that each slot fills."""

ABSENT: Final = -1
_FIRST_SLOTS: Final = 1 << 10
_PAIR_LINES: Final = 2


@dataclass(frozen=True, slots=True)
class Kinds:
    """Properties of events that the decoder needs, as arrays by event ID."""

    function: I32Array
    is_return: BoolArray
    leaf: I32Array
    """UNKNOWN where each record has its own leaf."""
    probe: NDArray[np.int8]
    """Index in PROBES."""
    has_inner: bool
    """Whether any event is from a low-level probe: __seamcall or a variant of it."""
    is_handler: BoolArray
    """Whether the probe is on tdx_handle_exit, which reports the status of the previous entry."""

    @classmethod
    def of(cls, events: Sequence[Event]) -> Kinds:
        """Build the arrays from the list of events."""
        functions = {name: i for i, name in enumerate(sorted({e.function for e in events}))}
        return cls(
            np.array([functions[e.function] for e in events], np.int32),
            np.array([e.role == "return" for e in events], np.bool_),
            np.array([UNKNOWN if e.leaf is None else e.leaf for e in events], np.int32),
            np.array([PROBES.index(e.probe) for e in events], np.int8),
            any(e.probe == "seamcall" for e in events),
            np.array([e.function == HANDLE_EXIT for e in events], np.bool_),
        )


@dataclass(frozen=True, slots=True)
class Paired:
    """Fates of the events of a batch; one array entry per event."""

    thread: I32Array
    """Index of each event's thread."""
    n_threads: int
    partner: I64Array
    """Index of the entry of each return, ABSENT where it has none."""
    fate: NDArray[np.uint8]
    """One of the constants of loops.pairing."""

    def rows(self, at: I64Array) -> tuple[I64Array, I64Array]:
        """Return the indexes of entry and return events of rows whose last events are ``at``."""
        is_entry = self.fate.take(at) <= pairing.GIVEN_UP
        is_entry &= self.fate.take(at) != pairing.RETURN_OF_PAIR
        if not is_entry.any():
            return self.partner.take(at), at
        return np.where(is_entry, at, self.partner.take(at)), np.where(is_entry, ABSENT, at)


# Offset of the keys of idle tasks, below the negative keys of all CPUs.
_IDLE: Final = -(1 << 24)


def pair(
    batch: RecordBatch,
    kinds: Kinds,
    depth: int,
    run: Runner[Any],
    ambiguous: BoolArray | None = None,
) -> Paired:
    """Match entries and returns: see :func:`tdxtrace.ingest.loops.pairing.pair`.

    Where the tool did not print the thread, calls are paired by CPU, and only if the pair is
    unambiguous: :func:`tdxtrace.ingest.loops.pairing.pair_without_threads`.  Calls of thread 0
    are paired by CPU: each CPU's idle task has that number (Linux kernel/fork.c, fork_idle).

    Args:
        batch: The events.
        kinds: Properties of events, by event ID.
        depth: Most open calls of one function in one thread.
        run: Runs loops, interpreted or compiled.
        ambiguous: Whether each of the first events is an entry that an earlier batch marked
            ambiguous.
    """
    is_known = batch.tid != UNKNOWN
    is_threaded = bool(is_known.all())
    tid = batch.tid
    if not (tid > 0).all():
        # Negative keys, which no thread ID equals; idle tasks and CPUs have separate ranges.
        by_cpu = np.where(is_known, _IDLE, -2) - batch.cpu
        tid = np.where(tid > 0, tid, by_cpu.astype(np.int32))
    number, n_threads = number_threads(tid, run)
    n = len(batch)
    top = np.full(n_threads, ABSENT, np.int64)
    below = np.empty(n, np.int64)
    partner, fate = np.full(n, ABSENT, np.int64), np.empty(n, np.uint8)
    events = batch.event, kinds.function, kinds.is_return
    run(pairing.pair)(number, *events, depth, top, below, partner, fate)
    if not is_threaded:
        partner[~is_known] = ABSENT
        if ambiguous is not None:
            partner[: len(ambiguous)][ambiguous] = pairing.AMBIGUOUS
        top[:] = ABSENT
        cpu = np.where(is_known, np.int32(ABSENT), number)
        max_open = np.full(n_threads, depth, np.int64)
        max_open[number[~is_known & (batch.cpu == UNKNOWN)]] = n
        run(pairing.pair_without_threads)(cpu, *events, max_open, top, below, partner, fate)
    return Paired(number, n_threads, partner, fate)


def number_threads(tid: I32Array, run: Runner[Any]) -> tuple[I32Array, int]:
    """Return the thread index of each event, in order of first occurrence, and the thread count."""
    number, n_slots, n = np.empty(len(tid), np.int32), _FIRST_SLOTS, rows.TABLE_FULL
    while n == rows.TABLE_FULL:
        slots, owner = np.full(n_slots, ABSENT, np.int32), np.empty(n_slots, np.int32)
        n = run(rows.number_threads)(tid, slots, owner, number)
        n_slots *= 4
    return number, n


def numbers_of(column: pl.Series, missing: int) -> Values:
    """Return a column of numbers as an array, with ``missing`` for null."""
    if column.null_count():
        is_signed = missing >= 0 or column.dtype.is_signed_integer()
        column = (column if is_signed else column.cast(pl.Int64)).fill_null(missing)
    return column.to_numpy(writable=True)


def make_rows(
    batch: RecordBatch, start: I64Array, end: I64Array, run: Runner[Any]
) -> tuple[dict[str, Column], dict[str, BoolArray]]:
    """Return the columns that all tables of pairs have, and where each was observed.

    Args:
        batch: The events.
        start: Index of each row's entry event, ABSENT where it was not recorded.
        end: Index of each row's return event, ABSENT where it was not recorded.
        run: Runs loops, interpreted or compiled.
    """
    n = len(start)
    seq, began, ended = np.empty(n, np.uint64), np.empty(n, np.int64), np.empty(n, np.int64)
    cpus, ids = np.empty((2, n), np.uint16), np.empty((2, n), np.int32)
    in_irq, present = np.empty(n, np.bool_), np.zeros((len(rows.OBSERVED), n), np.bool_)
    common = batch.line, batch.ts_ns, batch.cpu, batch.tid, batch.tgid, batch.in_irq
    times = seq.view(np.int64), began, ended
    run(rows.make_rows)(start, end, *common, *times, cpus, ids, in_irq, present)
    is_pair = (start >= 0) & (end >= 0)
    columns: dict[str, Column] = {
        "seq": seq,
        "start_ns": began,
        "end_ns": ended,
        "start_cpu": cpus[0],
        "cpu": cpus[1],
        "tid": ids[0],
        "tgid": ids[1],
        "in_irq": in_irq,
        "n_lines": _PAIR_LINES if is_pair.all() else is_pair.astype(np.uint8) + np.uint8(1),
    }
    return columns, dict(zip(rows.OBSERVED, present, strict=True))


def read_fields(
    batch: RecordBatch, reads: Sequence[Reads], run: Runner[Any], columns: Sequence[str] = ()
) -> dict[str, Words]:
    """Read fields of a batch into columns.

    Args:
        batch: The events.
        reads: The event of each row, and the columns its slots fill; later items, also within one
            mapping, override earlier ones.
        run: Runs loops, interpreted or compiled.
        columns: Columns to return even if no event fills them.

    Returns:
        By column, its words in all rows and where they were observed.
    """
    n_layouts = len(batch.layouts.slots)
    used = np.flatnonzero(np.bincount(batch.layout)).tolist()
    used_slots = {slot for layout in used for slot in batch.layouts.slots[layout]}
    filled = [column for _, fills in reads for slot, column in fills.items() if slot in used_slots]
    names = list(dict.fromkeys((*columns, *filled)))
    shape = len(names), len(reads[0][0])
    value, present = np.empty(shape, np.uint64), np.zeros(shape, np.bool_)
    for event, fills in reads:
        position = np.full((len(names), n_layouts), ABSENT, np.int64)
        for layout in used:
            slots = batch.layouts.slots[layout]
            for slot in fills:
                if slot in slots:
                    position[names.index(fills[slot]), layout] = slots.index(slot)
        filled_rows = np.flatnonzero((position != ABSENT).any(axis=1))
        words = batch.layout, batch.first_word, batch.words
        run(copy_fields)(event, *words, filled_rows, position, value, present)
    return {name: (value[row], present[row]) for row, name in enumerate(names)}
