"""How many attempts requests took, leaf by leaf: the middle, the tail and the worst."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.report.charts import axes
from tdxtrace.report.charts.theme import light, themed
from tdxtrace.report.names import leaf_labels

if TYPE_CHECKING:
    import altair as alt

_MARKS: Final = {
    "half of the requests": ("p50_attempts", "circle", "blue"),
    "99 % of them": ("p99_attempts", "diamond", "yellow"),
    "the worst": ("max_attempts", "triangle-right", "vermilion"),
}
_ROW_HEIGHT: Final = 26


def attempts_by_leaf(leaf_stats: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw, for each leaf, within how many attempts half, 99 % and all requests were done."""
    import altair as alt  # noqa: PLC0415 - slow to import, seldom needed

    rows = spread(leaf_stats)
    high: int = max(10, *rows["attempts"])
    names = rows["leaf"].unique(maintain_order=True).to_list()
    x = alt.X(
        "attempts:Q",
        title="attempts (logarithmic)",
        scale=alt.Scale(type="log", domainMin=0.9, nice=False),
        axis=alt.Axis(values=axes.counts(high), format="~s", labelOverlap="greedy"),
    )
    y = alt.Y("leaf:N", title=None, sort=names)
    line = alt.Chart(rows).mark_line(color=light("grey"), strokeWidth=2).encode(x, y, detail="leaf")
    points = (
        alt.Chart(rows)
        .mark_point(filled=True, size=90, opacity=1)
        .encode(
            x,
            y,
            color=alt.Color("within:N", scale=_scale([hue for *_, hue in _MARKS.values()], True)),
            shape=alt.Shape("within:N", scale=_scale([shape for _, shape, _ in _MARKS.values()])),
            tooltip=["leaf", "within", "attempts", "requests"],
        )
    )
    return themed(line + points, height=_ROW_HEIGHT * len(names))


def spread(leaf_stats: pl.DataFrame) -> pl.DataFrame:
    """Return leaf, within, attempts and requests: three rows per leaf, or fewer if not known."""
    return (
        leaf_stats.unpivot(
            [column for column, *_ in _MARKS.values()],
            index=["leaf", "n_requests"],
            variable_name="within",
            value_name="attempts",
        )
        .drop_nulls()
        .select(
            leaf_labels(pl.col("leaf")).alias("leaf"),
            pl.col("within").replace_strict({c: name for name, (c, *_) in _MARKS.items()}),
            "attempts",
            pl.col("n_requests").alias("requests"),
        )
    )


def _scale(values: list[str], colours: bool = False) -> alt.Scale:
    import altair as alt  # noqa: PLC0415

    shown = [light(value) for value in values] if colours else values
    return alt.Scale(domain=list(_MARKS), range=shown)
