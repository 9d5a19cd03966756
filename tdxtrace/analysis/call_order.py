"""Stream the calls of a trace in the order of their starts, without holding all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import polars as pl

TIMES: Final = ("start_ns", "end_ns")
"""Columns of ``seamcalls`` that give the start of a call; the first that is not null counts."""
_BEGINS: Final = pl.coalesce(TIMES)


@dataclass(slots=True)
class BeginsOfParts:
    """Earliest call start of each part of a trace."""

    firsts: list[dict[int, int]] = field(default_factory=list)
    """For each part: earliest start in ns, keyed by source."""

    def record(self, parts: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Yield the parts of a trace unchanged, and record their earliest call starts."""
        for calls in parts:
            self.firsts.append(dict(calls.group_by("source").agg(_BEGINS.min()).iter_rows()))
            yield calls

    def later_begins(self) -> Iterator[dict[int, int]]:
        """Yield, for each part, the earliest call start of all later parts, keyed by source."""
        first: dict[int, int] = {}
        later = []
        for of_part in reversed(self.firsts):
            later.append(first)
            earlier = {source: min(ns, first.get(source, ns)) for source, ns in of_part.items()}
            first = first | earlier
        yield from reversed(later)


def calls_in_order(parts: Iterable[pl.DataFrame], begins: BeginsOfParts) -> Iterator[pl.DataFrame]:
    """Yield the calls of each source sorted by start, and by ``seq`` for equal starts.

    Recordings have calls in the order of their ends.  A call is held back until no later part has
    a call that began at or before its start.  Only calls that began while another call was in
    flight are held back.

    Args:
        parts: Rows of the ``seamcalls`` table.
        begins: Earliest starts of the same parts, recorded in an earlier pass.

    Yields:
        Rows of one source; no row begins before a row that was yielded earlier for that source.
    """
    deferred: dict[int, pl.DataFrame] = {}
    for part, first in zip(parts, begins.later_begins(), strict=True):
        for source in part["source"].unique().sort():
            calls = part.filter(pl.col("source") == source)
            if source in deferred:
                calls = pl.concat([deferred.pop(source), calls], how="diagonal")
            calls = calls.sort(_BEGINS, "seq")
            n_ready = calls.height
            if source in first:
                n_ready = calls.select((first[source] > _BEGINS).sum()).item()
            if n_ready < calls.height:
                deferred[source] = calls[n_ready:]
            if n_ready:
                yield calls[:n_ready]
