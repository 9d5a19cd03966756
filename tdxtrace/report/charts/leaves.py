"""Charts by leaf: quantiles of attempts, and shares retried in two traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.report.charts.theme import count_ticks, light, themed
from tdxtrace.report.names import leaf_labels
from tdxtrace.report.units import count

if TYPE_CHECKING:
    import altair as alt


_MARKS: Final = {
    "median": ("p50_attempts", "circle"),
    "99th percentile": ("p99_attempts", "diamond"),
    "maximum": ("max_attempts", "triangle-right"),
}
_ROW_HEIGHT: Final = 26


def attempts_by_leaf(leaf_stats: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw the median, 99th percentile and maximum of attempts per request, by leaf."""
    import altair as alt  # noqa: PLC0415 - slow to import, seldom needed

    rows = attempt_quantiles(leaf_stats)
    high: int = max(10, *rows["attempts"])
    names = rows["leaf"].unique(maintain_order=True).to_list()
    x = alt.X(
        "attempts:Q",
        title="attempts (logarithmic)",
        scale=alt.Scale(type="log", domainMin=0.9, nice=False),
        axis=alt.Axis(values=count_ticks(high), format="~s", labelOverlap="greedy"),
    )
    y = alt.Y("leaf:N", title=None, sort=names)
    shapes = alt.Scale(domain=list(_MARKS), range=[shape for _, shape in _MARKS.values()])
    line = alt.Chart(rows).mark_line(color=light("line"), strokeWidth=3).encode(x, y, detail="leaf")
    points = (
        alt.Chart(rows)
        .mark_point(color=light("ink"), size=90, strokeWidth=2, opacity=1)
        .encode(
            x,
            y,
            shape=alt.Shape("within:N", scale=shapes),
            tooltip=["leaf", "within", "attempts", "requests"],
        )
    )
    return themed(line + points, height=_ROW_HEIGHT * len(names))


def attempt_quantiles(leaf_stats: pl.DataFrame) -> pl.DataFrame:
    """Return leaf, within, attempts and requests: one row per leaf and known quantile."""
    return (
        leaf_stats.unpivot(
            [column for column, _ in _MARKS.values()],
            index=["leaf", "n_requests"],
            variable_name="within",
            value_name="attempts",
        )
        .drop_nulls()
        .select(
            leaf_labels(pl.col("leaf")).alias("leaf"),
            pl.col("within").replace_strict({c: name for name, (c, _) in _MARKS.items()}),
            "attempts",
            pl.col("n_requests").alias("requests"),
        )
    )


BEFORE, AFTER = "before", "after"


def retried_before_and_after(comparisons: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw the share of requests retried in each of two traces, by leaf."""
    import altair as alt  # noqa: PLC0415

    rows = compared_rows(comparisons)
    names = rows["leaf"].unique(maintain_order=True).to_list()
    y = alt.Y("leaf:N", title=None, sort=names)
    x = alt.X("ratio:Q", title="needed a second attempt", axis=alt.Axis(format="~%"))
    kinds = alt.Scale(domain=[BEFORE, AFTER], range=[light("muted"), light("busy")])
    shapes = alt.Scale(domain=[BEFORE, AFTER], range=["circle", "diamond"])
    base = alt.Chart(rows)
    lines = base.mark_line(color=light("line"), strokeWidth=2).encode(x, y, detail="leaf:N")
    points = base.mark_point(filled=True, size=90, opacity=1).encode(
        x,
        y,
        color=alt.Color("when:N", scale=kinds),
        shape=alt.Shape("when:N", scale=shapes),
        tooltip=["leaf", "when", "share", "requests", "difference"],
    )
    return themed(lines + points, height=26 * len(names))


def compared_rows(comparisons: pl.DataFrame) -> pl.DataFrame:
    """Return leaf, when, ratio and tooltip texts: two rows per leaf that both traces have."""
    first = comparisons.filter(
        pl.col("unit") == "attempts", pl.col("within") == 1, pl.col("difference").is_not_null()
    ).with_columns(name=leaf_labels(pl.col("leaf")))
    return pl.DataFrame(
        [
            {
                "leaf": row["name"],
                "when": when,
                "ratio": round(row[f"more_{when}"], 9),
                "share": f"{100 * row[f'more_{when}']:.3g} %",
                "requests": count(row[f"n_{when}"]),
                "difference": row["change"].replace("_", " "),
            }
            for row in first.iter_rows(named=True)
            for when in (BEFORE, AFTER)
        ]
    )
