"""Chart of replayed policies: share of requests that exceed each policy, by leaf."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import polars as pl

from tdxtrace.report.charts.theme import light, themed
from tdxtrace.report.names import leaf_labels
from tdxtrace.report.units import count, duration, share

if TYPE_CHECKING:
    import altair as alt

MAX_LEAVES: Final = 4
"""Maximum columns, so that they fit a narrow page."""


def policies_compared(policies: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw the share of requests that need more than each policy allows, and its interval.

    The chart is a table of shaded cells, as wide intervals of few requests would hide each
    other in a chart of bars.
    """
    import altair as alt  # noqa: PLC0415

    rows = policy_rows(policies)
    leaves = rows["leaf"].unique(maintain_order=True).to_list()
    names = rows["policy"].unique(maintain_order=True).to_list()
    # One line for each part of a leaf's name, as columns are narrow on a narrow page.
    words = "split(datum.label, '.')"
    room = 4 + 13 * max(name.count(".") for name in leaves)
    bare: dict[str, Any] = {"domain": False, "ticks": False}
    across = alt.Axis(labelAngle=0, orient="top", labelExpr=words, labelPadding=room, **bare)
    base = alt.Chart(rows).encode(
        alt.X("leaf:N", title=None, sort=leaves, axis=across),
        alt.Y("policy:N", title=None, sort=names, axis=alt.Axis(**bare)),
        tooltip=["policy", "leaf", "need more", "interval", "requests", "retrying", "VMs killed"],
    )
    scale = alt.Scale(type="sqrt", domain=[0, 1], range=[0, 0.75])
    cells = base.mark_rect(color=light("vermilion"), stroke=light("line")).encode(
        fillOpacity=alt.FillOpacity("ratio:Q", scale=scale, legend=None)
    )
    shares = base.mark_text(color=light("ink"), fontSize=13, dy=-7).encode(text="share:N")
    ends = base.mark_text(color=light("ink"), fontSize=10, dy=9).encode(text="ends:N")
    return themed(cells + shares + ends, height=38 * len(names))


def policy_rows(policies: pl.DataFrame) -> pl.DataFrame:
    """Return the rows drawn: every policy, for the leaves with the most retried requests."""
    leaves = (
        policies.filter(pl.col("n_retried") > 0)
        .group_by("leaf")
        .agg(pl.col("n_retried").max())
        .sort("n_retried", "leaf", descending=[True, False])
        .head(MAX_LEAVES)
        .select("leaf")
    )
    rows = policies.join(leaves, on="leaf", how="semi", maintain_order="left").filter(
        pl.col("exceeding_ratio").is_not_null()
    )
    return pl.DataFrame(
        [
            {
                "policy": row["policy"],
                "leaf": row["label"],
                "ratio": round(row["exceeding_ratio"], 9),
                "share": share(row["n_exceeding"], row["n_requests"]),
                "ends": f"{_percent(row['exceeding_low'])} to {_percent(row['exceeding_high'])} %",
                "need more": f"{count(row['n_exceeding'])} "
                f"({share(row['n_exceeding'], row['n_requests'])})",
                "interval": f"{100 * row['exceeding_low']:.3g} to "
                f"{100 * row['exceeding_high']:.3g} %",
                "requests": count(row["n_requests"]),
                "retrying": duration(row["waited_ns"]),
                "VMs killed": count(row["n_vms_killed"]),
            }
            for row in rows.with_columns(label=leaf_labels(pl.col("leaf"))).iter_rows(named=True)
        ]
    )


def _percent(ratio: float) -> str:
    """Return a share in percent with two significant digits, without the sign."""
    percent = 100 * ratio
    if percent < 0.005:
        return "0"
    return f"{percent:.2g}" if percent < 99.5 else "100"
