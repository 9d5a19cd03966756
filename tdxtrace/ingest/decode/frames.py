"""Columns of numbers as a table: null where nothing was observed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.ingest.batch import BoolArray
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


@cache
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
