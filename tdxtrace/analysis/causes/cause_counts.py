"""Counts of busy attempts by cause and by TD: the ``cause_shares`` and ``td_conflicts`` tables."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.causes import BUSY_CAUSES, CAUSE_SHARES
from tdxtrace.tables.verdicts import TD_CONFLICTS

_WHOLE: Final = 1_000_000


def cause_shares(busy_causes: pl.DataFrame) -> pl.DataFrame:
    """Count the busy attempts by leaf, resource and cause.

    Every busy attempt has one row of rank 1, so the counts of a source sum to its busy attempts
    and the shares to one exactly (largest remainder method).

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


def td_conflicts(causes: pl.DataFrame) -> pl.DataFrame:
    """Count busy answers by whether their holder was of the same TD or of another one.

    Locks of one TD cannot be held for another; what TDs share is the PAMT of a 2 MB range,
    the KOT, the write-back of caches and the module as a whole (SYS_BUSY).  A guest, and an
    armed entry, that made a call busy are of the call's own TD.

    Args:
        causes: The ``busy_causes`` table; its answers (rank 1) are counted.

    Returns:
        The ``td_conflicts`` table, by source and leaf.

    Raises:
        TableError: If ``causes`` lacks a column or has one of another type.

    Sources:
        Scopes of locks: intel/tdx-module 1.5 (tdx/data/locks.csv); the range of a PAMT lock across
        TDs: R. Edgecombe, Dynamic PAMT v3, 2025-09.
    """
    answers = BUSY_CAUSES.conform(causes).filter(pl.col("rank") == 1)
    own = pl.col("cause").is_in(["guest", "armed_entry"])
    same = own | (pl.col("holder_td_id") == pl.col("td_id")).fill_null(False)
    other = ~own & (pl.col("holder_td_id") != pl.col("td_id")).fill_null(False)
    found = (
        answers.group_by("source", "leaf", "resource")
        .agg(
            n_busy=pl.len().cast(pl.UInt64),
            n_same_td=same.sum().cast(pl.UInt64),
            n_other_td=other.sum().cast(pl.UInt64),
            n_unknown=(~same & ~other).sum().cast(pl.UInt64),
            n_tds=pl.col("td_id").drop_nulls().n_unique().cast(pl.UInt32),
        )
        .sort("source", "leaf", "resource")
    )
    return TD_CONFLICTS.conform(found)
