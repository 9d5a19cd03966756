"""Events of one batch: what the decoder asks of them, and their fields in columns and tables."""

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
"""Values of every row, or the one value that all of them have."""

# Rows of the columns of one value that are kept and shared by the frames of all batches.
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
    table: Table, n: int, columns: Mapping[str, Column], seen: Mapping[str, BoolArray]
) -> pl.DataFrame:
    """Build rows of ``table``.

    Args:
        table: Whose columns to make; one without a value is null, or missing if optional.
        n: Number of rows.
        columns: Values by column; of an enumeration, places in its list.  What does not fit a
            column's type is null.
        seen: Where a value was observed; a column without an entry always is.
    """
    if not n:
        return table.empty()
    made = []
    for name, dtype, is_optional in ((c.name, c.dtype, c.optional) for c in table.columns):
        column, mask = columns.get(name), seen.get(name)
        if column is None or (mask is not None and not mask.any()):
            if not is_optional:
                made.append(_same(dtype, None, n).alias(name))
        elif isinstance(column, int):
            made.append(_same(dtype, column, n).alias(name))
        elif isinstance(column, pl.Series):
            made.append(column.alias(name))
        else:
            mask = None if mask is None or mask.all() else mask
            made.append(_series(name, column, dtype, mask))
    return pl.DataFrame(made)


def _series(name: str, values: Values, dtype: pl.DataType, mask: BoolArray | None) -> pl.Series:
    if isinstance(dtype, pl.Enum):
        if (values == values[0]).all():
            return _same(dtype, values[0].item(), len(values)).alias(name)
        return pl.Series(name, values, pl.UInt32).cat.to(dtype)
    wanted = np.dtype(_TYPES[type(dtype)])
    if values.dtype == wanted or _fits(values, wanted):
        # polars keeps an array of the right type: of a part of a larger one, a copy.
        values = values.astype(wanted, copy=mask is None and values.base is not None)
    column = pl.Series(name, values)
    if values.dtype != wanted:
        column = column.cast(dtype, strict=False)
    return column if mask is None else column.zip_with(pl.Series(mask), _same(dtype, None, 1))


def _fits(values: Values, wanted: np.dtype[np.generic]) -> bool:
    if wanted.kind not in "iu" or values.dtype.kind not in "iu":
        return False
    limits = np.iinfo(wanted.str)
    return bool(values.min() >= limits.min and values.max() <= limits.max)


# 1 MB each: values that come again are null, and those of enums.
@lru_cache(maxsize=32)
def _shared(dtype: pl.DataType, value: int | None) -> pl.Series:
    if isinstance(dtype, pl.Enum) and value is not None:
        one = pl.Series([dtype.categories[value]], dtype=dtype)
    else:
        one = pl.Series([value], dtype=dtype)
    return one.new_from_index(0, _SHARED_ROWS)


def _same(dtype: pl.DataType, value: int | None, n: int) -> pl.Series:
    """Make a column of one value: part of one that all batches share, if that is long enough."""
    shared = _shared(dtype, value)
    return shared.slice(0, n) if n <= _SHARED_ROWS else shared.new_from_index(0, n)


Words = tuple[U64Array, BoolArray]
"""A field of every row, and where it was observed."""
Reads = tuple[I64Array, Mapping[str, str]]
"""Place of each row's event, ABSENT where it has none; and the column that each slot fills."""

ABSENT: Final = -1
_FIRST_SLOTS: Final = 1 << 10
_PAIR_LINES: Final = 2


@dataclass(frozen=True, slots=True)
class Kinds:
    """What the decoder asks of every event, as arrays indexed by event."""

    function: I32Array
    is_return: BoolArray
    leaf: I32Array
    """UNKNOWN where each event names its own."""
    probe: NDArray[np.int8]
    """Place in PROBES."""
    has_inner: bool
    """Whether any of them is a probe of the lower layer, __seamcall and its kin."""
    is_handler: BoolArray
    """Whether it is of tdx_handle_exit, which tells of the entry before."""

    @classmethod
    def of(cls, events: Sequence[Event]) -> Kinds:
        """Look every event up once."""
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
    """What became of the events of a batch."""

    thread: I32Array
    """Number of each event's thread."""
    n_threads: int
    partner: I64Array
    """Place of the entry of each return, ABSENT where it has none."""
    fate: NDArray[np.uint8]
    """One of the constants of loops.pairing."""

    def rows(self, at: I64Array) -> tuple[I64Array, I64Array]:
        """Return the places of entry and return of rows whose last events are at ``at``."""
        is_entry = self.fate.take(at) <= pairing.GIVEN_UP
        is_entry &= self.fate.take(at) != pairing.RETURN_OF_PAIR
        if not is_entry.any():
            return self.partner.take(at), at
        return np.where(is_entry, at, self.partner.take(at)), np.where(is_entry, ABSENT, at)


