"""Where the time of a TD's threads went, phase by phase."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.report.charts.theme import light, themed
from tdxtrace.report.units import count, duration, plural, share, word

if TYPE_CHECKING:
    import altair as alt

MAX_BARS: Final = 16
"""TDs and phases below each other on one screen."""
PARTS: Final = ("done_ns", "retry_ns", "wait_ns", "guest_ns", "rest_ns")
_NAMES: Final = {
    "retry_ns": ("retrying", "vermilion"),
    "wait_ns": ("between attempts", "yellow"),
    "done_ns": ("settling", "blue"),
    "guest_ns": ("in the guest", "green"),
    "rest_ns": ("else", "grey"),
}

_TWO_LINES: Final = "split(datum.label, ': ')"


def where_time_went(time_shares: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw, for each TD and phase, the share of its threads' time that each part took."""
    import altair as alt  # noqa: PLC0415

    rows = share_rows(time_shares)
    names = rows["of"].unique(maintain_order=True).to_list()
    # Two lines stand around the middle of their bar.
    names_axis = alt.Axis(labelExpr=_TWO_LINES, labelOffset=-7)
    parts = [name for name, _ in _NAMES.values()]
    hues = [light(hue) for _, hue in _NAMES.values()]
    chart = (
        alt.Chart(rows)
        .mark_bar(stroke=light("paper"), strokeWidth=1)
        .encode(
            alt.X("share:Q", title="share of the threads' time", axis=alt.Axis(format="~%")).scale(
                domain=[0, 1]
            ),
            alt.Y("of:N", title=None, sort=names, axis=names_axis),
            color=alt.Color("part:N", scale=alt.Scale(domain=parts, range=hues)),
            order="order:Q",
            tooltip=["of", "part", "time", "of all"],
        )
    )
    return themed(chart, height=32 * len(names))


def share_rows(time_shares: pl.DataFrame) -> pl.DataFrame:
    """Return share, and texts for the reader, by TD and phase and part."""
    drawn = spent(time_shares).filter(pl.col("all_ns") > 0).head(MAX_BARS)
    return pl.DataFrame(
        [
            {
                "of": f"{row['phase']}: {td_label(row['td_id'])}",
                "part": name,
                "order": place,
                "share": round(row[column] / row["all_ns"], 9),
                "time": duration(row[column]),
                "of all": share(row[column], row["all_ns"]),
            }
            for row in drawn.iter_rows(named=True)
            for place, (column, (name, _)) in enumerate(_NAMES.items())
        ]
    )


def td_label(td_id: int | None) -> str:
    """Return a TD's address, or that nothing tells the TD."""
    return "TD not told" if td_id is None else word(td_id)


def spent(time_shares: pl.DataFrame) -> pl.DataFrame:
    """Return the rows with ``all_ns``, what most time was lost in first."""
    return time_shares.with_columns(all_ns=pl.sum_horizontal(PARTS)).sort(
        pl.col("retry_ns") + pl.col("wait_ns"),
        *("source", "td_id", "start_ns"),
        descending=[True, False, False, False],
    )


def drawn(rows: pl.DataFrame) -> str:
    """Say how many of the rows are drawn."""
    if rows.height <= MAX_BARS:
        return f"all {plural(rows.height, 'TD and phase', 'TDs and phases')}"
    return f"the {count(MAX_BARS)} with most retrying of {count(rows.height)} TDs and phases"
