"""Time from one attempt of a request to the next."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tdx.leaves import parse_leaf

# From the first attempt to the end of the last are as many calls as pauses and one more; of an
# entry, to the start of the last, as many of each.
_PACE: Final = pl.col("took_ns") / (
    pl.col("n_attempts") - (pl.col("leaf") == parse_leaf("TDH.VP.ENTER")[0]).cast(pl.UInt32)
)


def pace_ns() -> pl.Expr:
    """Return the pace of each retry chain in ns; null: it has one attempt, or its time is unknown.

    To be used on ``retry_chains``, or on groups of its rows.
    """
    return pl.when(pl.col("n_attempts") > 1).then(_PACE)
