"""In which order a thread made its calls, and where its record may have holes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis import gaps
from tdxtrace.analysis.gaps import Flags, Times
from tdxtrace.tdx.leaves import numbers_of
from tdxtrace.tdx.status import is_retryable

# Issued by IPI, in hard interrupt context of whatever task is current: they belong
# to the CPU.  Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_flush_vp_on_cpu,
# smp_func_do_phymem_cache_wb.
IPI_LEAVES: Final = ("TDH.VP.FLUSH", "TDH.PHYMEM.CACHE.WB")
NONE: Final = -1
_LOW: Final = np.iinfo(np.int64).min

# What the chains need of a call, besides what is computed here.
_COLUMNS: Final = (
    *("source", "seq", "leaf", "tid", "tgid", "td_id", "vp_id", "gpa", "level", "page"),
    *("start_ns", "end_ns", "status"),
)

Index = NDArray[np.intp]


@dataclass(slots=True)
class Threads:
    """Calls of one source, thread after thread in the order of time, as columns."""

    frame: pl.DataFrame
    owner: Times
    leaf: NDArray[np.uint16]
    retryable: Flags
    returned: Flags
    lossy: Times
    """Running count of silences in which events may have been lost, up to each call."""
    began_midway: bool
    """Whether the trace says that calls were going on when it began."""
    named: dict[str, tuple[Times, Flags]] = field(default_factory=dict)
    """Columns that tell requests apart, as ``requests`` reads them."""

    def previous(self, among: Index) -> Index:
        """Row before each of ``among`` in its thread, of these rows; NONE if none."""
        before = np.full(len(among), NONE)
        before[1:] = np.where(self.owner[among[1:]] == self.owner[among[:-1]], among[:-1], NONE)
        return before

    def lossy_before(self, rows: Index) -> Times:
        """The running count of losses where the thread of each row begins."""
        if not self.lossy[-1:].any():
            return np.zeros(len(rows), np.int64)
        first = np.searchsorted(self.owner, self.owner[rows])
        return np.where(first > 0, self.lossy[np.maximum(first - 1, 0)], 0)


def owner() -> pl.Expr:
    """Whose calls go by one: the thread, or the CPU (below zero) for those it interrupted."""
    by_cpu = pl.col("in_irq").fill_null(pl.col("leaf").is_in(numbers_of(IPI_LEAVES)))
    cpu = pl.col("cpu").cast(pl.Int64)
    of_cpu = pl.when((by_cpu | pl.col("tid").is_null()) & cpu.is_not_null()).then(-2 - cpu)
    return of_cpu.otherwise(pl.col("tid").cast(pl.Int64)).fill_null(NONE)


def ordered(calls: pl.DataFrame, losses: pl.DataFrame, source: int) -> Threads:
    """Put the calls of one source in order, thread after thread.

    Calls in hard interrupt context, and those without a thread, go by CPU.

    Args:
        calls: The ``seamcalls`` rows of the source.
        losses: The ``losses`` table.
        source: The source's number.
    """
    cpu = pl.col("cpu").cast(pl.Int64)
    frame = calls.select(
        *_COLUMNS,
        owner=owner(),
        begins=pl.coalesce("start_ns", "end_ns"),
        ends=pl.coalesce("end_ns", "start_ns"),
        retryable=is_retryable(pl.col("status")).fill_null(False),
        first_cpu=pl.coalesce("start_cpu", "cpu").cast(pl.Int64).fill_null(gaps.NO_CPU),
        last_cpu=cpu.fill_null(gaps.NO_CPU),
    )
    frame = frame[frame.select(pl.arg_sort_by("owner", "begins", "seq")).to_series()]
    owners = frame["owner"].to_numpy()
    first = np.ones(len(owners), np.bool_)
    first[1:] = owners[1:] != owners[:-1]
    marked = gaps.Windows(losses, source)
    lossy = _lossy(frame, first, marked) if marked.any else np.zeros(len(first), np.int64)
    return Threads(
        frame,
        owners,
        frame["leaf"].to_numpy(),
        frame["retryable"].to_numpy(),
        frame["status"].is_not_null().to_numpy(),
        np.cumsum(lossy),
        gaps.edges(losses, source).any,
    )


def _lossy(frame: pl.DataFrame, first: Flags, windows: gaps.Windows) -> Times:
    """Whether events may be missing just before each call, or inside it."""
    start, end = frame["begins"].to_numpy(), frame["ends"].to_numpy()
    first_cpu, last_cpu = frame["first_cpu"].to_numpy(), frame["last_cpu"].to_numpy()
    since = np.where(first, _LOW, np.roll(end, 1))
    came_from = np.where(first, first_cpu, np.roll(last_cpu, 1))
    hidden = windows.overlap(first_cpu, since, start) | windows.overlap(came_from, since, start)
    inside = windows.overlap(first_cpu, start, end) | windows.overlap(last_cpu, start, end)
    # The return behind a loss may be that of another call, whose entry is in the loss, and
    # which the next call retries if it was busy.
    hidden |= inside
    hidden[1:] |= inside[:-1] & frame["retryable"].to_numpy()[:-1] & ~first[1:]
    # A thread makes one call after the other: where one seems to begin inside another, that
    # one's return was lost, and the return it was paired with is a later call's.
    hidden |= ~first & (since > start)
    return hidden.astype(np.int64)
