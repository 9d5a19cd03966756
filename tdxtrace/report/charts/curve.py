"""Chart of the attempts curve: share of requests that needed more than n attempts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from tdxtrace.report.charts.theme import HUES, count_ticks, light, themed
from tdxtrace.report.names import leaf_labels
from tdxtrace.report.units import count

if TYPE_CHECKING:
    import altair as alt

MAX_CURVES: Final = 4
"""Maximum curves, so that they can be distinguished where they cross."""
# Limits that were proposed: mainline calls twice, with a kick between (Linux 6.16,
# arch/x86/kvm/vmx/tdx.c, tdh_do_no_vcpus()); 5 in mails of the series; 16 in "KVM: TDX: Retry
# seamcall when TDX_OPERAND_BUSY with operand SEPT", 2024-09-04, and in the seed's loop.
PROPOSED_LIMITS: Final = {2: "2: mainline", 5: "5", 16: "16: seed, v1"}


def attempts_curve(attempts: pl.DataFrame, limits: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw 1 - the ``attempts`` curve of the most retried leaves, on logarithmic axes."""
    import altair as alt  # noqa: PLC0415

    rows = curve_rows(attempts)
    floor = float(rows["ratio"].min())  # type: ignore[arg-type]
    high: int = max(20, *rows["within"])
    x = alt.X(
        "within:Q",
        title="n attempts (logarithmic)",
        scale=alt.Scale(type="log", domain=[1, high], nice=False),
        axis=alt.Axis(values=count_ticks(high), format="~s", labelOverlap="greedy"),
    )
    y = alt.Scale(type="log", domain=[floor, 1], nice=False)
    percent: Any = {"format": "~%", "labelOverlap": "greedy", "tickCount": 5}
    names = rows["leaf"].unique(maintain_order=True).to_list()
    colours = alt.Scale(domain=names, range=[light(hue) for hue in HUES[: len(names)]])
    colour = alt.Color("leaf:N", scale=colours)
    base = alt.Chart(rows)
    # Several bands would hide each other: those of the other curves are in the tooltips.
    band = (
        base.transform_filter(alt.datum.leaf == names[0])
        .mark_area(interpolate="step-after", opacity=0.2)
        .encode(x, alt.Y("low:Q", scale=y), alt.Y2("high:Q"), color=colour)
    )
    lines = base.mark_line(interpolate="step-after", strokeWidth=2).encode(
        x, alt.Y("ratio:Q", title="needed more than n", scale=y, axis=alt.Axis(**percent)), colour
    )
    points = base.mark_point(filled=True, size=28, opacity=1).encode(
        x,
        alt.Y("ratio:Q", scale=y),
        colour,
        tooltip=["leaf", "attempts", "needed more", "interval", "requests"],
    )
    marks = _limit_lines(_limits(limits, names), x, y)
    return themed(alt.LayerChart(layer=[*marks, band, lines, points]), height=280)


def _limit_lines(limits: pl.DataFrame, x: Any, y: Any) -> list[Any]:  # noqa: ANN401 - Altair's
    """Return dashed lines at the limits, each with its name at the top."""
    import altair as alt  # noqa: PLC0415

    base = alt.Chart(limits)
    rules = base.mark_rule(strokeDash=[4, 3], color=light("muted"), clip=True).encode(x)
    texts = base.mark_text(
        align="left", baseline="top", dx=4, dy=2, color=light("muted"), fontSize=11, clip=True
    ).encode(x, y=alt.YDatum(1, scale=y), text="name:N")
    return [rules, texts]


def _limits(limits: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Return the proposed limits, and those recommended for the leaves that are drawn."""
    own = (
        limits.filter(
            pl.col("unit") == "attempts", pl.col("made_by") == "anyone", pl.col("limit") > 0
        )
        .select(leaf=leaf_labels(pl.col("leaf")), within="limit")
        .filter(pl.col("leaf").is_in(names))
    )
    rows = [{"within": n, "name": name} for n, name in PROPOSED_LIMITS.items()]
    rows += [{"within": n, "name": f"{n}: for {leaf}"} for leaf, n in own.rows()]
    return pl.DataFrame(rows)


def curve_rows(attempts: pl.DataFrame) -> pl.DataFrame:
    """Return the steps of the curves that are drawn, by leaf, as shares that needed more.

    The leaves with the most requests that needed a second attempt are drawn.  A share of 0,
    which a logarithmic axis cannot show, is drawn as half a request.
    """
    curves = attempts.filter(pl.col("by") == "leaf", pl.col("unit") == "attempts")
    retried = (
        curves.filter(pl.col("within") == 1)
        .with_columns(n=(1 - pl.col("done_ratio")) * pl.col("n_requests"))
        .filter(pl.col("n") > 0)
        .sort("n", "leaf", descending=[True, False])
        .head(MAX_CURVES)
    )
    drawn = retried.select("leaf").join(curves, on="leaf", how="left", maintain_order="left_right")
    if drawn.is_empty():
        return drawn
    floor = 0.5 / float(drawn["n_requests"].max())  # type: ignore[arg-type]
    return drawn.with_columns(
        ratio=(1 - pl.col("done_ratio")).clip(floor).round_sig_figs(6),
        low=(1 - pl.col("done_high")).clip(floor).round_sig_figs(6),
        high=(1 - pl.col("done_low")).clip(floor).round_sig_figs(6),
    ).select(
        leaf_labels(pl.col("leaf")),
        "within",
        "ratio",
        "low",
        "high",
        attempts=pl.format("{} or fewer", "within"),
        **{
            "needed more": pl.format("{} %", (100 * (1 - pl.col("done_ratio"))).round_sig_figs(3)),
            "interval": pl.format(
                "{} to {} %",
                (100 * (1 - pl.col("done_high"))).round_sig_figs(3),
                (100 * (1 - pl.col("done_low"))).round_sig_figs(3),
            ),
            "requests": pl.col("n_requests").map_elements(count, return_dtype=pl.String),
        },
    )
