"""TD conflicts: whether one TD made another one's SEAMCALLs busy."""

from __future__ import annotations

import polars as pl

from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.verdicts import TD_CONFLICTS


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
