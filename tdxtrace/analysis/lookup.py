"""Lookup of rows in another table: by source and number, or the first one after a time.

Tables of calls and chains are in memory and sorted by source and number, so a binary search takes a
tenth of the time of a join.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

# A source has fewer than 2^48 lines or records, so source and number are packed into one integer
# that sorts by both.
_SOURCE_SHIFT: Final = np.uint64(48)


def find_rows(wanted: pl.DataFrame, known: pl.DataFrame) -> pl.Series:
    """Return for each wanted row the index of the row in ``known`` with its source and number.

    Args:
        wanted: Two columns: source, and ``seq`` or another line or record number.
        known: The same two columns of the rows to search, ascending and without duplicates.

    Returns:
        UInt32 row indices; null where no row matches.
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
    """Return the rows that match a row of ``others``, with the columns of ``others`` added.

    Args:
        rows: Rows with source, ``number`` and other columns; duplicates are allowed.
        number: Column with the line or record number within the source.
        others: Rows with source and ``key``, without duplicates, and the columns to add.
        key: Column of ``others`` that is matched with ``number``.
    """
    others = in_order(others, key)
    at = find_rows(rows.select("source", number), others.select("source", key))
    added = others.drop({"source", key})[at.drop_nulls()]
    return pl.concat([rows.filter(at.is_not_null()), added], how="horizontal")


def in_order(rows: pl.DataFrame, number: str) -> pl.DataFrame:
    """Sort rows by source and number; rows that are already sorted are returned unchanged.

    Args:
        rows: Rows with source, ``number`` and any other columns.
        number: Column with the line or record number.
    """
    key = _numbers(rows.select("source", number))
    if bool((key[1:] >= key[:-1]).all()):
        return rows
    return rows[np.argsort(key, kind="stable")]


def first_after(
    rows: pl.DataFrame, at: str, events: pl.DataFrame, event_at: str, by: Sequence[str]
) -> pl.DataFrame:
    """Join each row with the first event at or after a time; null columns where none follows.

    Args:
        rows: Rows with ``at`` and the columns of ``by``, in any order.
        at: Column of their time in ns.
        events: Events with ``event_at`` and the columns of ``by``, in any order.
        event_at: Column of their time in ns.
        by: Columns in which a row and its event are equal.

    Returns:
        The rows in the order of ``at``, with the columns of the event.
    """
    return rows.sort(at).join_asof(
        events.sort(event_at),
        left_on=at,
        right_on=event_at,
        by=by,
        strategy="forward",
        coalesce=False,
        check_sortedness=False,
    )


def _numbers(rows: pl.DataFrame) -> NDArray[np.uint64]:
    source, number = (column.to_numpy().astype(np.uint64) for column in rows)
    return (source << _SOURCE_SHIFT) + number
