"""Shares of requests that needed a second attempt, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from tdxtrace.report.charts.theme import light, themed
from tdxtrace.report.names import leaf_labels
from tdxtrace.report.units import count

if TYPE_CHECKING:
    import altair as alt

BEFORE, AFTER = "before", "after"


def retried_before_and_after(comparisons: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw, for each leaf, the share of requests that were retried in either trace."""
    import altair as alt  # noqa: PLC0415

    rows = compared_rows(comparisons)
    names = rows["leaf"].unique(maintain_order=True).to_list()
    y = alt.Y("leaf:N", title=None, sort=names)
    x = alt.X("ratio:Q", title="needed a second attempt", axis=alt.Axis(format="~%"))
    kinds = alt.Scale(domain=[BEFORE, AFTER], range=[light("blue"), light("vermilion")])
    shapes = alt.Scale(domain=[BEFORE, AFTER], range=["circle", "diamond"])
    base = alt.Chart(rows)
    lines = base.mark_line(color=light("grey"), strokeWidth=2).encode(x, y, detail="leaf:N")
    points = base.mark_point(filled=True, size=90, opacity=1).encode(
        x,
        y,
        color=alt.Color("when:N", scale=kinds),
        shape=alt.Shape("when:N", scale=shapes),
        tooltip=["leaf", "when", "share", "requests", "difference"],
    )
    return themed(lines + points, height=26 * len(names))


def compared_rows(comparisons: pl.DataFrame) -> pl.DataFrame:
    """Return leaf, when and ratio, and texts: two rows per leaf that both traces have."""
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
