"""Chart of the time of a TD's threads by activity and phase."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.report.charts.theme import light, themed
from tdxtrace.report.units import count, duration, plural, share, word

if TYPE_CHECKING:
    import altair as alt

MAX_BARS: Final = 16
"""Maximum bars, so that they fit one screen."""
PARTS: Final = ("done_ns", "retry_ns", "wait_ns", "guest_ns", "rest_ns")
_NAMES: Final = {
    "retry_ns": ("retrying", "busy"),
    "wait_ns": ("between attempts", "waiting"),
    "done_ns": ("completing", "done"),
    "guest_ns": ("in the guest", "guest"),
    "rest_ns": ("other", "unknown"),
}

_TWO_LINES: Final = "split(datum.label, ': ')"


def time_by_activity(time_shares: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw the share of each activity in the time of a TD's threads, by TD and phase."""
    import altair as alt  # noqa: PLC0415

    rows = share_rows(time_shares)
    names = rows["of"].unique(maintain_order=True).to_list()
    # Centers the two lines of a label on its bar.
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
    """Return shares and tooltip texts by TD, phase and activity."""
    drawn = with_total(time_shares).filter(pl.col("all_ns") > 0).head(MAX_BARS)
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
    """Return a TD's address, or that the TD is unknown."""
    return "unknown TD" if td_id is None else word(td_id)


def with_total(time_shares: pl.DataFrame) -> pl.DataFrame:
    """Return the rows with ``all_ns``, the sum of activities, by time spent retrying."""
    return time_shares.with_columns(all_ns=pl.sum_horizontal(PARTS)).sort(
        pl.col("retry_ns") + pl.col("wait_ns"),
        *("source", "td_id", "start_ns"),
        descending=[True, False, False, False],
    )


def drawn_rows(rows: pl.DataFrame) -> str:
    """Return a text with the number of rows drawn."""
    if rows.height <= MAX_BARS:
        return f"all {plural(rows.height, 'TD and phase', 'TDs and phases')}"
    return f"the {count(MAX_BARS)} with most retrying of {count(rows.height)} TDs and phases"
