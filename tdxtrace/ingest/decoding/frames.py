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
    if not n:
        return table.empty()
    made: list[pl.Series] = []
    for name, dtype in table.schema.items():
        if texts is not None and name in texts:
            made.append(texts[name].alias(name))
        elif name not in columns or _never(name, seen):
            made.append(_nothing(name, dtype).new_from_index(0, n))
        else:
            # Column by column at once: a query over all would be planned anew for each batch.
            column = pl.Series(name, columns[name]).cast(dtype, strict=False)
            if name in seen and not seen[name].all():
                column = column.zip_with(pl.Series(seen[name]), _nothing(name, dtype))
            made.append(column)
    return pl.DataFrame(made)


def _nothing(name: str, dtype: pl.DataType) -> pl.Series:
    return pl.Series(name, [None], dtype)


def _never(name: str, seen: Mapping[str, BoolArray]) -> bool:
    return name in seen and not seen[name].any()
