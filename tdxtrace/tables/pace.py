"""Time from one attempt of a request to the next."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tdx.leaves import parse_leaf

# took_ns spans n calls and n - 1 pauses; for TDH.VP.ENTER it ends at the start of the last
# attempt, so it spans n - 1 of each.
_PACE: Final = pl.col("took_ns") / (
    pl.col("n_attempts") - (pl.col("leaf") == parse_leaf("TDH.VP.ENTER")[0]).cast(pl.UInt32)
)


def pace_ns() -> pl.Expr:
    """Return the mean time from one attempt to the next, in ns, as an expression.

    For ``retry_chains``, or for groups of its rows; null if a chain has one attempt, or if
    ``took_ns`` is null.
    """
    return pl.when(pl.col("n_attempts") > 1).then(_PACE)
