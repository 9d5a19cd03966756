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
    made: dict[str, pl.Series] = {}
    masks: dict[str, pl.Series] = {}
    wanted: list[pl.Expr] = []
    for name, dtype in table.schema.items():
        if texts is not None and name in texts:
            made[name] = texts[name]
            wanted.append(pl.col(name))
        elif name not in columns or _never(name, seen):
            wanted.append(pl.lit(None, dtype).alias(name))
        else:
            made[name] = pl.Series(columns[name])
            value = pl.col(name)
            if name in seen and not seen[name].all():
                masks[f"{name}?"] = pl.Series(seen[name])
                value = pl.when(pl.col(f"{name}?")).then(value)
            wanted.append(value.cast(dtype, strict=False).alias(name))
    # One pass over all columns, side by side.
    return pl.DataFrame({**made, **masks}).select(wanted) if n else table.empty()


def _never(name: str, seen: Mapping[str, BoolArray]) -> bool:
    return name in seen and not seen[name].any()
