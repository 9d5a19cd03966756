"""Which silences of a thread may hide events that were lost."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

Times = NDArray[np.int64]
Flags = NDArray[np.bool_]

_LOW: Final = np.iinfo(np.int64).min
_HIGH: Final = np.iinfo(np.int64).max
# Kinds of losses that open a window in which events may be missing.
_MARKED: Final = ("lost_events", "overwritten", "buffer_full")
_EDGE: Final = ("started_midway",)
NO_CPU: Final = -1


class Windows:
    """Windows of loss of one source, to be asked about intervals.

    A window lies between the last event known before and the first one known
    after it, on one CPU, or on all where the CPU is not known.
    """

    def __init__(self, losses: pl.DataFrame, source: int, kinds: tuple[str, ...] = _MARKED) -> None:
        bounded = pl.col("start_ns").is_not_null() | pl.col("end_ns").is_not_null()
        rows = losses.filter(
            pl.col("source") == source, pl.col("kind").cast(pl.String).is_in(kinds), bounded
        ).select(
            pl.col("cpu").cast(pl.Int64).fill_null(NO_CPU),
            pl.col("start_ns").fill_null(_LOW),
            pl.col("end_ns").fill_null(_HIGH),
        )
        self._by_cpu = {
            int(cpu[0]): _merged(part["start_ns"].to_numpy(), part["end_ns"].to_numpy())
            for cpu, part in rows.group_by("cpu")
        }

    @property
    def any(self) -> bool:
        """Whether there is a window at all."""
        return bool(self._by_cpu)

    def overlap(self, cpu: NDArray[np.int64], start: Times, end: Times) -> Flags:
        """Tell for each interval whether a window of its CPU (or of any) overlaps it.

        Args:
            cpu: CPU of each interval, NO_CPU where unknown: then every window counts.
            start: Where it begins, in ns.
            end: Where it ends, in ns; an interval of no length overlaps nothing.
        """
        hit = np.zeros(len(cpu), np.bool_)
        lasts = start < end
        for number, (starts, ends) in self._by_cpu.items():
            here = (cpu == number) | (cpu == NO_CPU)
            if number == NO_CPU:
                here[:] = True
            index = np.searchsorted(ends, start[here], side="right")
            inside = index < len(starts)
            found = np.zeros(len(index), np.bool_)
            found[inside] = starts[index[inside]] < end[here][inside]
            hit[here] |= found
        return hit & lasts


def edges(losses: pl.DataFrame, source: int) -> Windows:
    """Windows that are the trace's own start, where calls were already going on."""
    return Windows(losses, source, _EDGE)


def _merged(start: Times, end: Times) -> tuple[Times, Times]:
    """Sorted windows without overlap."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    fresh = np.ones(len(start), np.bool_)
    fresh[1:] = start[1:] > end[:-1]
    last = np.append(np.flatnonzero(fresh)[1:] - 1, len(start) - 1)
    return start[fresh], end[last]
