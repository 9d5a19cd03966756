"""Charts of what exceeds a limit: requests each limit and policy, runs of faults each threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from tdxtrace.report.charts.theme import HUES, count_ticks, light, themed
from tdxtrace.report.names import leaf_labels
from tdxtrace.report.units import count, duration, share
from tdxtrace.tdx.exit_reasons import STEPPING_EPF_THRESHOLD

if TYPE_CHECKING:
    import altair as alt

MAX_LEAVES: Final = 4
"""Maximum columns, so that they fit a narrow page."""
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
    rows = policies.join(leaves, on="leaf", how="semi", maintain_order="left")
    return pl.DataFrame(
        [
            {
                "policy": row["policy"],
                "leaf": row["label"],
                "ratio": round(_known(row), 9),
                "share": "?"
                if row["exceeding_ratio"] is None
                else share(row["n_exceeding"], row["n_requests"]),
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


def _known(row: Mapping[str, Any]) -> float:
    """The share that needs more; where it is withheld, the least that it is."""
    known = row["exceeding_ratio"]
    return float(row["exceeding_low"] if known is None else known)


def _percent(ratio: float) -> str:
    """Return a share in percent with two significant digits, without the sign."""
    percent = 100 * ratio
    if percent < 0.005:
        return "0"
    return f"{percent:.2g}" if percent < 99.5 else "100"


def runs_above(step_thresholds: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw the number of runs that exceed each threshold, the module's threshold darker."""
    import altair as alt  # noqa: PLC0415

    rows = threshold_rows(step_thresholds).select(
        threshold=pl.col("threshold").cast(pl.String),
        n="n_runs",
        own=pl.when(pl.col("threshold") == STEPPING_EPF_THRESHOLD).then(0.95).otherwise(0.45),
        **{
            "runs above": pl.col("n_runs").map_elements(count, return_dtype=pl.String),
            "faults above": pl.col("n_faults").map_elements(count, return_dtype=pl.String),
            "vCPUs": pl.col("n_vcpus").map_elements(count, return_dtype=pl.String),
        },
    )
    names = rows["threshold"].to_list()
    base = alt.Chart(rows).encode(
        alt.X("threshold:N", title="threshold", sort=names, axis=alt.Axis(labelAngle=0)),
        alt.Y("n:Q", title="runs above", axis=alt.Axis(format="~s", tickCount=4)),
        opacity=alt.Opacity("own:Q", scale=None),
        tooltip=["threshold", "runs above", "faults above", "vCPUs"],
    )
    return themed(base.mark_bar(color=light("purple")), height=140)


def threshold_rows(step_thresholds: pl.DataFrame) -> pl.DataFrame:
    """Return threshold, n_runs, n_faults, n_vcpus and max_run over all sources, lowest first."""
    return (
        step_thresholds.group_by("threshold")
        .agg(pl.col("n_runs", "n_faults").sum(), pl.col("n_vcpus").sum(), pl.col("max_run").max())
        .sort("threshold")
    )
