"""The ``fleet_counted`` table: limits from the histograms of many hosts."""

from __future__ import annotations

import numpy as np
import polars as pl

from tdxtrace.analysis.dependence import between_hosts
from tdxtrace.intervals import CONFIDENCE, Floats, exact_interval
from tdxtrace.recommend.counted import exceeding, until_none_exceeds
from tdxtrace.tables.histograms import FLEET_COUNTED


def fleet_counted(requests: pl.DataFrame, confidence: float = CONFIDENCE) -> pl.DataFrame:
    """Count, for each leaf and limit, the requests in histograms that needed more attempts.

    A histogram does not show which requests were busy together.  With hosts as clusters this is
    not needed: the interval allows for any dependence of the requests of one host, and applies to
    the requests of the fleet.  Where fewer than ten requests needed more, they count as one burst,
    unless a smaller limit showed how hosts differ.

    Args:
        requests: The ``fact_requests`` tables of all histograms, with the column host.
        confidence: Of the one-sided interval.

    Returns:
        The ``fleet_counted`` table, by leaf and limit, up to the first that no request exceeds.

    Sources:
        As :func:`tdxtrace.analysis.dependence.between_hosts` and
        :func:`tdxtrace.intervals.exact_interval`.
    """
    by_host = exceeding(requests, ["leaf", "host"]).cast({"n_exceeding": pl.Int64})
    more, n = pl.col("n_exceeding"), pl.col("n_requests").cast(pl.Int64)
    key = ["leaf", "max_attempts"]
    table = by_host.group_by(key).agg(
        pl.col("n_requests", "n_exceeding", "n_unknown").sum(),
        n_hosts=(n > 0).sum().cast(pl.UInt64),
        host_clusters=(n > 0).sum().cast(pl.Int64),
        host_squares=(more**2).sum(),
        host_products=(more * n).sum(),
        host_sizes=(n**2).sum(),
    )
    table = until_none_exceeds(table.sort(key))
    share = (table["n_exceeding"] / table["n_requests"]).fill_nan(0).to_numpy().astype(np.float64)
    high = exact_interval(share, _effective_n(table), 2 * confidence - 1)[1]
    is_fleet = pl.col("n_hosts") > 1
    return FLEET_COUNTED.conform(
        table.cast({"n_exceeding": pl.UInt64}).with_columns(
            exceeding=pl.Series(share),
            exceeding_high=pl.when(is_fleet).then(pl.lit(pl.Series(high))),
        )
    )


def _effective_n(table: pl.DataFrame) -> Floats:
    """Return the effective number of independent requests of each leaf and limit."""
    steps = table.with_columns(
        group=pl.col("leaf"), n_more="n_exceeding", n_all=pl.col("n_requests").cast(pl.Int64)
    )
    burst = np.maximum(table["n_exceeding"].to_numpy().astype(np.float64), 1.0)
    effect = between_hosts(steps, burst)[0]
    n: Floats = table["n_requests"].to_numpy().astype(np.float64) / effect
    return n
