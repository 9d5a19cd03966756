"""The counters that kvm->stat would hold: requests retried per TD."""

from __future__ import annotations

import polars as pl

from tdxtrace.tables.findings import RETRY_CHAINS, VM_STATS, ZERO_STEPS
from tdxtrace.tdx import leaves

_VP_ENTER = leaves.parse_leaf("TDH.VP.ENTER")[0]
_VM = ("source", "td_id", "tgid")


def vm_stats(retry_chains: pl.DataFrame, zero_steps: pl.DataFrame) -> pl.DataFrame:
    """Count requests, retried requests and zero-step episodes per TD.

    ``retried_seamcalls`` is the stat of the seed mail: it goes up by one at the
    first busy answer to a request, however many follow.

    Args:
        retry_chains: The ``retry_chains`` table.
        zero_steps: The ``zero_steps`` table.

    Returns:
        The ``vm_stats`` table, the most retried TD first.  Requests whose TD the
        capture does not show are counted by process, or in a row without either.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        P. Bonzini, Re: [PATCH 09/21] KVM: TDX: Retry seamcall when TDX_OPERAND_BUSY
        with operand SEPT, 2024-09-10.
    """
    chains = RETRY_CHAINS.conform(retry_chains).with_columns(_one_process_per_td())
    steps = ZERO_STEPS.conform(zero_steps).filter(pl.col("strength") != "weak")
    entering = pl.col("leaf") == _VP_ENTER
    counted = chains.group_by(_VM, maintain_order=True).agg(
        n_seamcalls=pl.col("n_attempts").sum().cast(pl.UInt64),
        n_requests=pl.len().cast(pl.UInt64),
        retried_seamcalls=(pl.col("n_busy") > 0).sum().cast(pl.UInt64),
        n_busy=pl.col("n_busy").sum().cast(pl.UInt64),
        max_attempts=pl.col("n_attempts").max(),
        n_vcpus=pl.col("tid").filter(entering).n_unique().cast(pl.UInt32),
    )
    episodes = _episodes(steps, chains)
    joined = counted.join(episodes, on=_VM, how="full", nulls_equal=True, coalesce=True)
    filled = joined.with_columns(pl.col(pl.UInt64, pl.UInt32).exclude("td_id").fill_null(0))
    return VM_STATS.conform(
        filled.sort("source", "retried_seamcalls", "td_id", descending=[False, True, False])
    )


def _episodes(steps: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Zero-step episodes per TD, told by what else their vCPU's thread did."""
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
    return (
        steps.join(threads, on=("source", "tid"), how="left")
        .with_columns(pl.coalesce("td_id", "of_td"), pl.coalesce("tgid", "of_process"))
        .join(tds, on=("source", "tgid"), how="left")
        .with_columns(pl.coalesce("td_id", "only_td"))
        .group_by(_VM)
        .agg(zero_steps=pl.len().cast(pl.UInt64))
    )


def _one_process_per_td() -> pl.Expr:
    """A TD belongs to one process: threads whose process was not printed join it."""
    of_td = pl.col("tgid").drop_nulls().first().over("source", "td_id")
    return pl.when(pl.col("td_id").is_null()).then("tgid").otherwise(of_td).alias("tgid")
