"""Cause shares: how many busy attempts does each cause explain?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.causes import BUSY_CAUSES, CAUSE_SHARES

_WHOLE: Final = 1_000_000


def cause_shares(busy_causes: pl.DataFrame) -> pl.DataFrame:
    """Count the answers by leaf, resource and cause.

    Every busy attempt has one answer, so the counts of a source sum to its busy attempts
    and the shares to one, exactly: what rounding leaves over goes to the largest
    remainders.

    Args:
        busy_causes: The ``busy_causes`` table, or a part of it with its rows of rank 1.

    Returns:
        The ``cause_shares`` table, by source, largest first.

    Raises:
        TableError: If the argument lacks a column or has one of another type.
    """
    answers = BUSY_CAUSES.conform(busy_causes).filter(pl.col("rank") == 1)
    counts = answers.group_by("source", "leaf", "resource", "cause").agg(
        n_busy=pl.len().cast(pl.UInt64),
        n_sure=pl.col("confidence").is_in(["proof", "strong"]).sum().cast(pl.UInt64),
    )
    ordered = counts.sort(
        "source",
        "n_busy",
        "leaf",
        "resource",
        "cause",
        descending=[False, True, False, False, False],
    )
    parts = ordered.with_columns(n_all=pl.col("n_busy").sum().over("source"))
    exact = pl.col("n_busy") * _WHOLE
    parts = parts.with_columns(floor=exact // pl.col("n_all"), remainder=exact % pl.col("n_all"))
    missing = _WHOLE - pl.col("floor").sum().over("source").cast(pl.Int64)
    place = pl.col("remainder").rank("ordinal", descending=True).over("source").cast(pl.Int64)
    share = pl.col("floor") + (place <= missing).cast(pl.UInt64)
    return CAUSE_SHARES.conform(parts.with_columns(share_ppm=share.cast(pl.UInt32)))
