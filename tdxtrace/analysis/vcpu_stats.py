"""Entries, refusals and zero-step episodes per vCPU."""

from __future__ import annotations

import polars as pl

from tdxtrace.tables.events import SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import VCPU_STATS, ZERO_STEPS
from tdxtrace.tdx import leaves
from tdxtrace.tdx.word import is_busy

_VP_ENTER = leaves.parse_leaf("TDH.VP.ENTER")[0]
_NOT_ENTERED = 0xFFFF_FFFF  # kvm_exit's reason -1, see zero_steps
_THREAD = ("source", "tid")


def vcpu_stats(
    seamcalls: pl.DataFrame, vm_entries: pl.DataFrame, zero_steps: pl.DataFrame
) -> pl.DataFrame:
    """Count entries and zero-step episodes per vCPU, as the seed mail's vCPU stat would.

    A vCPU is the thread that enters it.  Entries come from TDH.VP.ENTER where it
    was captured, else from kvm_entry and kvm_exit.

    Args:
        seamcalls: The ``seamcalls`` table.
        vm_entries: The ``vm_entries`` table.
        zero_steps: The ``zero_steps`` table.

    Returns:
        The ``vcpu_stats`` table, the vCPU with most episodes first.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    calls = SEAMCALLS.conform(seamcalls).filter(pl.col("leaf") == _VP_ENTER)
    numbers = VM_ENTRIES.conform(vm_entries)
    stock = numbers.join(calls.select(_THREAD).unique(), on=_THREAD, how="anti", nulls_equal=True)
    busy = is_busy(pl.col("status")).fill_null(False)
    refused = (pl.col("exit_reason") == _NOT_ENTERED).fill_null(False)
    counted = pl.concat(
        [
            calls.group_by(_THREAD).agg(
                *_identity("vp_id", pl.lit(None, pl.UInt32).alias("vcpu_id")), *_counts(busy)
            ),
            stock.group_by(_THREAD).agg(
                *_identity(pl.lit(None, pl.UInt64).alias("vp_id"), "vcpu_id"), *_counts(refused)
            ),
        ]
    )
    ids = numbers.group_by(_THREAD).agg(number=pl.col("vcpu_id").drop_nulls().first())
    tds = (
        SEAMCALLS.conform(seamcalls)
        .group_by(_THREAD)
        .agg(td_id=pl.col("td_id").drop_nulls().first())
    )
    weak = pl.col("strength") == "weak"
    episodes = (
        ZERO_STEPS.conform(zero_steps)
        .group_by(_THREAD)
        .agg(zero_steps=(~weak).sum().cast(pl.UInt64), zero_steps_weak=weak.sum().cast(pl.UInt64))
    )
    for other in (ids, tds, episodes):
        counted = counted.join(other, on=_THREAD, how="left", nulls_equal=True)
    filled = counted.with_columns(
        pl.coalesce("vcpu_id", "number").alias("vcpu_id"),
        pl.col("zero_steps", "zero_steps_weak").fill_null(0),
    )
    order = ("source", "zero_steps", "n_refused", "tid")
    return VCPU_STATS.conform(filled.sort(order, descending=[False, True, True, False]))


def _identity(vp_id: str | pl.Expr, vcpu_id: str | pl.Expr) -> list[pl.Expr]:
    first = [pl.col(c) if isinstance(c, str) else c for c in (vp_id, vcpu_id)]
    return [pl.col("tgid").max(), *(c.drop_nulls().first() for c in first)]


def _counts(refused: pl.Expr) -> list[pl.Expr]:
    return [
        pl.len().cast(pl.UInt64).alias("n_entries"),
        refused.sum().cast(pl.UInt64).alias("n_refused"),
    ]
