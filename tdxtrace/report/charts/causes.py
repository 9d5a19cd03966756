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

_HUES: Final = {
    "host_conflict": "blue",
    "armed_entry": "purple",
    "guest": "green",
    "kernel_bug": "vermilion",
    "unexplained": "grey",
}


def causes_by_leaf(cause_shares: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw, for each leaf, the share of its busy answers that each cause explains."""
    import altair as alt  # noqa: PLC0415

    rows = cause_rows(cause_shares)
    names = rows["leaf"].unique(maintain_order=True).to_list()
    causes = [cause for cause in _HUES if cause in rows["cause"]]
    chart = (
        alt.Chart(rows)
        .mark_bar(stroke=light("paper"), strokeWidth=1)
        .encode(
            alt.X(
                "share:Q",
                title="share of the leaf's busy answers",
                axis=alt.Axis(format="~%", tickCount=5),
            ),
            alt.Y("leaf:N", title=None, sort=names),
            color=alt.Color(
                "cause:N",
                scale=alt.Scale(domain=causes, range=[light(_HUES[cause]) for cause in causes]),
            ),
            order="order:Q",
            tooltip=["leaf", "resource", "cause", "answers", "of the leaf"],
        )
    )
    return themed(chart, height=26 * len(names))


def cause_rows(cause_shares: pl.DataFrame) -> pl.DataFrame:
    """Return shares and tooltip texts by leaf, resource and cause."""
    places = {cause: place for place, cause in enumerate(_HUES)}
    of_leaf = pl.col("n_busy").sum().over("leaf")
    rows = (
        cause_shares.with_columns(pl.col("cause").cast(pl.String), n_leaf=of_leaf)
        .group_by("leaf", "resource", "cause", "n_leaf", maintain_order=True)
        .agg(pl.col("n_busy").sum())
        .sort("n_leaf", "leaf", "n_busy", "resource", descending=[True, False, True, False])
    )
    return rows.select(
        leaf_labels(pl.col("leaf")),
        pl.col("resource").fill_null("not named"),
        "cause",
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
    """Draw observed conflicts between leaves, and those only possible by the locks.

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
    cells = base.mark_rect(color=light("blue"), stroke=light("line")).encode(
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
    most = max(observed.values(), default=1)
    rows = [
        {
            "busy": leaf_label(leaf),
            "holder": leaf_label(holder),
            "observed": f"{count(observed.get((leaf, holder), 0))} busy answers",
            "expected": _expected(possible.get((leaf, holder))),
            "text": count(observed[leaf, holder]) if (leaf, holder) in observed else "·",
            "shade": round((observed.get((leaf, holder), 0) / most) ** 0.5, 4),
        }
        for leaf, holder in sorted(observed.keys() | possible.keys())
    ]
    return pl.DataFrame(rows)


def _expected(generations: set[str] | None) -> str:
    if not generations:
        return "no common lock"
    return "their locks conflict in generation " + ", ".join(sorted(generations))
