"""Which retry chain each SEAMCALL belongs to."""

from __future__ import annotations

import polars as pl


def members(calls: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Give each call the ``first_seq`` of the retry chain that it is an attempt of.

    The attempts of a chain are the calls of its thread and leaf from its first to its last:
    a thread makes one request of a leaf at a time.

    Args:
        calls: Rows of the ``seamcalls`` table.
        chains: The ``retry_chains`` table; calls of chains that are not in it are left out.

    Returns:
        The calls with the column ``chain``, ordered by ``seq``.
    """
    begins = chains.select("source", "tid", "leaf", "first_seq", "last_seq", chain="first_seq")
    # join_asof takes no null in its keys.
    begins, mine = (f.with_columns(thread=pl.col("tid").fill_null(-1)) for f in (begins, calls))
    return (
        mine.sort("seq")
        .join_asof(
            begins.drop("tid").sort("first_seq"),
            left_on="seq",
            right_on="first_seq",
            by=["source", "thread", "leaf"],
            check_sortedness=False,
        )
        .filter(pl.col("seq") <= pl.col("last_seq"))
        .drop("thread", "first_seq", "last_seq", strict=False)
    )
