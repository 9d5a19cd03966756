"""Rows of one table looked up by their source and number in another one that is in that order.

Both are already in memory and in order: a search takes a tenth of the time of a join.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

# A source has fewer lines or records than this: in order of source and number are then those of
# one number.
_SOURCE_SHIFT: Final = np.uint64(48)


def find_rows(wanted: pl.DataFrame, known: pl.DataFrame) -> pl.Series:
    """Return for each wanted row the row of ``known`` of the same source and number.

    Args:
        wanted: Two columns: source, and ``seq`` or another number of a line or record.
        known: The same of the rows to search, ascending and without repetition.

    Returns:
        UInt32, null where there is none.
    """
    of_wanted, of_known = _numbers(wanted), _numbers(known)
    if not len(of_known):
        return pl.repeat(None, len(of_wanted), dtype=pl.UInt32, eager=True)
    if np.array_equal(of_wanted, of_known):
        return pl.int_range(len(of_known), dtype=pl.UInt32, eager=True)
    place = np.minimum(np.searchsorted(of_known, of_wanted), len(of_known) - 1)
    is_found = pl.Series(of_known[place] == of_wanted)
    return pl.Series(place.astype(np.uint32)).set(~is_found, None)


def join_rows(rows: pl.DataFrame, number: str, others: pl.DataFrame, key: str) -> pl.DataFrame:
    """Return the rows that have a row of ``others``, with the other columns of that one.

    Args:
        rows: Columns source and ``number``, and others; repetitions are allowed.
        number: Column of a line or record of the source.
        others: Columns source and ``key``, without repetition, and those that are added.
        key: Column that equals ``number``.
    """
    others = in_order(others, key)
    at = find_rows(rows.select("source", number), others.select("source", key))
    added = others.drop({"source", key})[at.drop_nulls()]
    return pl.concat([rows.filter(at.is_not_null()), added], how="horizontal")


def in_order(rows: pl.DataFrame, number: str) -> pl.DataFrame:
    """Return rows in the order of their source and number, which most are in, or nearly.

    Args:
        rows: Columns source, ``number``, and any others.
        number: Column of the number of a line or record.
    """
    key = _numbers(rows.select("source", number))
    if bool((key[1:] >= key[:-1]).all()):
        return rows
    return rows[np.argsort(key, kind="stable")]


def _numbers(rows: pl.DataFrame) -> NDArray[np.uint64]:
    source, number = (column.to_numpy().astype(np.uint64) for column in rows)
    return (source << _SOURCE_SHIFT) + number
