"""Reader of the CSV files with data about TDX."""

from __future__ import annotations

import csv
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

# A Traversable, not a path: the recorder may run from a zip archive.
_DATA = files(__package__) / "data"


def facts(name: str, **columns: type[pl.DataType]) -> pl.DataFrame:
    """Read one CSV file as a table; column ``source`` of each row names its source.

    Args:
        name: The file without its suffix.
        **columns: Types of the columns that are not text.  Numbers are written in
            decimal, or in hexadecimal with ``0x``.

    Returns:
        One row per line of the file, in its order; an empty field is null.
    """
    import polars as pl

    table = pl.read_csv((_DATA / f"{name}.csv").read_bytes(), infer_schema=False, glob=False)
    return table.with_columns(_number(pl.col(c), dtype) for c, dtype in columns.items())


def records(name: str) -> list[dict[str, str | None]]:
    """Read one CSV file without importing polars, for code that must start fast.

    Args:
        name: The file without its suffix.

    Returns:
        One dict per line of the file, in its order; all values are text, an empty field is None.
    """
    text = (_DATA / f"{name}.csv").read_text("utf-8")
    rows = csv.DictReader(text.splitlines())
    return [{column: cell or None for column, cell in row.items()} for row in rows]


def _number(text: pl.Expr, dtype: type[pl.DataType]) -> pl.Expr:
    """Parse decimal or 0x-hexadecimal numbers."""
    import polars as pl

    is_hex = text.str.starts_with("0x")
    decimal = pl.when(~is_hex).then(text).str.to_integer(dtype=pl.UInt64)
    hexadecimal = pl.when(is_hex).then(text.str.slice(2)).str.to_integer(base=16, dtype=pl.UInt64)
    return pl.coalesce(hexadecimal, decimal).cast(dtype)
