"""How columns of raw words become a table: nulls where nothing was observed."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from threading import Thread
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import DTypeLike, NDArray

from tdxtrace.ingest.raw import BoolArray
from tdxtrace.tables.schema import Table

Values = NDArray[np.generic]
Column = Values | int
"""Values of every row, or the one value that all of them have."""

# Rows of the columns of one value that are kept and shared: those of a batch.
_SHARED_ROWS: Final = 1 << 17
# Bytes that are asked for at once to keep columns: those of some 500,000 calls.
_ROOM_BYTES: Final = 32 << 20
# The same for those that are soon given up: some 60,000 calls, as a batch has.
_PASSING_BYTES: Final = 4 << 20
# MADV_POPULATE_WRITE of Linux 5.14, include/uapi/asm-generic/mman-common.h: half the time
# that the kernel takes where each page is met for itself.
_POPULATE: Final = 23
# Asked for at a time: meanwhile no other thread can ask for memory, or give any back.
_POPULATED_BYTES: Final = 1 << 20
assert _ROOM_BYTES % _POPULATED_BYTES == 0
# Where columns begin: Arrow, Columnar Format, buffer alignment.
_ALIGNMENT: Final = 64
# Fewer rows are no use: their table may end with them.
_ROOM_ROWS: Final = 1 << 13
_TYPES: Final[Mapping[type[pl.DataType], type[np.generic]]] = {
    pl.UInt8: np.uint8,
    pl.UInt16: np.uint16,
    pl.UInt32: np.uint32,
    pl.UInt64: np.uint64,
    pl.Int32: np.int32,
    pl.Int64: np.int64,
    pl.Boolean: np.bool_,
}


@dataclass(slots=True)
class Room:
    """Memory for the columns of a table that is kept, batch behind batch.

    Where rows come fast, the kernel's part is half of the work: to clear pages when they
    are first written.  So that is done ahead, in a thread of its own, from the second
    piece of memory on.
    """

    is_kept: bool = True
    """False for rows that are soon given up: their memory is used again and again."""
    _left: Values = field(default_factory=lambda: np.empty(0, np.uint8))
    _has_begun: bool = False
    _ahead: Future[Values] | None = None

    @property
    def at_once(self) -> int:
        """Bytes that columns are best made of."""
        return _ROOM_BYTES if self.is_kept else _PASSING_BYTES

    def give(self, shape: tuple[int, ...], wanted: DTypeLike) -> NDArray[Any]:
        """Return an array of ``shape`` that can stay."""
        dtype = np.dtype(wanted)
        if not self.is_kept:
            return np.empty(shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        padded = -(-size // _ALIGNMENT) * _ALIGNMENT
        if len(self._left) < padded:
            self._left = _memory(padded) if padded > _ROOM_BYTES else self._piece()
        mine, self._left = self._left[:size], self._left[padded:]
        return mine.view(dtype).reshape(shape)

    def _piece(self) -> Values:
        if not self._has_begun:
            self._has_begun = True
            return _memory(_ROOM_BYTES)
        made = _memory(_ROOM_BYTES) if self._ahead is None else self._ahead.result()
        self._ahead = Future()
        Thread(target=_touch, args=(_memory(_ROOM_BYTES), self._ahead), daemon=True).start()
        return made

    def keep(self, values: Values, wanted: np.dtype[np.generic]) -> Values:
        """Return ``values``, which must fit the type ``wanted``, where they can stay."""
        n = len(values)
        if n < _ROOM_ROWS:
            return values.astype(wanted, copy=False)
        mine = self.give((n,), wanted)
        np.copyto(mine, values, casting="unsafe")
        return mine


def _memory(n_bytes: int) -> Values:
    """Memory in small pages.

    numpy asks for huge ones: a virtual machine whose free memory goes back to its host
    waits 2.6 s for a GB of them, and 0.7 s for one of small pages.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, n_bytes, private), np.uint8)


