"""Calls in the order of their threads, with possible losses, and the TD of each thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis import loss_windows
from tdxtrace.analysis.arrays import Flags, Index, Times
from tdxtrace.tdx.leaves import numbers_of, parse_leaf
from tdxtrace.tdx.status import is_retryable

# Issued by IPI, in hard interrupt context of whatever task is current: they belong
# to the CPU.  Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_flush_vp_on_cpu,
# smp_func_do_phymem_cache_wb.
IPI_LEAVES: Final = ("TDH.VP.FLUSH", "TDH.PHYMEM.CACHE.WB")
NONE: Final = -1
VP_ENTER: Final = parse_leaf("TDH.VP.ENTER")[0]
_LOW: Final = np.iinfo(np.int64).min

# Columns of ``seamcalls`` that retry chains need.
_COLUMNS: Final = (
    *("source", "seq", "leaf", "tid", "tgid", "td_id", "vp_id", "gpa", "level", "page"),
    *("start_ns", "end_ns", "status"),
)


@dataclass(slots=True)
class ThreadCalls:
    """Calls of one source, sorted by thread and time, as columns."""

    frame: pl.DataFrame
    owner: Times
    leaf: NDArray[np.uint16]
    retryable: Flags
    returned: Flags
    lossy: Times
    """Running count of gaps in which events may have been lost, up to each call."""
    started_midway: bool
    """Whether calls were in progress when the trace began."""
    named: dict[str, tuple[Times, Flags]] = field(default_factory=dict)
    """Cache of the columns that identify requests (``request_identity``)."""

    def previous(self, among: Index) -> Index:
        """Return the row before each of ``among`` in its thread, among these rows; NONE if none."""
        before = np.full(len(among), NONE)
        before[1:] = np.where(self.owner[among[1:]] == self.owner[among[:-1]], among[:-1], NONE)
        return before

    def lossy_before(self, rows: Index) -> Times:
        """Return the running count of losses at the start of the thread of each row."""
        if not self.lossy[-1:].any():
            return np.zeros(len(rows), np.int64)
        first = np.searchsorted(self.owner, self.owner[rows])
        return np.where(first > 0, self.lossy[np.maximum(first - 1, 0)], 0)


def call_owner() -> pl.Expr:
    """Return the thread of a call, or its CPU as -2 - cpu where the call interrupted a thread."""
    by_cpu = pl.col("in_irq").fill_null(pl.col("leaf").is_in(numbers_of(IPI_LEAVES)))
    cpu = pl.col("cpu").cast(pl.Int64)
    of_cpu = pl.when((by_cpu | pl.col("tid").is_null()) & cpu.is_not_null()).then(-2 - cpu)
    return of_cpu.otherwise(pl.col("tid").cast(pl.Int64)).fill_null(NONE)


def order_by_thread(calls: pl.DataFrame, losses: pl.DataFrame, source: int) -> ThreadCalls:
    """Sort the calls of one source by thread and time.

    Calls in hard interrupt context, and those without a thread, go by CPU.

    Args:
        calls: The ``seamcalls`` rows of the source.
        losses: The ``losses`` table.
        source: The source's number.
    """
    cpu = pl.col("cpu").cast(pl.Int64)
    frame = calls.select(
        *_COLUMNS,
        owner=call_owner(),
        begins=pl.coalesce("start_ns", "end_ns"),
        ends=pl.coalesce("end_ns", "start_ns"),
        retryable=is_retryable(pl.col("status")).fill_null(False),
        first_cpu=pl.coalesce("start_cpu", "cpu").cast(pl.Int64).fill_null(loss_windows.NO_CPU),
        last_cpu=cpu.fill_null(loss_windows.NO_CPU),
    )
    frame = frame[frame.select(pl.arg_sort_by("owner", "begins", "seq")).to_series()]
    owners = frame["owner"].to_numpy()
    first = np.ones(len(owners), np.bool_)
    first[1:] = owners[1:] != owners[:-1]
    windows_of_loss = loss_windows.LossWindows(losses, source)
    lossy = (
        _may_miss_events(frame, first, windows_of_loss)
        if windows_of_loss.any
        else np.zeros(len(first), np.int64)
    )
    return ThreadCalls(
        frame,
        owners,
        frame["leaf"].to_numpy(),
        frame["retryable"].to_numpy(),
        frame["status"].is_not_null().to_numpy(),
        np.cumsum(lossy),
        loss_windows.start_windows(losses, source).any,
    )


def _may_miss_events(frame: pl.DataFrame, first: Flags, windows: loss_windows.LossWindows) -> Times:
    """Return 1 for each call just before or inside which events may be missing, else 0."""
    start, end = frame["begins"].to_numpy(), frame["ends"].to_numpy()
    first_cpu, last_cpu = frame["first_cpu"].to_numpy(), frame["last_cpu"].to_numpy()
    since = np.where(first, _LOW, np.roll(end, 1))
    previous_cpu = np.where(first, first_cpu, np.roll(last_cpu, 1))
    may_miss = windows.overlap(first_cpu, since, start) | windows.overlap(
        previous_cpu, since, start
    )
    inside = windows.overlap(first_cpu, start, end) | windows.overlap(last_cpu, start, end)
    # The return after a loss may belong to another call, whose entry was lost, and which the
    # next call retries if it was busy.
    may_miss |= inside
    may_miss[1:] |= inside[:-1] & frame["retryable"].to_numpy()[:-1] & ~first[1:]
    # A thread makes one call at a time: where one seems to begin inside another, the return of
    # the outer one was lost, and it was paired with the return of a later call.
    may_miss |= ~first & (since > start)
    return may_miss.astype(np.int64)


TD_OWNERS: Final = (("source", "tid"), ("source", "tgid"), ("source",))


def unprobed_entries(entries: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Return the ``vm_entries`` of vCPUs without a TDH.VP.ENTER among ``seamcalls`` rows."""
    probed = calls.filter(pl.col("leaf") == VP_ENTER).select("source", "tid").unique()
    return entries.join(probed, on=("source", "tid"), how="anti", nulls_equal=True)


