"""How columns of raw words become a table: nulls where nothing was observed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.ingest.raw import BoolArray
from tdxtrace.tables.schema import Table

Values = NDArray[np.generic]


def frame(
    table: Table,
    n: int,
    columns: Mapping[str, Values],
    seen: Mapping[str, BoolArray],
    texts: Mapping[str, pl.Series] | None = None,
) -> pl.DataFrame:
    """Build rows of ``table``.

    Args:
        table: Whose columns to make; one that is not given is null.
        n: Number of rows.
        columns: Values by column.
        seen: Where a value was observed; a column without an entry is never null.
        texts: Columns that are no numbers, as they are.
    """
    series = []
    for name, dtype in table.schema.items():
        if texts is not None and name in texts:
            made = texts[name].alias(name).cast(dtype)
        elif name not in columns:
            made = pl.repeat(None, n, dtype=dtype, eager=True).alias(name)
        else:
            made = _with_nulls(name, columns[name], seen.get(name), dtype)
        series.append(made)
    return pl.DataFrame(series)


def _with_nulls(name: str, values: Values, seen: BoolArray | None, dtype: pl.DataType) -> pl.Series:
    made = pl.Series(name, values)
    if seen is not None and not seen.all():
        made = made.zip_with(pl.Series(seen), pl.Series([None], dtype=made.dtype))
    return made.cast(dtype, strict=False) if made.dtype != dtype else made
