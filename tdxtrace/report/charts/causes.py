"""Charts of busy causes: share of each cause by leaf, and conflicts between pairs of leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from tdxtrace.report.charts.theme import light, themed
from tdxtrace.report.names import leaf_label, leaf_labels
from tdxtrace.report.units import count, share
from tdxtrace.tdx.locks import conflict_table

if TYPE_CHECKING:
    import altair as alt

# Name on the page and colour of each cause, in the order of the bars.
_CAUSES: Final = {
    "host_conflict": ("another SEAMCALL of the host", "host"),
    "armed_entry": ("an entry armed by zero-step mitigation", "zero_step"),
    "guest": ("the guest", "guest"),
    "kernel_bug": ("a kernel bug", "wrong"),
    "unexplained": ("unexplained", "unknown"),
}


def cause_label(cause: str) -> str:
    """Return the name of a cause in words.

    Example:
        >>> cause_label("host_conflict")
        'another SEAMCALL of the host'
    """
    return _CAUSES[cause][0]


def causes_by_leaf(cause_shares: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw, for each leaf, the share of its busy answers that each cause explains."""
    import altair as alt  # noqa: PLC0415

    rows = cause_rows(cause_shares)
    names = rows["leaf"].unique(maintain_order=True).to_list()
    hues = {label: light(hue) for label, hue in _CAUSES.values() if label in rows["cause"]}
    chart = (
        alt.Chart(rows)
        .mark_bar(stroke=light("paper"), strokeWidth=1)
        .encode(
            alt.X(
                "share:Q",
                title="share of the leaf's busy answers",
                axis=alt.Axis(format="~%", tickCount=5),
            ).scale(domain=[0, 1]),
            alt.Y("leaf:N", title=None, sort=names),
            color=alt.Color(
                "cause:N",
                scale=alt.Scale(domain=list(hues), range=list(hues.values())),
                legend=alt.Legend(columns=2, labelLimit=260),
            ),
            order="order:Q",
            tooltip=["leaf", "cause", "answers", "of the leaf", "resources"],
        )
    )
    return themed(chart, height=26 * len(names))


def cause_rows(cause_shares: pl.DataFrame) -> pl.DataFrame:
    """Return shares and tooltip texts: one row per leaf and cause, over all resources."""
    places = {cause: place for place, cause in enumerate(_CAUSES)}
    rows = (
        cause_shares.with_columns(
            pl.col("cause").cast(pl.String),
            pl.col("resource").fill_null("not named"),
            n_leaf=pl.col("n_busy").sum().over("leaf"),
        )
        .sort("n_busy", "resource", descending=[True, False])
        .group_by("leaf", "cause", "n_leaf", maintain_order=True)
        .agg(
            pl.col("n_busy").sum(),
            resources=pl.col("resource").unique(maintain_order=True).implode().list.join(", "),
        )
        .sort("n_leaf", "leaf", "n_busy", "cause", descending=[True, False, True, False])
    )
    return rows.select(
        leaf_labels(pl.col("leaf")),
        "resources",
        pl.col("cause").replace_strict({cause: label for cause, (label, _) in _CAUSES.items()}),
        order=pl.col("cause").replace_strict(places),
        share=(pl.col("n_busy") / pl.col("n_leaf")).round(6),
        answers=pl.Series([count(n) for n in rows["n_busy"]], dtype=pl.String),
        **{
            "of the leaf": pl.Series(
                [share(*row) for row in rows.select("n_busy", "n_leaf").rows()], dtype=pl.String
            )
        },
    )


def contention(rows: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw conflicts between leaves: observed ones, and ones that the lock table allows.

    Args:
        rows: Result of :func:`contention_rows`.
    """
    import altair as alt  # noqa: PLC0415

    names = rows["busy"].unique(maintain_order=True).to_list()
    holders = rows["holder"].unique(maintain_order=True).sort().to_list()
    x = alt.X(
        "holder:N", title="held by", sort=holders, axis=alt.Axis(labelAngle=-40, orient="bottom")
    )
    y = alt.Y("busy:N", title=None, sort=names)
    base, shade = alt.Chart(rows), alt.Scale(domain=[0, 1], range=[0, 0.75])
    cells = base.mark_rect(color=light("host"), stroke=light("line")).encode(
        x,
        y,
        opacity=alt.Opacity("shade:Q", scale=shade, legend=None),
        tooltip=["busy", "holder", "observed", "expected"],
    )
    texts = base.mark_text(color=light("ink"), fontSize=12).encode(x, y, text="text:N")
    return themed(cells + texts, height=30 * len(names) + 10)


def contention_rows(busy_causes: pl.LazyFrame, leaf_stats: pl.DataFrame) -> pl.DataFrame:
    """Return the pairs of recorded leaves with an observed or an expected conflict.

    Expected: the two take a lock in conflicting modes, in some generation of the module (the
    lock table).  Observed: busy answers whose most likely cause is a call of the other leaf.

    Returns:
        busy, holder (leaf names), observed, expected, text (of the cell), shade (0 to 1).
    """
    recorded = set(leaf_stats["leaf"])
    observed: dict[tuple[int, int], int] = {
        (leaf, holder): n
        for leaf, holder, n in busy_causes.select("leaf", "holder_leaf", "rank")
        .filter(pl.col("rank") == 1, pl.col("holder_leaf").is_not_null())
        .group_by("leaf", "holder_leaf")
        .len()
        .collect()
        .iter_rows()
    }
    possible: dict[tuple[int, int], set[str]] = {}
    for leaf, holder, generation in (
        conflict_table().select("leaf", "holder_leaf", "generation").unique().iter_rows()
    ):
        if leaf in recorded and holder in recorded:
            possible.setdefault((leaf, holder), set()).add(generation)
    max_observed = max(observed.values(), default=1)
    rows = [
        {
            "busy": leaf_label(leaf),
            "holder": leaf_label(holder),
            "observed": f"{count(observed.get((leaf, holder), 0))} busy answers",
            "expected": _expected(possible.get((leaf, holder))),
            "text": count(observed[leaf, holder]) if (leaf, holder) in observed else "·",
            "shade": round((observed.get((leaf, holder), 0) / max_observed) ** 0.5, 4),
        }
        for leaf, holder in sorted(observed.keys() | possible.keys())
    ]
    return pl.DataFrame(rows)


def _expected(generations: set[str] | None) -> str:
    if not generations:
        return "no common lock"
    return "their locks conflict in generation " + ", ".join(sorted(generations))