def infer_td(
    rows: pl.DataFrame, known: pl.DataFrame, owners: Sequence[Sequence[str]] = TD_OWNERS
) -> pl.DataFrame:
    """Fill a null ``td_id`` with the only TD of the thread, else of its process, else of the input.

    Args:
        rows: Rows with td_id and the columns of ``owners``.
        known: Rows of the same trace that name TDs: the same columns.
        owners: Columns that identify a thread, a process and so on, first choice first.

    Returns:
        The rows in their order; null stays where there is no TD, or more than one.
    """
    if not rows["td_id"].null_count():
        return rows
    named = known.select("source", "tid", "tgid", "td_id").filter(pl.col("td_id").is_not_null())
    named = named.unique()
    for keys in owners:
        only = (
            named.drop_nulls(keys)
            .group_by(keys)
            .agg(td=pl.col("td_id").min(), n=pl.col("td_id").n_unique())
            .filter(pl.col("n") == 1)
            .drop("n")
        )
        td = left_lookup(rows, only, keys)
        rows = rows.with_columns(td_id=pl.coalesce("td_id", td))
    return rows


def left_lookup(rows: pl.DataFrame, values: pl.DataFrame, keys: Sequence[str]) -> pl.Series:
    """Look up one value per row by ``keys``; far cheaper than joining all columns.

    Args:
        rows: Rows with the columns of ``keys``.
        values: Columns ``keys``, unique, and one more.
        keys: Columns that identify a value.

    Returns:
        The further column of ``values`` for each of ``rows``; null where there is none.
    """
    joined = rows.select(keys).join(values, on=keys, how="left", maintain_order="left")
    return joined.to_series(len(keys))
