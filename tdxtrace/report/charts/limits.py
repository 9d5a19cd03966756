"""Charts of requests above each limit and policy, and of fault runs above each threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from tdxtrace.report.charts.theme import count_ticks, light, themed
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
PROPOSED_LIMITS: Final = {2: "mainline", 5: "proposed", 16: "seed, v1"}
_DASHES: Final = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3])
"""Solid, dashed, dotted, dash and dot: one for each curve."""
_NARROW: Final = 260
"""Pixels of the plot on a page of 400, for which names of limits are spread over lines."""
_LABEL_SIZE: Final = 11
_LABEL_HEIGHT: Final = 14
_CHARACTER: Final = 6.5
"""Pixels of a character of _LABEL_SIZE."""


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
    percent = alt.Axis(format="~%", labelOverlap="greedy", values=_parts(floor))
    names = rows["leaf"].unique(maintain_order=True).to_list()
    shown_limits = _limits(limits, names, high)
    n_lines = shown_limits["line"].n_unique()
    dashes = alt.StrokeDash(
        "leaf:N",
        scale=alt.Scale(domain=names, range=_DASHES[: len(names)]),
        legend=alt.Legend(offset=6 + _LABEL_HEIGHT * n_lines, symbolSize=900, symbolStrokeWidth=2),
    )
    base, hue = alt.Chart(rows), light("busy")
    # Several bands would hide each other: the intervals of other curves are in the tooltips.
    band = (
        base.transform_filter(alt.datum.leaf == names[0])
        .mark_area(interpolate="step-after", color=hue, opacity=0.15)
        .encode(x, alt.Y("low:Q", scale=y, axis=percent), alt.Y2("high:Q"))
    )
    lines = base.mark_line(interpolate="step-after", color=hue, strokeWidth=2).encode(
        x, alt.Y("ratio:Q", title="needed more than n", scale=y, axis=percent), strokeDash=dashes
    )
    points = base.mark_point(filled=True, color=hue, size=28, opacity=1).encode(
        x,
        alt.Y("ratio:Q", scale=y, axis=percent),
        tooltip=["leaf", "attempts", "needed more", "interval", "requests"],
    )
    marks = _limit_lines(shown_limits, x)
    return themed(alt.LayerChart(layer=[*marks, band, lines, points]), height=280)


def _parts(floor: float) -> list[float]:
    """Return 1, 0.1, 0.01, ... down to ``floor``: the ticks of a share."""
    n = math.floor(1e-9 - math.log10(floor)) + 1
    return [float(f"1e-{power}") for power in range(n)]


def _limit_lines(limits: pl.DataFrame, x: Any) -> list[Any]:  # noqa: ANN401 - Altair's
    """Return a thin line at each limit, with its name above the plot."""
    import altair as alt  # noqa: PLC0415

    base = alt.Chart(limits)
    rules = base.mark_rule(color=light("muted"), clip=True).encode(x)
    texts = [
        alt.Chart(rows)
        .mark_text(
            align="left",
            baseline="bottom",
            dy=-3 - _LABEL_HEIGHT * line,
            color=light("muted"),
            fontSize=_LABEL_SIZE,
        )
        .encode(x, y=alt.value(0), text="name:N")
        for (line,), rows in limits.group_by("line", maintain_order=True)
    ]
    return [rules, *texts]


def _limits(limits: pl.DataFrame, names: Sequence[str], high: int) -> pl.DataFrame:
    """Return the proposed limits, and the limits recommended for the drawn leaves.

    Returns:
        within, name, and line: the line above the plot, from 0, in which the name fits.
    """
    own = (
        limits.filter(
            pl.col("unit") == "attempts", pl.col("made_by") == "anyone", pl.col("limit") > 0
        )
        .select(leaf=leaf_labels(pl.col("leaf")), within="limit")
        .filter(pl.col("leaf").is_in(names), pl.col("within") <= high)
    )
    by_limit: dict[int, list[str]] = {n: [who] for n, who in PROPOSED_LIMITS.items() if n <= high}
    for leaf, n in own.rows():
        by_limit.setdefault(n, []).append(f"for {leaf}")
    named = {n: f"{n}: {', '.join(who)}" for n, who in sorted(by_limit.items())}
    lines = label_lines(
        [
            (_NARROW * math.log(n) / math.log(high), _CHARACTER * len(name))
            for n, name in named.items()
        ]
    )
    return pl.DataFrame(
        {"within": list(named), "name": list(named.values()), "line": lines},
        schema={"within": pl.Int64, "name": pl.String, "line": pl.Int64},
    )


def label_lines(labels: Sequence[tuple[float, float]]) -> list[int]:
    """Return for each label the lowest line in which it overlaps no earlier one.

    Args:
        labels: Left edge and width of each, in pixels, by left edge.

    Example:
        >>> label_lines([(0, 50), (30, 50), (60, 10)])
        [0, 1, 0]
    """
    ends: list[float] = []
    lines = []
    for left, width in labels:
        free = [line for line, end in enumerate(ends) if end <= left]
        line = free[0] if free else len(ends)
        ends[line : line + 1] = [left + width]
        lines.append(line)
    return lines


def curve_rows(attempts: pl.DataFrame) -> pl.DataFrame:
    """Return the steps of the curves to draw, by leaf, as shares of requests that needed more.

    The leaves with the most retried requests are drawn.  A share of 0, which a logarithmic axis
    cannot show, is drawn as half a request.
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
            "needed more": pl.format("{} %", _left("done_ratio")),
            "interval": pl.format("{} to {} %", _left("done_high"), _left("done_low")),
            "requests": pl.col("n_requests").map_elements(count, return_dtype=pl.String),
        },
    )