# Below the negative numbers of all CPUs.
_IDLE: Final = -(1 << 24)


def pair(
    batch: RecordBatch,
    kinds: Kinds,
    depth: int,
    run: Runner[Any],
    ambiguous: BoolArray | None = None,
) -> Paired:
    """Match entries and returns: see :func:`tdxtrace.ingest.loops.pairing.pair`.

    Where the tool did not print the thread, calls are paired by CPU, and only those that could
    not be paired otherwise: :func:`tdxtrace.ingest.loops.pairing.pair_without_threads`.  Calls of
    thread 0 nest by CPU: it is the idle task of each (Linux kernel/fork.c, fork_idle).

    Args:
        batch: The events.
        kinds: What each event is.
        depth: Most open calls of one function in one thread.
        run: How to run loops.
        ambiguous: Which of the first events are entries that were left ambiguous before.
    """
    is_known = batch.tid != UNKNOWN
    is_threaded = bool(is_known.all())
    tid = batch.tid
    if not (tid > 0).all():
        # Negative, so that no thread has the same number; nor an idle task that of a CPU.
        by_cpu = np.where(is_known, _IDLE, -2) - batch.cpu
        tid = np.where(tid > 0, tid, by_cpu.astype(np.int32))
    number, n_threads = number_threads(tid, run)
    n = len(batch)
    top = np.full(n_threads, ABSENT, np.int64)
    below = np.empty(n, np.int64)
    partner, fate = np.full(n, ABSENT, np.int64), np.empty(n, np.uint8)
    told = batch.event, kinds.function, kinds.is_return
    run(pairing.pair)(number, *told, depth, top, below, partner, fate)
    if not is_threaded:
        partner[~is_known] = ABSENT
        if ambiguous is not None:
            partner[: len(ambiguous)][ambiguous] = pairing.AMBIGUOUS
        top[:] = ABSENT
        place = np.where(is_known, np.int32(ABSENT), number)
        most = np.full(n_threads, depth, np.int64)
        most[number[~is_known & (batch.cpu == UNKNOWN)]] = n
        run(pairing.pair_without_threads)(place, *told, most, top, below, partner, fate)
    return Paired(number, n_threads, partner, fate)


def number_threads(tid: I32Array, run: Runner[Any]) -> tuple[I32Array, int]:
    """Number threads from 0 as they occur; return the number by event, and the count of threads."""
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
        start: Place of each row's entry, ABSENT where it was not recorded.
        end: Place of each row's return, ABSENT where it was not recorded.
        run: How to run loops.
    """
    n = len(start)
    seq, began, ended = np.empty(n, np.uint64), np.empty(n, np.int64), np.empty(n, np.int64)
    cpus, ids = np.empty((2, n), np.uint16), np.empty((2, n), np.int32)
    in_irq, seen = np.empty(n, np.bool_), np.zeros((len(rows.OBSERVED), n), np.bool_)
    heads = batch.line, batch.ts_ns, batch.cpu, batch.tid, batch.tgid, batch.in_irq
    times = seq.view(np.int64), began, ended
    run(rows.make_rows)(start, end, *heads, *times, cpus, ids, in_irq, seen)
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
    return columns, dict(zip(rows.OBSERVED, seen, strict=True))


def read_fields(
    batch: RecordBatch, reads: Sequence[Reads], run: Runner[Any], columns: Sequence[str] = ()
) -> dict[str, Words]:
    """Read fields of a batch into columns.

    Args:
        batch: The events.
        reads: One event of each row, and its fields; what comes later, also within one
            mapping, replaces what came before.
        run: How to run loops.
        columns: Columns that are wanted even if no event fills them.

    Returns:
        By column the words of all rows, and where there is one.
    """
    n_layouts = len(batch.layouts.slots)
    used = np.flatnonzero(np.bincount(batch.layout)).tolist()
    met = {slot for layout in used for slot in batch.layouts.slots[layout]}
    filled = [to for _, fills in reads for slot, to in fills.items() if slot in met]
    names = list(dict.fromkeys((*columns, *filled)))
    shape = len(names), len(reads[0][0])
    value, seen = np.empty(shape, np.uint64), np.zeros(shape, np.bool_)
    for event, fills in reads:
        position = np.full((len(names), n_layouts), ABSENT, np.int64)
        for layout in used:
            slots = batch.layouts.slots[layout]
            for slot in fills:
                if slot in slots:
                    position[names.index(fills[slot]), layout] = slots.index(slot)
        wanted = np.flatnonzero((position != ABSENT).any(axis=1))
        words = batch.layout, batch.first_word, batch.words
        run(copy_fields)(event, *words, wanted, position, value, seen)
    return {name: (value[row], seen[row]) for row, name in enumerate(names)}
