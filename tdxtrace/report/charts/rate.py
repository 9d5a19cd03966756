"""When requests met busy: the share of them that did, over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.report.charts import axes
from tdxtrace.report.charts.theme import light, themed
from tdxtrace.report.units import count, share
from tdxtrace.tables.trace import Findings

if TYPE_CHECKING:
    import altair as alt

MAX_BINS: Final = 120
"""Most stretches of time: six pixels each on the usual page."""
# So many requests in a stretch, on average, that a share of them says something.
_PER_BIN: Final = 20
_SECOND: Final = 1_000_000_000


def retried_over_time(findings: Findings) -> alt.Chart | alt.LayerChart:
    """Draw the share of requests that met busy, by when they began, and how many there were."""
    import altair as alt  # noqa: PLC0415

    rows = rate_bins(findings.retry_chains)
    x = alt.X(
        "from_s:Q",
        title="time from the first request",
        axis=alt.Axis(**axes.time()),
        scale=alt.Scale(nice=False),
    )
    tooltip = ["from", "requests", "retried", "share"]
    chart = (
        alt.Chart(rows)
        .mark_rect(color=light("vermilion"), opacity=0.8)
        .encode(
            x,
            alt.X2("to_s:Q"),
            alt.Y(
                "ratio:Q",
                title="share retried",
                axis=alt.Axis(format="~%", tickCount=5),
                scale=alt.Scale(domainMin=0),
            ),
            y2=alt.Y2Datum(0),
            tooltip=tooltip,
        )
    )
    return themed(chart, height=160)


def rate_bins(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Return how many requests began in each stretch of time, and how many of them met busy.

    Returns:
        from_s, to_s (seconds from the first request), ratio, and from, requests, retried and
        share as text; a row per stretch with a request in it.
    """
    # Clocks of several inputs need not agree: each is counted from its own start.
    since = pl.col("start_ns") - pl.col("start_ns").min().over("source")
    length: int = retry_chains.select(since.max()).item()
    width = length // max(1, min(MAX_BINS, retry_chains.height // _PER_BIN)) + 1
    counts = (
        retry_chains.group_by(bin=since // width)
        .agg(n=pl.len(), retried=(pl.col("n_busy") > 0).sum())
        .sort("bin")
    )
    return pl.DataFrame(
        [
            {
                "from_s": bin_ * width / _SECOND,
                "to_s": (bin_ + 1) * width / _SECOND,
                "ratio": round(retried / n, 9),
                "from": f"{bin_ * width / _SECOND:.6f} s",
                "requests": count(n),
                "retried": count(retried),
                "share": share(retried, n),
            }
            for bin_, n, retried in counts.iter_rows()
        ]
    )