def _left(done: str) -> pl.Expr:
    """Return the share that is not done, in percent with three significant digits."""
    text = (100 * (1 - pl.col(done))).round_sig_figs(3).cast(pl.String)
    return text.str.strip_suffix(".0")


def policies_compared(policies: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw the share of requests that need more than each policy allows, and its interval.

    The chart is a table of shaded cells: in a bar chart, the wide intervals of few requests would
    hide each other.
    """
    import altair as alt  # noqa: PLC0415

    rows = policy_rows(policies)
    leaves = rows["leaf"].unique(maintain_order=True).to_list()
    names = rows["policy"].unique(maintain_order=True).to_list()
    # Break a leaf's name at its dots, because columns are narrow on a narrow page.
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
    cells = base.mark_rect(color=light("busy"), stroke=light("line")).encode(
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
    drawn = pl.DataFrame(
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
    return drawn if drawn.is_empty() else _with_blanks(drawn)


def _with_blanks(drawn: pl.DataFrame) -> pl.DataFrame:
    """Add a row for each policy that has no rule for a leaf."""
    every = drawn.select(pl.col("policy").unique(maintain_order=True)).join(
        drawn.select(pl.col("leaf").unique(maintain_order=True)), how="cross"
    )
    texts = [name for name in drawn.columns if name not in {"policy", "leaf", "ratio", "share"}]
    return (
        every.join(drawn, on=["policy", "leaf"], how="left", maintain_order="left")
        .with_columns(
            pl.col("ratio").fill_null(0),
            pl.col("share").fill_null("-"),
            pl.col(texts).fill_null(_NO_RULE),
        )
        .select(drawn.columns)
    )


_NO_RULE: Final = "no rule for this leaf"


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
    return themed(base.mark_bar(color=light("zero_step")), height=140)


def threshold_rows(step_thresholds: pl.DataFrame) -> pl.DataFrame:
    """Return threshold, n_runs, n_faults, n_vcpus and max_run over all sources, lowest first."""
    return (
        step_thresholds.group_by("threshold")
        .agg(pl.col("n_runs", "n_faults").sum(), pl.col("n_vcpus").sum(), pl.col("max_run").max())
        .sort("threshold")
    )
