"""How long requests took: those that were retried beside those that were not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.report.charts import axes
from tdxtrace.report.charts.theme import light, themed
from tdxtrace.report.units import count, duration, share
from tdxtrace.tdx.leaves import numbers_of

if TYPE_CHECKING:
    import altair as alt

# Bins a power of ten: a bin is a quarter wider than the one before it.
_PER_DECADE: Final = 10
_VP_ENTER: Final = numbers_of(["TDH.VP.ENTER"])[0]
AT_ONCE: Final = "answered at once"
RETRIED: Final = "retried"


def request_times(retry_chains: pl.DataFrame, resolution_ns: int) -> alt.Chart | alt.LayerChart:
    """Draw what share of the requests took how long, retried or not."""
    import altair as alt  # noqa: PLC0415

    rows = time_bins(retry_chains, resolution_ns)
    low, high = float(rows["from_ns"].min()), float(rows["to_ns"].max())  # type: ignore[arg-type]
    x = alt.X(
        "from_ns:Q",
        title="first to last attempt (logarithmic)",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(**axes.durations(low, high)),
    )
    kinds = [kind for kind in (AT_ONCE, RETRIED) if kind in rows["kind"]]
    hues = {AT_ONCE: light("blue"), RETRIED: light("vermilion")}
    chart = (
        alt.Chart(rows)
        .mark_rect(opacity=0.6)
        .encode(
            x,
            alt.X2("to_ns:Q"),
            alt.Y("ratio:Q", title="share of its kind", axis=alt.Axis(format="~%", tickCount=5)),
            y2=alt.Y2Datum(0),
            color=alt.Color(
                "kind:N", scale=alt.Scale(domain=kinds, range=[hues[kind] for kind in kinds])
            ),
            tooltip=["kind", "time", "requests", "share"],
        )
    )
    return themed(chart, height=200)


def time_bins(retry_chains: pl.DataFrame, resolution_ns: int) -> pl.DataFrame:
    """Return how many requests took how long, by kind: a row per bin that is not empty.

    Args:
        retry_chains: The requests; those whose time is not known are left out, and entries of
            vCPUs that were not refused: of those only the time until they began is known, 0.
        resolution_ns: Of the clock; what took less is shown as so much.

    Returns:
        kind, from_ns, to_ns, ratio (of its kind), and time, requests, share as text.
    """
    step = pl.col("took_ns").clip(resolution_ns).log(10) * _PER_DECADE
    counts = (
        timed(retry_chains)
        .with_columns(
            kind=pl.when(pl.col("n_busy") > 0).then(pl.lit(RETRIED)).otherwise(pl.lit(AT_ONCE)),
            bin=(step + 1e-9).floor().cast(pl.Int32),
        )
        .group_by("kind", "bin")
        .agg(n=pl.len())
        .sort("kind", "bin")
    )
    totals = dict(counts.group_by("kind").agg(pl.col("n").sum()).rows())
    rows = [
        {
            "kind": kind,
            "from_ns": _edge(bin_),
            "to_ns": _edge(bin_ + 1),
            "ratio": round(n / totals[kind], 9),
            "time": f"{duration(round(_edge(bin_)))} to {duration(round(_edge(bin_ + 1)))}",
            "requests": count(n),
            "share": share(n, totals[kind]),
        }
        for kind, bin_, n in counts.iter_rows()
    ]
    return pl.DataFrame(rows, schema=_SCHEMA)


def timed(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Return the requests whose time is known and tells something."""
    is_entry = pl.col("leaf") == _VP_ENTER
    return retry_chains.filter(
        pl.col("took_ns").is_not_null() & ~(is_entry & (pl.col("n_busy") == 0))
    )


_SCHEMA: Final = {
    "kind": pl.String,
    "from_ns": pl.Float64,
    "to_ns": pl.Float64,
    "ratio": pl.Float64,
    "time": pl.String,
    "requests": pl.String,
    "share": pl.String,
}


def _edge(bin_: int) -> float:
    return float(f"{math.pow(10, bin_ / _PER_DECADE):.6g}")
