"""Which request was each SEAMCALL an attempt at?"""

from __future__ import annotations

from typing import Final

import polars as pl

# What all attempts of one chain have in common: analysis/retry_chains.py.  A page that was
# not observed is a value of its own here, for a join passes over nulls.
_SHARED: Final = ("source", "tid", "leaf", "gpa", "td_id", "vp_id")
_UNSEEN: Final = {"tid": -1, "gpa": 2**64 - 1, "td_id": 2**64 - 1, "vp_id": 2**64 - 1}


def with_chains(seamcalls: pl.DataFrame, retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Add ``flow`` and ``outcome`` of the chain to the attempts of chains of two or more.

    Args:
        seamcalls: The event table.
        retry_chains: Found in it.

    Returns:
        ``seamcalls`` with ``flow`` (UInt64, null where the call needed no other; from 1, by
        chain) and ``outcome``, in the same order.  The call that settled a request for
        another thread has the flow of that request, unless it was retried itself.
    """
    joined = retry_chains.filter(
        (pl.col("n_attempts") > 1) | pl.col("settled_seq").is_not_null()
    ).with_row_index("flow", offset=1)
    own = _members(seamcalls, joined)
    settling = (
        joined.filter(pl.col("settled_seq").is_not_null())
        .select("source", pl.col("settled_seq").alias("seq"), pl.col("flow").alias("settles"))
        .unique(["source", "seq"], keep="first", maintain_order=True)
    )
    return (
        own.join(settling, on=["source", "seq"], how="left", maintain_order="left")
        .with_columns(pl.coalesce("flow", "settles").cast(pl.UInt64).alias("flow"))
        .drop("settles")
    )


def _members(seamcalls: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Give each call the chain of its request that began last before it, if it is still on."""
    keys = [pl.col(name).fill_null(value).alias(f"_{name}") for name, value in _UNSEEN.items()]
    # The chain may know its TD from another call; what joined its attempts is the page, or the
    # vCPU, or the thread alone.
    by = ["source", "leaf", "_tid", "_gpa", "_vp_id"]
    begins = chains.with_columns(keys).select(
        *by, "flow", "outcome", "last_seq", pl.col("first_seq").alias("seq")
    )
    found = (
        seamcalls.with_row_index("_place")
        .with_columns(keys)
        .sort("seq")
        .join_asof(begins.sort("seq"), on="seq", by=by, strategy="backward", check_sortedness=False)
        .sort("_place")
    )
    ended = pl.col("seq") > pl.col("last_seq")
    return found.with_columns(
        pl.when(~ended).then("flow").alias("flow"), pl.when(~ended).then("outcome").alias("outcome")
    ).select(*seamcalls.columns, "flow", "outcome")
