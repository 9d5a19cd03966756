"""Time slices: the intervals in which a rate over time is counted."""

from __future__ import annotations

from typing import Final

import polars as pl

# An arbitrary choice: as many slices as a chart can show, none shorter than KVM's interruptions.
_MAX_SLICES: Final = 60
_SHORTEST_NS: Final = 1_000_000


def slice_width(span_ns: int) -> int:
    """Return the slice width for a time span: 1, 2 or 5 times a power of ten, at most 60 slices.

    Args:
        span_ns: Length of the span in ns.

    Returns:
        Width in ns, at least 1 ms.

    Example:
        >>> slice_width(40_000_000), slice_width(61_000_000), slice_width(0)
        (1000000, 2000000, 1000000)
    """
    width = _SHORTEST_NS
    while True:
        for factor in (1, 2, 5):
            if span_ns <= width * factor * _MAX_SLICES:
                return width * factor
        width *= 10


def add_slice_width(spans: pl.DataFrame) -> pl.DataFrame:
    """Add ``width_ns``, the slice width for each span from ``first_ns`` to ``last_ns``."""
    ends = spans.select("first_ns", "last_ns").iter_rows()
    widths = [slice_width(last - first) for first, last in ends]
    return spans.with_columns(width_ns=pl.Series(widths, dtype=pl.Int64))


def cut_to_slices(rows: pl.DataFrame, first: str, last: str) -> pl.DataFrame:
    """Cut intervals at slice boundaries, and compute the length of each part.

    Args:
        rows: Intervals, with the columns ``first_ns`` and ``width_ns`` of their slices.
        first: Name of the column with the start in ns.
        last: Name of the column with the end in ns.

    Returns:
        One row per interval and slice: the interval's columns, ``slice`` (number from 0) and
        ``part_ns`` (length of the part in ns).
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