def _touch(memory: Values, done: Future[Values]) -> None:
    """Have the kernel give every page: many at once, where it can."""
    try:
        # mmap.madvise would keep the interpreter's lock meanwhile.
        give, size = ctypes.CDLL(None).madvise, ctypes.c_size_t(_POPULATED_BYTES)
        for at in range(0, len(memory), _POPULATED_BYTES):
            if give(ctypes.c_void_p(memory.ctypes.data + at), size, _POPULATE):
                memory[at : at + _POPULATED_BYTES : mmap.PAGESIZE] = 0
    finally:
        # Whatever happens, it can be used: somebody waits for it.
        done.set_result(memory)


def frame(
    table: Table,
    n: int,
    columns: Mapping[str, Column],
    seen: Mapping[str, BoolArray],
    texts: Mapping[str, pl.Series] | None = None,
    room: Room | None = None,
) -> pl.DataFrame:
    """Build rows of ``table``.

    Args:
        table: Whose columns to make; one that is not given is null.
        n: Number of rows.
        columns: Values by column; of a column of words out of a list, their places in it.
        seen: Where a value was observed; a column without an entry is never null.
        texts: Columns that are no numbers, as they are.
        room: Where the columns are put, if the rows are kept.
    """
    if not n:
        return table.empty()
    made: list[pl.Series] = []
    for name, dtype in _wanted(table, columns, seen):
        column = columns.get(name)
        if texts is not None and name in texts:
            made.append(texts[name].alias(name))
        elif column is None or _never(name, seen):
            made.append(_same(dtype, None, n).alias(name))
        elif isinstance(column, int):
            made.append(_same(dtype, column, n).alias(name))
        else:
            # Column by column at once: a query over all would be planned anew for each batch.
            numbers = _series(name, column, dtype, room)
            made.append(_masked(numbers, seen.get(name)))
    return pl.DataFrame(made)


def _wanted(
    table: Table, columns: Mapping[str, Column], seen: Mapping[str, BoolArray]
) -> Iterator[tuple[str, pl.DataType]]:
    """Yield name and type of the columns to make: optional ones only if they have a value."""
    for column in table.columns:
        if not column.optional or (column.name in columns and not _never(column.name, seen)):
            yield column.name, column.dtype


def series(name: str, values: Values, seen: BoolArray | None) -> pl.Series:
    """Make a column of numbers that have its type; null where they were not ``seen``."""
    return _masked(pl.Series(name, values), seen)


def _masked(numbers: pl.Series, seen: BoolArray | None) -> pl.Series:
    if seen is None or seen.all():
        return numbers
    return numbers.zip_with(pl.Series(seen), _same(numbers.dtype, None, 1).alias(numbers.name))


def _series(name: str, values: Values, dtype: pl.DataType, room: Room | None) -> pl.Series:
    """Make a column; what does not fit its type is null."""
    if isinstance(dtype, pl.Enum):
        if (values == values[0]).all():
            return _same(dtype, values[0].item(), len(values)).alias(name)
        return pl.Series(name, values, pl.UInt32).cat.to(dtype)
    wanted = np.dtype(_TYPES[type(dtype)])
    # polars takes an array of the right type as it is; others would be copied once more.
    if values.dtype == wanted or _fits(values, wanted):
        values = values.astype(wanted, copy=False) if room is None else room.keep(values, wanted)
    return pl.Series(name, values).cast(dtype, strict=False)


def _fits(values: Values, wanted: np.dtype[np.generic]) -> bool:
    if wanted.kind not in "iu" or values.dtype.kind not in "iu":
        return False
    limits = np.iinfo(wanted.str)
    return bool(values.min() >= limits.min and values.max() <= limits.max)


@cache
def _shared(dtype: pl.DataType, value: int | None) -> pl.Series:
    if isinstance(dtype, pl.Enum) and value is not None:
        one = pl.Series([dtype.categories[value]], dtype=dtype)
    else:
        one = pl.Series([value], dtype=dtype)
    return one.new_from_index(0, _SHARED_ROWS)


def _same(dtype: pl.DataType, value: int | None, n: int) -> pl.Series:
    """A column of one value: part of one that all batches share, if it is long enough."""
    shared = _shared(dtype, value)
    return shared.slice(0, n) if n <= _SHARED_ROWS else shared.new_from_index(0, n)


def _never(name: str, seen: Mapping[str, BoolArray]) -> bool:
    return name in seen and not seen[name].any()
