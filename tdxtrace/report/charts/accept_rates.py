"""Chart of the rate at which TDs got memory, over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.report.charts.theme import light, themed, time_axis
from tdxtrace.report.charts.time_shares import td_label
from tdxtrace.report.units import count

if TYPE_CHECKING:
    import altair as alt

MAX_TDS: Final = 6
"""Maximum TDs, so that their dashes can be told apart."""
MIN_SLICES: Final = 4
"""With fewer slices of time, a table shows the same."""
_SECOND: Final = 1e9


def pages_over_time(accept_rates: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw the pages per second of each TD, a bar for each slice of time."""
    import altair as alt  # noqa: PLC0415

    rows = rate_rows(accept_rates)
    names = rows["td"].unique(maintain_order=True).to_list()
    legend = alt.Legend(symbolType="stroke") if len(names) > 1 else None
    chart = (
        alt.Chart(rows)
        .mark_rule(color=light("done"), strokeWidth=3)
        .encode(
            alt.X("from_s:Q", title="time from the first slice", axis=alt.Axis(**time_axis())),
            alt.X2("to_s"),
            alt.Y("pages_per_s:Q", title="pages of 4K per second", axis=alt.Axis(format="~s")),
            alt.StrokeDash("td:N", sort=names, legend=legend),
            tooltip=["td", "from", "pages", "vCPUs", "limited by"],
        )
    )
    return themed(chart, height=160)


def rate_rows(accept_rates: pl.DataFrame) -> pl.DataFrame:
    """Return the slices of the TDs that got most pages.

    Args:
        accept_rates: Rows of the ``accept_rates`` table for all vCPUs of a TD (tid is null).

    Returns:
        td, from_s, to_s (seconds from the first slice of the input), pages_per_s, and texts for
        the tooltip; a row per TD and slice.
    """
    key = ["source", "td_id", "tgid"]
    tds = accept_rates.group_by(key, maintain_order=True).agg(pl.col("n_pages").sum())
    shown = tds.sort("n_pages", descending=True, maintain_order=True).head(MAX_TDS)
    first = pl.col("start_ns").min().over("source")
    rows = accept_rates.with_columns(
        from_s=(pl.col("start_ns") - first) / _SECOND, to_s=(pl.col("end_ns") - first) / _SECOND
    ).join(shown.select(key), on=key, nulls_equal=True, maintain_order="right")
    has_inputs = shown["source"].n_unique() > 1
    return pl.DataFrame(
        [
            {
                "td": td_label(row["td_id"]) + (f", input {row['source']}" if has_inputs else ""),
                "from_s": row["from_s"],
                "to_s": row["to_s"],
                "pages_per_s": row["pages_per_s"],
                "from": f"{row['from_s']:.6f} s",
                "pages": count(row["n_pages"]),
                "vCPUs": count(row["n_vcpus"]),
                "limited by": row["limited_by"] or "not known",
            }
            for row in rows.iter_rows(named=True)
        ]
    )
