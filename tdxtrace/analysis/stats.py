"""Counters per leaf, TD and vCPU: the ``leaf_stats``, ``vm_stats`` and ``vcpu_stats`` tables."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from tdxtrace.analysis.threads import VP_ENTER, unprobed_entries
from tdxtrace.tables.events import SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import (
    COUNTED,
    COUNTERS,
    LEAF_STATS,
    OUTCOMES,
    RETRY_CHAINS,
    VCPU_STATS,
    VM_STATS,
    ZERO_STEPS,
)
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tdx.word import is_busy


def leaf_stats(retry_chains: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """Aggregate the retry chains of each leaf.

    Quantiles are computed over the requests whose end was recorded.  A cut chain needed at least
    its recorded attempts and time, and counts only for the maximum.  A quantile is a value that
    occurred: the smallest one that at least that share of the requests did not exceed.

    Args:
        retry_chains: The ``retry_chains`` table, or a lazy query that yields it.

    Returns:
        The ``leaf_stats`` table; within a source, the leaf with most retried requests first.

    Raises:
        TableError: If ``retry_chains`` lacks a column or has one of another type.
    """
    is_complete = pl.col("outcome") != "cut"
    attempts = pl.col("n_attempts").filter(is_complete)
    took = pl.col("took_ns").filter(is_complete)
    needed = ("source", "leaf", "n_attempts", "n_busy", "took_ns", "outcome")
    counted = (
        RETRY_CHAINS.pick(retry_chains, *needed)
        .group_by("source", "leaf")
        .agg(
            n_requests=pl.len().cast(pl.UInt64),
            n_seamcalls=pl.col("n_attempts").sum().cast(pl.UInt64),
            retried_seamcalls=(pl.col("n_busy") > 0).sum().cast(pl.UInt64),
            n_busy=pl.col("n_busy").sum().cast(pl.UInt64),
            p50_attempts=attempts.quantile(0.5, "equiprobable").cast(pl.UInt32),
            p99_attempts=attempts.quantile(0.99, "equiprobable").cast(pl.UInt32),
            max_attempts=pl.col("n_attempts").max(),
            p99_ns=took.quantile(0.99, "equiprobable").cast(pl.Int64),
            max_ns=pl.col("took_ns").max(),
            **{name: (pl.col("outcome") == name).sum().cast(pl.UInt64) for name in OUTCOMES},
        )
    )
    order = ("source", "retried_seamcalls", "n_requests", "leaf")
    return LEAF_STATS.conform(counted.sort(order, descending=[False, True, True, False]))


_TD_KEY = ("source", "td_id", "tgid")


def vm_stats(retry_chains: pl.DataFrame | pl.LazyFrame, zero_steps: pl.DataFrame) -> pl.DataFrame:
    """Count requests, retried requests and zero-step episodes per TD.

    ``retried_seamcalls`` is the counter proposed in the mail cited below: it is incremented once
    per request, at the first busy answer, however many follow.

    Args:
        retry_chains: The ``retry_chains`` table, or a lazy query that yields it.
        zero_steps: The ``zero_steps`` table.

    Returns:
        The ``vm_stats`` table; within a source, the TD with most retried requests first.  Requests
        with an unknown TD are counted by process, or in one row without TD and process.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        P. Bonzini, Re: [PATCH 09/21] KVM: TDX: Retry seamcall when TDX_OPERAND_BUSY
        with operand SEPT, 2024-09-10.
    """
    needed = ("tid", "leaf", "n_attempts", "n_busy")
    chains = RETRY_CHAINS.pick(retry_chains, *_TD_KEY, *needed).with_columns(_one_process_per_td())
    steps = ZERO_STEPS.conform(zero_steps).filter(pl.col("strength") != "weak")
    entering = pl.col("leaf") == VP_ENTER
    counted = chains.group_by(_TD_KEY, maintain_order=True).agg(
        n_seamcalls=pl.col("n_attempts").sum().cast(pl.UInt64),
        n_requests=pl.len().cast(pl.UInt64),
        retried_seamcalls=(pl.col("n_busy") > 0).sum().cast(pl.UInt64),
        n_busy=pl.col("n_busy").sum().cast(pl.UInt64),
        max_attempts=pl.col("n_attempts").max(),
        n_vcpus=pl.col("tid").filter(entering).n_unique().cast(pl.UInt32),
    )
    episodes = _with_td(steps, chains).group_by(_TD_KEY).agg(zero_steps=pl.len().cast(pl.UInt64))
    joined = counted.join(episodes, on=_TD_KEY, how="full", nulls_equal=True, coalesce=True)
    filled = joined.with_columns(pl.col(pl.UInt64, pl.UInt32).exclude("td_id").fill_null(0))
    return VM_STATS.conform(
        filled.sort("source", "retried_seamcalls", "td_id", descending=[False, True, False])
    )


def counters(
    retry_chains: pl.DataFrame, busy_answers: pl.DataFrame, zero_steps: pl.DataFrame
) -> pl.DataFrame:
    """Return the time of each increment of a ``vm_stats`` counter, and its new value.

    ``retried_seamcalls`` is incremented at the first busy answer to a request, ``zero_steps`` at
    the first refused entry of an episode that is not weak.  Both start at 0 when the recording
    starts; the last value of each equals the value in ``vm_stats``.

    Args:
        retry_chains: The ``retry_chains`` table.
        busy_answers: The ``busy_answers`` table.
        zero_steps: The ``zero_steps`` table.

    Returns:
        The ``counters`` table, sorted by source and time.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        As for :func:`vm_stats`.
    """
    chains = RETRY_CHAINS.conform(retry_chains).with_columns(_one_process_per_td())
    first = BUSY_ANSWERS.conform(busy_answers).filter(pl.col("number") == 1)
    retried = chains.join(first, on=("source", "first_seq"), how="inner").select(
        *_TD_KEY, "seq", ts_ns=pl.col("start_ns") + pl.col("waited_ns")
    )
    steps = ZERO_STEPS.conform(zero_steps).filter(pl.col("strength") != "weak")
    refused = _with_td(steps, chains).select(*_TD_KEY, seq="first_seq", ts_ns="start_ns")
    parts = {"retried_seamcalls": retried, "zero_steps": refused}
    rows = pl.concat(
        part.select(*_TD_KEY, "ts_ns", "seq", counter=pl.lit(name, pl.Enum(COUNTED)))
        for name, part in parts.items()
    ).sort("source", "ts_ns", "seq", "counter")
    ordinal = pl.int_range(1, pl.len() + 1, dtype=pl.UInt64).over(*_TD_KEY, "counter")
    return COUNTERS.conform(rows.with_columns(total=ordinal))


def _with_td(steps: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Add the TD of zero-step episodes, inferred from other calls of the thread or process.

    If no process was recorded and the source has exactly one TD, use that TD.
    """
    threads = (
        chains.filter(pl.col("tid").is_not_null())
        .select("source", "tid", of_td="td_id", of_process="tgid")
        .unique(subset=("source", "tid"), maintain_order=True)
    )
    tds = (
        chains.filter(pl.col("tgid").is_not_null(), pl.col("td_id").is_not_null())
        .group_by("source", "tgid")
        .agg(only_td=pl.col("td_id").first(), n=pl.col("td_id").n_unique())
        .filter(pl.col("n") == 1)
    )
    alone = (
        chains.filter(pl.col("td_id").is_not_null())
        .group_by("source")
        .agg(alone=pl.col("td_id").first(), n=pl.col("td_id").n_unique())
        .filter(pl.col("n") == 1)
    )
    by_source = pl.when(pl.col("tgid").is_null()).then("alone")
    return (
        steps.join(threads, on=("source", "tid"), how="left")
        .with_columns(pl.coalesce("td_id", "of_td"), pl.coalesce("tgid", "of_process"))
        .join(tds, on=("source", "tgid"), how="left")
        .join(alone, on="source", how="left")
        .with_columns(pl.coalesce("td_id", "only_td", by_source))
    )


