"""Timeline of retried requests and zero-step episodes, by thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from tdxtrace.report.charts import MAX_MARKS
from tdxtrace.report.charts.theme import light, themed, time_axis
from tdxtrace.report.names import Threads, leaf_labels
from tdxtrace.report.units import duration, seconds
from tdxtrace.tables.trace import Findings

if TYPE_CHECKING:
    import altair as alt

MAX_THREADS: Final = 32
"""Maximum rows, so that they fit one screen."""
EPISODE: Final = "zero-step episode"
_HUES: Final = {
    "succeeded": "blue",
    "failed": "yellow",
    "resolved_elsewhere": "green",
    "abandoned": "vermilion",
    "cut": "grey",
    EPISODE: "purple",
}
_SECOND: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Timeline:
    """Rows of the timeline, and the numbers of chains and threads including those left out."""

    rows: pl.DataFrame
    """thread, kind, from_s, to_s (seconds from the start of the trace), and tooltip texts."""
    threads: Sequence[str]
    n_chains: int
    """Retried chains, drawn or not."""
    n_threads: int


def timeline_rows(findings: Findings) -> Timeline:
    """Return the rows to draw: the busiest threads, and their chains with the most attempts."""
    chains = findings.retry_chains.filter(pl.col("n_busy") > 0)
    steps = findings.zero_steps
    of_thread = ["source", "tid"]
    busiest = (
        pl.concat(
            [chains.select(*of_thread, "n_busy"), steps.select(*of_thread, n_busy="n_refused")]
        )
        .group_by(of_thread)
        .agg(pl.col("n_busy").sum())
        .sort("n_busy", *of_thread, descending=[True, False, False])
    )
    drawn = busiest.head(MAX_THREADS).select(of_thread)
    labels = Threads(findings)
    label = {row: labels.label(*row) for row in drawn.sort(of_thread).rows()}
    here = {"on": of_thread, "how": "semi", "nulls_equal": True}
    worst = (
        chains.join(drawn, **here)  # type: ignore[arg-type]
        .sort("n_attempts", "took_ns", "first_seq", descending=[True, True, False], nulls_last=True)
        .head(MAX_MARKS)
    )
    episodes = (
        steps.join(drawn, **here)  # type: ignore[arg-type]
        .sort("n_refused", "first_seq", descending=[True, False])
        .head(MAX_MARKS // 4)
    )
    rows = pl.concat([_chains(worst), _episodes(episodes)])
    # Clocks of several inputs may differ: times are relative to the start of each.
    starts = {n: source.first_ns for n, source in enumerate(findings.provenance.sources)}
    begins = pl.col("source").replace_strict(starts, default=None, return_dtype=pl.Int64)
    made = rows.with_columns(
        thread=pl.Series([label[row] for row in rows.select(of_thread).rows()], dtype=pl.String),
        from_s=(pl.col("start_ns") - begins) / _SECOND,
        to_s=(pl.col("end_ns") - begins) / _SECOND,
        at=pl.Series([seconds(ns) for ns in rows["start_ns"]], dtype=pl.String),
        lasted=pl.Series(
            [duration(b - a) for a, b in rows.select("start_ns", "end_ns").rows()], dtype=pl.String
        ),
    ).drop(*of_thread, "start_ns", "end_ns")
    return Timeline(made, list(dict.fromkeys(label.values())), chains.height, busiest.height)


def _chains(chains: pl.DataFrame) -> pl.DataFrame:
    return chains.select(
        "source",
        "tid",
        "start_ns",
        "end_ns",
        kind=pl.col("outcome").cast(pl.String),
        what=leaf_labels(pl.col("leaf")),
        tries=pl.format("{} attempts", "n_attempts"),
        line=pl.col("first_seq"),
    )


def _episodes(steps: pl.DataFrame) -> pl.DataFrame:
    return steps.select(
        "source",
        "tid",
        "start_ns",
        "end_ns",
        kind=pl.lit(EPISODE),
        what=pl.format(
            "{} ({})", pl.col("form").cast(pl.String), pl.col("strength").cast(pl.String)
        ),
        tries=pl.format("{} entries refused", "n_refused"),
        line=pl.col("first_seq"),
    )


def timeline(findings: Findings) -> alt.Chart | alt.LayerChart:
    """Draw retried chains and zero-step episodes, by thread.

    Drag to pan, Ctrl and the wheel to zoom, double click to reset.
    """
    import altair as alt  # noqa: PLC0415

    shown = timeline_rows(findings)
    kinds = [kind for kind in _HUES if kind in shown.rows["kind"]]
    scale = alt.Scale(domain=kinds, range=[light(_HUES[kind]) for kind in kinds])
    zoom = alt.selection_interval(
        name="zoom", encodings=["x"], bind="scales", zoom="wheel![event.ctrlKey]"
    )
    base = alt.Chart(shown.rows).encode(
        alt.X(
            "from_s:Q", title="time from the start of the trace", axis=alt.Axis(**time_axis())
        ).scale(nice=False),
        alt.Y("thread:N", title=None, sort=list(shown.threads)),
        color=alt.Color("kind:N", scale=scale),
        tooltip=["kind", "what", "tries", "lasted", "at", "thread", "line"],
    )
    is_episode = alt.datum.kind == EPISODE
    until = alt.X2("to_s:Q")
    behind = (
        base.transform_filter(is_episode)
        .mark_bar(height=18, opacity=0.35, clip=True, cornerRadius=2)
        .encode(until)
    )
    # A chain of microseconds is narrower than a pixel: a tick marks its position.
    chains = base.transform_filter(~is_episode)
    bars = chains.mark_bar(height=9, clip=True).encode(until)
    ticks = chains.mark_tick(size=9, thickness=1, clip=True)
    # An empty layer has no extent, for which Vega logs a warning.
    layers = ([behind] if EPISODE in kinds else []) + ([bars, ticks] if kinds != [EPISODE] else [])
    drawn: Any = alt.layer(*layers)  # Altair's types allow a facet here
    return themed(drawn.add_params(zoom), height=22 * len(shown.threads))
