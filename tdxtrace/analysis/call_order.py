"""The calls of a trace in the order of their begins, without holding all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import polars as pl

TIMES: Final = ("start_ns", "end_ns")
"""Columns of ``seamcalls`` that tell when a call began."""
_BEGINS: Final = pl.coalesce(TIMES)


@dataclass(slots=True)
class BeginsOfParts:
    """When the calls of each part of a trace begin at the earliest."""

    firsts: list[dict[int, int]] = field(default_factory=list)
    """By part: ns, by source."""

    def noted(self, parts: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Yield the parts of a trace as they are, and note when their calls begin."""
        for calls in parts:
            self.firsts.append(dict(calls.group_by("source").agg(_BEGINS.min()).iter_rows()))
            yield calls

    def behind(self) -> Iterator[dict[int, int]]:
        """Yield for each part when the calls of the parts behind it begin at the earliest."""
        first: dict[int, int] = {}
        found = []
        for of_part in reversed(self.firsts):
            found.append(first)
            earlier = {source: min(ns, first.get(source, ns)) for source, ns in of_part.items()}
            first = first | earlier
        yield from reversed(found)


def calls_in_order(parts: Iterable[pl.DataFrame], begins: BeginsOfParts) -> Iterator[pl.DataFrame]:
    """Yield the calls of each source in the order of their begins, and of ``seq`` where equal.

    Recordings have calls in the order of their ends: one waits here until no later part has a call
    that began before it.  What waits is what began while a call was in flight.

    Args:
        parts: Rows of the ``seamcalls`` table.
        begins: What the same parts told when they were read before.

    Yields:
        Rows of one source, none of which begins before one of an earlier part of that source.
    """
    waiting: dict[int, pl.DataFrame] = {}
    for part, first in zip(parts, begins.behind(), strict=True):
        for source in part["source"].unique().sort():
            calls = part.filter(pl.col("source") == source)
            if source in waiting:
                calls = pl.concat([waiting.pop(source), calls], how="diagonal")
            calls = calls.sort(_BEGINS, "seq")
            n_ready = calls.height
            if source in first:
                n_ready = calls.select((first[source] > _BEGINS).sum()).item()
            if n_ready < calls.height:
                waiting[source] = calls[n_ready:]
            if n_ready:
                yield calls[:n_ready]
