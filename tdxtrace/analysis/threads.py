"""Owning thread of each call, time windows of losses, and the TD of each thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.arrays import Flags, Times
from tdxtrace.analysis.loops.linking import NONE
from tdxtrace.tdx.leaves import numbers_of, parse_leaf

_MIN_NS: Final = np.iinfo(np.int64).min
_MAX_NS: Final = np.iinfo(np.int64).max
# Kinds of losses that open a window in which events may be missing or have the wrong thread.
_LOSS_KINDS: Final = ("lost_events", "overwritten", "buffer_full", "no_thread")
_START: Final = ("started_midway",)
NO_CPU: Final = -1
IDLE: Final = 0
# Leaves called from an IPI handler, in hard interrupt context of the current task: such calls
# belong to the CPU.  Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_flush_vp_on_cpu,
# smp_func_do_phymem_cache_wb.
IPI_LEAVES: Final = ("TDH.VP.FLUSH", "TDH.PHYMEM.CACHE.WB")
VP_ENTER: Final = parse_leaf("TDH.VP.ENTER")[0]


def may_miss_events(rows: pl.DataFrame, losses: pl.DataFrame, first: str, last: str) -> pl.Series:
    """Return whether events of any CPU may be lost between two times of each row.

    Args:
        rows: Rows with ``source`` and the columns ``first`` and ``last`` (ns), without nulls.
        losses: The ``losses`` table.
        first: Name of the column with the first time.
        last: Name of the column with the last time.
    """
    lost = np.zeros(rows.height, np.bool_)
    sources = rows["source"].to_numpy()
    begins, ends = rows[first].to_numpy(), rows[last].to_numpy()
    for source in np.unique(sources):
        at = np.flatnonzero(sources == source)
        any_cpu = np.full(len(at), NO_CPU, np.int64)
        lost[at] = LossWindows(losses, int(source)).overlap(any_cpu, begins[at], ends[at])
    return pl.Series(lost, dtype=pl.Boolean)


def call_owner() -> pl.Expr:
    """Return the thread of a call, or its CPU as -2 - cpu if the call interrupted a thread.

    Thread 0 is the idle task, one per CPU; a call recorded with it came from an interrupt.
    Linux kernel/sched/idle.c; kernel/fork.c, fork_idle.
    """
    by_cpu = pl.col("in_irq").fill_null(pl.col("leaf").is_in(numbers_of(IPI_LEAVES)))
    by_cpu |= pl.col("tid").is_null() | (pl.col("tid") == IDLE)
    cpu = pl.col("cpu").cast(pl.Int64)
    of_cpu = pl.when(by_cpu & cpu.is_not_null()).then(-2 - cpu)
    return of_cpu.otherwise(pl.col("tid").cast(pl.Int64)).fill_null(NONE)


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
        known: Rows of the same trace with recorded TDs and the same columns.
        owners: Columns that identify a thread, a process and so on, in order of preference.

    Returns:
        The rows in their order; ``td_id`` stays null if the owner has no TD or several.
    """
    if not rows["td_id"].null_count():
        return rows
    thread_tds = known.lazy().select("source", "tid", "tgid", "td_id")
    # Few of very many rows remain: the streaming engine materializes no intermediate table.
    named = thread_tds.filter(pl.col("td_id").is_not_null()).unique().collect(engine="streaming")
    unknown = np.flatnonzero(rows["td_id"].is_null().to_numpy())
    found = rows.select("td_id", *dict.fromkeys(key for keys in owners for key in keys))[unknown]
    for keys in owners:
        if named.is_empty() or not found["td_id"].null_count():
            break
        unambiguous = (
            named.drop_nulls(keys)
            .group_by(keys)
            .agg(td=pl.col("td_id").min(), n=pl.col("td_id").n_unique())
            .filter(pl.col("n") == 1)
            .drop("n")
        )
        td = left_lookup(found, unambiguous, keys)
        found = found.with_columns(td_id=pl.coalesce("td_id", td))
    return rows.with_columns(rows["td_id"].clone().scatter(unknown, found["td_id"]))


def td_of_events(rows: pl.DataFrame, entries: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """Add the TD of each KVM event, and drop the events of VMs that are not TDs.

    The TD is the one of the thread, else of its process.  Else it is the only one of the input, if
    the process was not recorded and the host never recorded the thread's instruction pointer,
    which it does for every VM that is not a TD.

    Args:
        rows: Rows with the columns source, tid and tgid.
        entries: The ``vm_entries`` table.
        known: Rows of the same trace with recorded TDs.

    Returns:
        The rows with ``td_id``, null if unknown.
    """
    kvm_threads = entries.filter(pl.col("rip") != 0).select("source", "tid").unique()
    other_rows = rows.with_columns(td_id=pl.lit(None, pl.UInt64)).join(
        kvm_threads, on=["source", "tid"], how="anti", nulls_equal=True, maintain_order="left"
    )
    named = infer_td(other_rows, known, TD_OWNERS[:2])
    any_td = infer_td(named, known, TD_OWNERS[2:])["td_id"]
    is_open = pl.col("td_id").is_null() & pl.col("tgid").is_null()
    return named.with_columns(td_id=pl.when(is_open).then(any_td).otherwise("td_id"))


def left_lookup(rows: pl.DataFrame, values: pl.DataFrame, keys: Sequence[str]) -> pl.Series:
    """Look up one value per row by ``keys``; far cheaper than a join of all columns.

    Args:
        rows: Rows with the columns ``keys``.
        values: Rows with the columns ``keys``, unique, and one value column.
        keys: Columns that identify a value.

    Returns:
        The value column of ``values`` for each row of ``rows``; null where no row matches.
    """
    joined = rows.select(keys).join(values, on=keys, how="left", maintain_order="left")
    return joined.to_series(len(keys))


class LossWindows:
    """Time windows of one source in which events may be lost.

    A window extends from the last event recorded before a loss to the first event recorded
    after it, on one CPU, or on all CPUs if the CPU is unknown.
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
        """Return for each interval whether a window of its CPU, or of all CPUs, overlaps it.

        Args:
            cpu: CPU of each interval; for NO_CPU (unknown), windows of every CPU are used.
            start: Start in ns.
            end: End in ns; an empty interval overlaps nothing.
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
    """Return the windows at the start of a trace that began while calls were in progress."""
    return LossWindows(losses, source, _START)


def _merged(start: Times, end: Times) -> tuple[Times, Times]:
    """Sort the windows and merge overlapping ones."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    is_first = np.ones(len(start), np.bool_)
    is_first[1:] = start[1:] > end[:-1]
    last = np.append(np.flatnonzero(is_first)[1:] - 1, len(start) - 1)
    return start[is_first], end[last]
