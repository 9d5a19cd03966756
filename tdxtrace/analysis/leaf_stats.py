"""How many attempts and how much time the requests of each leaf took."""

from __future__ import annotations

import polars as pl

from tdxtrace.tables.findings import LEAF_STATS, OUTCOMES, RETRY_CHAINS


def leaf_stats(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Sum up the retry chains of each leaf.

    Quantiles are over the requests whose end was seen: a cut chain took at least
    what was seen of it, and counts for the maximum only.  They are numbers that
    occurred (the smallest that at least that share did not exceed).

    Args:
        retry_chains: The ``retry_chains`` table.

    Returns:
        The ``leaf_stats`` table, the leaf with most retried requests first.

    Raises:
        TableError: If ``retry_chains`` lacks a column or has one of another type.
    """
    whole = pl.col("outcome") != "cut"
    attempts = pl.col("n_attempts").filter(whole)
    took = pl.col("took_ns").filter(whole)
    counted = (
        RETRY_CHAINS.conform(retry_chains)
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
