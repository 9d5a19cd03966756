"""Which row of each thread of a batch began first, and when its rows first and last ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.compiler import Runner
from tdxtrace.ingest.batch import UNKNOWN, BoolArray, I32Array, I64Array
from tdxtrace.ingest.decode.events import ABSENT, number_threads
from tdxtrace.ingest.loops.threads import first_and_last


@dataclass(frozen=True, slots=True)
class ThreadSpans:
    """What rows of one batch tell of their threads."""

    number: I32Array
    """Of each row: the place of its thread in the next three."""
    tid: list[int | None]
    """Of each thread; None: rows without a thread."""
    first_row: list[int]
    """The row that began first."""
    first_end_ns: list[int]
    last_end_ns: list[int]
    began_ns: I64Array
    """When each row began, or ended where that is not known."""

    def threads_of(self, rows: BoolArray) -> set[int]:
        """Return the threads of some rows, where they are known."""
        has_rows = np.bincount(self.number[rows], minlength=len(self.tid))
        return {tid for tid, n in zip(self.tid, has_rows, strict=True) if n and tid is not None}


def spans_of(rows: pl.DataFrame, run: Runner[Any]) -> ThreadSpans:
    """Return the spans of the threads of rows with ``tid``, ``seq``, ``start_ns``, ``end_ns``."""
    tid = numbers_of(rows, "tid", UNKNOWN)
    number, n_threads = number_threads(tid, run)
    began, ended = _either(rows, "start_ns", "end_ns"), _either(rows, "end_ns", "start_ns")
    first_row, first_end, last_end = (np.full(n_threads, ABSENT, np.int64) for _ in range(3))
    seq = rows["seq"].to_numpy(writable=True)
    run(first_and_last)(number, began, ended, seq, first_row, first_end, last_end)
    tids = [None if n == UNKNOWN else n for n in tid.take(first_row).tolist()]
    ends = first_end.tolist(), last_end.tolist()
    return ThreadSpans(number, tids, first_row.tolist(), *ends, began)


def numbers_of(rows: pl.DataFrame, name: str, missing: int) -> NDArray[Any]:
    """Return a column as an array, with ``missing`` for null."""
    column = rows[name]
    return (column.fill_null(missing) if column.null_count() else column).to_numpy(writable=True)


def _either(rows: pl.DataFrame, name: str, other: str) -> I64Array:
    """Return one column, and another where that is null."""
    column = rows[name]
    if column.null_count():
        column = rows.select(pl.coalesce(name, other)).to_series()
    return column.to_numpy(writable=True)
