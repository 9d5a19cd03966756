"""Time windows in which events may have been lost."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.arrays import Flags, Times

_MIN_NS: Final = np.iinfo(np.int64).min
_MAX_NS: Final = np.iinfo(np.int64).max
# Kinds of losses that open a window in which events may be missing.
_LOSS_KINDS: Final = ("lost_events", "overwritten", "buffer_full")
_START: Final = ("started_midway",)
NO_CPU: Final = -1


class LossWindows:
    """Windows of loss of one source.

    A window lies between the last event known before and the first one known
    after it, on one CPU, or on all where the CPU is not known.
    """

    def __init__(
        self, losses: pl.DataFrame, source: int, kinds: tuple[str, ...] = _LOSS_KINDS
    ) -> None:
        bounded = pl.col("start_ns").is_not_null() | pl.col("end_ns").is_not_null()
        rows = losses.filter(
            pl.col("source") == source, pl.col("kind").cast(pl.String).is_in(kinds), bounded
        ).select(
            pl.col("cpu").cast(pl.Int64).fill_null(NO_CPU),
            pl.col("start_ns").fill_null(_MIN_NS),
            pl.col("end_ns").fill_null(_MAX_NS),
        )
        self._by_cpu = {
            int(cpu[0]): _merged(part["start_ns"].to_numpy(), part["end_ns"].to_numpy())
            for cpu, part in rows.group_by("cpu")
        }

    @property
    def any(self) -> bool:
        """Whether there is any window."""
        return bool(self._by_cpu)

    def overlap(self, cpu: Times, start: Times, end: Times) -> Flags:
        """Return for each interval whether a window of its CPU (or of any) overlaps it.

        Args:
            cpu: CPU of each interval, NO_CPU where unknown: then every window counts.
            start: Start in ns.
            end: End in ns; an interval of no length overlaps nothing.
        """
        hit = np.zeros(len(cpu), np.bool_)
        has_length = start < end
        for number, (starts, ends) in self._by_cpu.items():
            here = (cpu == number) | (cpu == NO_CPU)
            if number == NO_CPU:
                here[:] = True
            index = np.searchsorted(ends, start[here], side="right")
            inside = index < len(starts)
            found = np.zeros(len(index), np.bool_)
            found[inside] = starts[index[inside]] < end[here][inside]
            hit[here] |= found
        return hit & has_length


def start_windows(losses: pl.DataFrame, source: int) -> LossWindows:
    """Return the windows at the trace's start, where calls were already in progress."""
    return LossWindows(losses, source, _START)


def _merged(start: Times, end: Times) -> tuple[Times, Times]:
    """Sort the windows and merge those that overlap."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    is_first = np.ones(len(start), np.bool_)
    is_first[1:] = start[1:] > end[:-1]
    last = np.append(np.flatnonzero(is_first)[1:] - 1, len(start) - 1)
    return start[is_first], end[last]