def _one_process_per_td() -> pl.Expr:
    """Return the process of each row's TD, also for threads whose process was not recorded."""
    of_td = pl.col("tgid").drop_nulls().first().over("source", "td_id")
    return pl.when(pl.col("td_id").is_null()).then("tgid").otherwise(of_td).alias("tgid")


_NOT_ENTERED = 0xFFFF_FFFF  # exit reason -1 of kvm_exit; see zero_steps
_THREAD = ("source", "tid")
VCPU_COLUMNS = (*_THREAD, "tgid", "td_id", "vp_id", "leaf", "status")
"""Columns of ``seamcalls`` from which vCPUs are counted."""


def vcpu_stats(
    seamcalls: pl.DataFrame | Iterable[pl.DataFrame],
    vm_entries: pl.DataFrame,
    zero_steps: pl.DataFrame,
) -> pl.DataFrame:
    """Count entries and zero-step episodes per vCPU.

    This is the per-vCPU counter proposed in the mail cited by :func:`vm_stats`.  A vCPU is
    identified by the thread that enters it.  Entries come from TDH.VP.ENTER if it was captured,
    else from kvm_entry and kvm_exit.

    Args:
        seamcalls: The ``seamcalls`` table, or its parts.
        vm_entries: The ``vm_entries`` table.
        zero_steps: The ``zero_steps`` table.

    Returns:
        The ``vcpu_stats`` table; within a source, the vCPU with most episodes first.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    numbers, of_calls = VM_ENTRIES.conform(vm_entries), _of_threads(seamcalls)
    probed = of_calls.filter(pl.col("n_entries") > 0)
    kvm_only = unprobed_entries(numbers, probed.with_columns(leaf=VP_ENTER))
    refused = (pl.col("exit_reason") == _NOT_ENTERED).fill_null(False)
    counted = pl.concat(
        [
            probed.select(*_THREAD, "tgid", "vp_id", "n_entries", "n_refused", vcpu_id=_NO_NUMBER),
            kvm_only.group_by(_THREAD).agg(
                pl.col("tgid").max(),
                pl.lit(None, pl.UInt64).alias("vp_id"),
                n_entries=pl.len().cast(pl.UInt64),
                n_refused=refused.sum().cast(pl.UInt64),
                vcpu_id=pl.col("vcpu_id").drop_nulls().first(),
            ),
        ]
    )
    ids = numbers.group_by(_THREAD).agg(number=pl.col("vcpu_id").drop_nulls().first())
    weak = pl.col("strength") == "weak"
    episodes = (
        ZERO_STEPS.conform(zero_steps)
        .group_by(_THREAD)
        .agg(zero_steps=(~weak).sum().cast(pl.UInt64), zero_steps_weak=weak.sum().cast(pl.UInt64))
    )
    tds = of_calls.select(*_THREAD, "td_id")
    for other in (ids, tds, episodes):
        counted = counted.join(other, on=_THREAD, how="left", nulls_equal=True)
    filled = counted.with_columns(
        pl.coalesce("vcpu_id", "number").alias("vcpu_id"),
        pl.col("zero_steps", "zero_steps_weak").fill_null(0),
    )
    order = ("source", "zero_steps", "n_refused", "tid")
    return VCPU_STATS.conform(filled.sort(order, descending=[False, True, True, False]))


_NO_NUMBER = pl.lit(None, pl.UInt32)


def _of_threads(seamcalls: pl.DataFrame | Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Return one row per thread: TD, and the process, VP and counts of its TDH.VP.ENTER calls."""
    parts = [seamcalls] if isinstance(seamcalls, pl.DataFrame) else seamcalls
    enters = pl.col("leaf") == VP_ENTER
    found = (
        SEAMCALLS.pick(part, *VCPU_COLUMNS)
        .group_by(_THREAD, maintain_order=True)
        .agg(
            pl.col("tgid").filter(enters).max(),
            pl.col("vp_id").filter(enters).drop_nulls().first(),
            pl.col("td_id").drop_nulls().first(),
            n_entries=enters.sum().cast(pl.UInt64),
            n_refused=(enters & is_busy(pl.col("status")).fill_null(False)).sum().cast(pl.UInt64),
        )
        for part in (SEAMCALLS.empty(), *parts)
    )
    sums = pl.concat(found).group_by(_THREAD, maintain_order=True)
    return sums.agg(
        pl.col("tgid").max(),
        pl.col("vp_id", "td_id").drop_nulls().first(),
        pl.col("n_entries", "n_refused").sum(),
    )
