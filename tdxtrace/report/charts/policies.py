"""Which share of requests each retry policy would have failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.report.charts.theme import HUES, light, themed
from tdxtrace.report.names import leaf_labels
from tdxtrace.report.units import count, duration, share

if TYPE_CHECKING:
    import altair as alt

MAX_LEAVES: Final = 4
"""Leaves beside each other in the row of a policy."""


def policies_compared(policies: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw the share of requests that need more than a policy grants, with its interval."""
    import altair as alt  # noqa: PLC0415

    rows = policy_rows(policies)
    leaves = rows["leaf"].unique(maintain_order=True).to_list()
    names = rows["policy"].unique(maintain_order=True).to_list()
    colour = alt.Color(
        "leaf:N", scale=alt.Scale(domain=leaves, range=[light(hue) for hue in HUES[: len(leaves)]])
    )
    y = alt.Y("policy:N", title=None, sort=names)
    offset = alt.YOffset("leaf:N", sort=leaves)
    tooltip = ["policy", "leaf", "need more", "interval", "requests", "retrying", "VMs killed"]
    base = alt.Chart(rows)
    bars = base.mark_rule(strokeWidth=2, opacity=0.5).encode(
        alt.X("low:Q", title="share of requests that need more", axis=alt.Axis(format="~%")),
        alt.X2("high:Q"),
        y,
        color=colour,
        yOffset=offset,
    )
    points = base.mark_point(filled=True, size=60, opacity=1).encode(
        alt.X("ratio:Q"), y, color=colour, yOffset=offset, tooltip=tooltip
    )
    return themed(bars + points, height=(12 * len(leaves) + 12) * len(names))


def policy_rows(policies: pl.DataFrame) -> pl.DataFrame:
    """Return what is drawn: every policy, the leaves with most retried requests."""
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
                "low": round(row["exceeding_low"], 9),
                "high": round(row["exceeding_high"], 9),
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
