"""Slices of time: the steps in which a rate over time is counted."""

from __future__ import annotations

from typing import Final

import polars as pl

# A choice of ours: as many steps as a chart can show, none shorter than KVM's own interruptions.
_MOST: Final = 60
_SHORTEST_NS: Final = 1_000_000


def slice_width(span_ns: int) -> int:
    """Return the width of the slices of a time: 1, 2 or 5 times a power of ten, at most 60 of them.

    Args:
        span_ns: Length of the time, ns.

    Returns:
        Width in ns, at least 1 ms.

    Example:
        >>> slice_width(40_000_000), slice_width(61_000_000), slice_width(0)
        (1000000, 2000000, 1000000)
    """
    width = _SHORTEST_NS
    while True:
        for factor in (1, 2, 5):
            if span_ns <= width * factor * _MOST:
                return width * factor
        width *= 10


def add_slice_width(spans: pl.DataFrame) -> pl.DataFrame:
    """Add ``width_ns``, the width of the slices of each span from ``first_ns`` to ``last_ns``."""
    ends = spans.select("first_ns", "last_ns").iter_rows()
    widths = [slice_width(last - first) for first, last in ends]
    return spans.with_columns(width_ns=pl.Series(widths, dtype=pl.Int64))


def cut_to_slices(rows: pl.DataFrame, first: str, last: str) -> pl.DataFrame:
    """Cut intervals at the borders of slices, and say how much of each lies in which.

    Args:
        rows: Intervals, and the columns ``first_ns`` and ``width_ns`` of the slices that they are
            cut to.
        first: Name of the column of their beginning, ns.
        last: Name of the column of their end, ns.

    Returns:
        One row per interval and slice: its columns, ``slice`` (number from 0) and ``part_ns``.
    """
    begin, width = pl.col("first_ns"), pl.col("width_ns")
    number = [((pl.col(name) - begin) // width).alias(f"_{name}") for name in (first, last)]
    cut = rows.with_columns(number).with_columns(
        slice=pl.int_ranges(pl.col(f"_{first}"), pl.col(f"_{last}") + 1)
    )
    cut = cut.explode("slice").drop(f"_{first}", f"_{last}")
    at = begin + pl.col("slice") * width
    return cut.with_columns(
        part_ns=pl.min_horizontal(last, at + width) - pl.max_horizontal(pl.col(first), at)
    )
