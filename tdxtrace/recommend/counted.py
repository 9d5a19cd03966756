"""The ``counted_attempts`` table: requests that exceed a limit of attempts, from a histogram."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from tdxtrace.intervals import CONFIDENCE, exact_interval
from tdxtrace.tables.attempt_cells import EXACT_LIMITS
from tdxtrace.tables.histograms import COMPLETE, COUNTED_ATTEMPTS, REQUEST_COUNTS


def counted_attempts(
    request_counts: pl.DataFrame, limits: Sequence[int] | None = None
) -> pl.DataFrame:
    """Count, for each leaf and limit, the requests that needed more attempts.

    A request that completed after n attempts needed more than any limit below n; a request that
    was abandoned busy after n attempts needed more than n.  Requests that were abandoned, or still
    open, below the limit are unknown for that limit.

    Args:
        request_counts: The ``request_counts`` table.
        limits: Limits, each one of EXACT_LIMITS; None: all, up to the first that no request
            exceeds.

    Returns:
        The ``counted_attempts`` table, by leaf and limit.

    Raises:
        ValueError: If one of ``limits`` lies inside a bucket of the histogram.
        TableError: If the argument lacks a column or has one of another type.

    Sources:
        As :func:`tdxtrace.intervals.exact_interval`.
    """
    table = exceeding(REQUEST_COUNTS.conform(request_counts), ["leaf"], limits)
    if limits is None:
        table = until_none_exceeds(table)
    share = (table["n_exceeding"] / table["n_requests"]).fill_nan(0).to_numpy().astype(np.float64)
    trials = table["n_requests"].to_numpy().astype(np.float64)
    high = exact_interval(share, trials, 2 * CONFIDENCE - 1)[1]
    high = np.where(trials > 0, high, 1.0)
    return COUNTED_ATTEMPTS.conform(
        table.with_columns(exceeding=pl.Series(share), exceeding_high=pl.Series(high))
    )


def exceeding(
    counts: pl.DataFrame, keys: Sequence[str], limits: Sequence[int] | None = None
) -> pl.DataFrame:
    """Count the requests that need more attempts than each limit.

    Args:
        counts: The columns outcome, n_attempts and n_requests of ``request_counts``, and keys.
        keys: Columns to group by.
        limits: As for :func:`counted_attempts`; None: all of EXACT_LIMITS.

    Returns:
        One row per key and limit, in their order: max_attempts, n_requests, n_exceeding and
        n_unknown of ``counted_attempts``.

    Raises:
        ValueError: As :func:`counted_attempts`.
    """
    for limit in limits or ():
        if limit not in EXACT_LIMITS:
            raise ValueError(f"the limit {limit} lies inside a bucket of the histogram")
    done = pl.col("outcome").is_in(COMPLETE)
    needed = pl.col("n_attempts").cast(pl.Int64) + pl.when(done).then(0).otherwise(1)
    cells = counts.group_by(*keys, done=done, needed=needed).agg(pl.col("n_requests").sum())
    tried = pl.DataFrame(
        {"max_attempts": limits or EXACT_LIMITS}, schema={"max_attempts": pl.UInt32}
    )
    is_more, n = pl.col("needed") > pl.col("max_attempts"), pl.col("n_requests")
    table = (
        cells.join(tried, how="cross")
        .group_by(*keys, "max_attempts")
        .agg(
            n_exceeding=n.filter(is_more).sum(),
            n_unknown=n.filter(~is_more & ~pl.col("done")).sum(),
            n_requests=n.filter(is_more | pl.col("done")).sum(),
        )
    )
    return table.sort(*keys, "max_attempts")


def until_none_exceeds(table: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of each leaf up to the first limit that no request exceeds.

    Args:
        table: Leaf and n_exceeding, by leaf and limit.
    """
    is_first = (pl.col("n_exceeding").shift(1).over("leaf") != 0).fill_null(True)
    return table.filter((pl.col("n_exceeding") > 0) | is_first)
