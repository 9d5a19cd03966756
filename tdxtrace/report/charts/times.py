"""Charts of requests by duration, of the share retried over time, and of retries by thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from tdxtrace.report.charts import MAX_MARKS
from tdxtrace.report.charts.theme import duration_axis, light, themed, time_axis
from tdxtrace.report.names import Threads, leaf_labels
from tdxtrace.report.units import count, duration, seconds, share
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.leaves import numbers_of

if TYPE_CHECKING:
    import altair as alt

MAX_THREADS: Final = 32
"""Maximum rows, so that they fit one screen."""
EPISODE: Final = "zero-step episode"
"""Kind of a mark of the timeline; the others are how a retried request ended."""
_KINDS: Final = {
    "succeeded": "completed",
    "resolved_elsewhere": "completed",
    "failed": "not completed",
    "abandoned": "not completed",
    "cut": "cut",
}
_HUES: Final = {
    "completed": "done",
    "not completed": "wrong",
    "cut": "unknown",
    EPISODE: "zero_step",
}
_SECOND: Final = 1_000_000_000
# Bins per power of ten: each is a quarter wider than the one before.
_PER_DECADE: Final = 10
_VP_ENTER: Final = numbers_of(["TDH.VP.ENTER"])[0]
AT_ONCE: Final = "answered at once"
RETRIED: Final = "retried"


def request_times(retry_chains: pl.DataFrame, resolution_ns: int) -> alt.Chart | alt.LayerChart:
    """Draw histograms of the duration of requests: retried ones downwards, others upwards."""
    import altair as alt  # noqa: PLC0415

    rows = time_bins(retry_chains, resolution_ns)
    low, high = float(rows["from_ns"].min()), float(rows["to_ns"].max())  # type: ignore[arg-type]
    x = alt.X(
        "from_ns:Q",
        title="first to last attempt (logarithmic)",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(**duration_axis(low, high)),
    )
    axis = alt.Axis(labelExpr="format(abs(datum.value), '~%')", tickCount=5)
    kinds = [kind for kind in (AT_ONCE, RETRIED) if kind in rows["kind"]]
    hues = {AT_ONCE: light("done"), RETRIED: light("busy")}
    chart = (
        alt.Chart(rows)
        .transform_calculate(height=f"datum.kind == '{RETRIED}' ? -datum.ratio : datum.ratio")
        .mark_rect()
        .encode(
            x,
            alt.X2("to_ns:Q"),
            alt.Y("height:Q", title="share of its kind", axis=axis),
            y2=alt.Y2Datum(0),
            color=alt.Color(
                "kind:N", scale=alt.Scale(domain=kinds, range=[hues[kind] for kind in kinds])
            ),
            tooltip=["kind", "time", "requests", "share"],
        )
    )
    return themed(chart, height=200)


def time_bins(retry_chains: pl.DataFrame, resolution_ns: int) -> pl.DataFrame:
    """Return the histogram of durations by kind: a row per bin that is not empty.

    Args:
        retry_chains: The requests; see :func:`timed` for those that are used.
        resolution_ns: Resolution of the clock; shorter durations are shown as this.

    Returns:
        kind, from_ns, to_ns, ratio (of its kind), and time, requests, share as text.
    """
    step = pl.col("took_ns").clip(resolution_ns).log(10) * _PER_DECADE
    counts = (
        timed(retry_chains)
        .with_columns(
            kind=pl.when(pl.col("n_busy") > 0).then(pl.lit(RETRIED)).otherwise(pl.lit(AT_ONCE)),
            bin=(step + 1e-9).floor().cast(pl.Int32),
        )
        .group_by("kind", "bin")
        .agg(n=pl.len())
        .sort("kind", "bin")
    )
    totals = dict(counts.group_by("kind").agg(pl.col("n").sum()).rows())
    rows = [
        {
            "kind": kind,
            "from_ns": _edge(bin_),
            "to_ns": _edge(bin_ + 1),
            "ratio": round(n / totals[kind], 9),
            "time": f"{duration(round(_edge(bin_)))} to {duration(round(_edge(bin_ + 1)))}",
            "requests": count(n),
            "share": share(n, totals[kind]),
        }
        for kind, bin_, n in counts.iter_rows()
    ]
    return pl.DataFrame(rows, schema=_SCHEMA)


def timed(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Return took_ns and n_busy of the requests with a known duration.

    vCPU entries that were not refused are excluded: only their time until the entry is known,
    which is 0.
    """
    is_entry = pl.col("leaf") == _VP_ENTER
    return (
        retry_chains.select("leaf", "took_ns", "n_busy")
        .filter(pl.col("took_ns").is_not_null() & ~(is_entry & (pl.col("n_busy") == 0)))
        .drop("leaf")
    )


_SCHEMA: Final = {
    "kind": pl.String,
    "from_ns": pl.Float64,
    "to_ns": pl.Float64,
    "ratio": pl.Float64,
    "time": pl.String,
    "requests": pl.String,
    "share": pl.String,
}


def _edge(bin_: int) -> float:
    return float(f"{math.pow(10, bin_ / _PER_DECADE):.6g}")


MAX_BINS: Final = 120
"""Maximum bins of time: six pixels each on a wide page."""
# Requests per bin, on average, for a meaningful share.
_PER_BIN: Final = 20


def retried_over_time(findings: Findings) -> alt.Chart | alt.LayerChart:
    """Draw the share of requests answered busy, by their start."""
    import altair as alt  # noqa: PLC0415

    rows = rate_bins(findings.retry_chains)
    x = alt.X(
        "from_s:Q",
        title="time from the first request",
        axis=alt.Axis(**time_axis()),
        scale=alt.Scale(nice=False),
    )
    tooltip = ["from", "requests", "retried", "share"]
    chart = (
        alt.Chart(rows)
        .mark_rect(color=light("busy"), opacity=0.8)
        .encode(
            x,
            alt.X2("to_s:Q"),
            alt.Y(
                "ratio:Q",
                title="share retried",
                axis=alt.Axis(format="~%", tickCount=5),
                scale=alt.Scale(domainMin=0),
            ),
            y2=alt.Y2Datum(0),
            tooltip=tooltip,
        )
    )
    return themed(chart, height=160)


def rate_bins(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Return the requests started and retried in each bin of time.

    Returns:
        from_s, to_s (seconds from the first request), ratio, and from, requests, retried and
        share as text; a row per bin that is not empty.
    """
    # Clocks of several inputs may differ: times are relative to the first request of each.
    since = pl.col("start_ns") - pl.col("start_ns").min().over("source")
    length: int = retry_chains.select(since.max()).item()
    width = length // max(1, min(MAX_BINS, retry_chains.height // _PER_BIN)) + 1
    counts = (
        retry_chains.group_by(bin=since // width)
        .agg(n=pl.len(), retried=(pl.col("n_busy") > 0).sum())
        .sort("bin")
    )
    return pl.DataFrame(
        [
            {
                "from_s": bin_ * width / _SECOND,
                "to_s": (bin_ + 1) * width / _SECOND,
                "ratio": round(retried / n, 9),
                "from": f"{bin_ * width / _SECOND:.6f} s",
                "requests": count(n),
                "retried": count(retried),
                "share": share(retried, n),
            }
            for bin_, n, retried in counts.iter_rows()
        ]
    )


@dataclass(frozen=True, slots=True)
class Timeline:
    """Rows of the timeline, and the numbers of chains and threads including those left out."""

    rows: pl.DataFrame
    """thread, kind, from_s, to_s (seconds from the start of the trace), and tooltip texts."""
    threads: Sequence[str]
    n_chains: int
    """Retried chains, drawn or not."""
    n_threads: int


_ORDER: Final = ("n_attempts", "took_ns", "first_seq")


def timeline_rows(findings: Findings) -> Timeline:
    """Return the rows to draw: the busiest threads, and their chains with the most attempts."""
    chains = (
        findings.retry_chains.select("source", "tid", "n_busy", *_ORDER)
        .with_row_index("place")
        .filter(pl.col("n_busy") > 0)
    )
    steps = findings.zero_steps
    of_thread = ["source", "tid"]
    busiest = _busiest(chains, steps)
    drawn = busiest.head(MAX_THREADS).select(of_thread)
    labels = Threads(findings)
    label = {row: labels.label(*row) for row in drawn.sort(of_thread).rows()}
    here = {"on": of_thread, "how": "semi", "nulls_equal": True}
    worst = (
        chains.join(drawn, **here)  # type: ignore[arg-type]
        .sort(_ORDER, descending=[True, True, False], nulls_last=True)
        .head(MAX_MARKS)
    )
    episodes = (
        steps.join(drawn, **here)  # type: ignore[arg-type]
        .sort("n_refused", "first_seq", descending=[True, False])
        .head(MAX_MARKS // 4)
    )
    # Collect all columns only for the rows that are drawn.
    rows = pl.concat([_chains(findings.retry_chains[worst["place"]]), _episodes(episodes)])
    # Clocks of several inputs may differ: times are relative to the start of each.
    starts = {n: source.first_ns for n, source in enumerate(findings.provenance.sources)}
    begins = pl.col("source").replace_strict(starts, default=None, return_dtype=pl.Int64)
    made = rows.with_columns(
        thread=pl.Series([label[row] for row in rows.select(of_thread).rows()], dtype=pl.String),
        from_s=(pl.col("start_ns") - begins) / _SECOND,
        to_s=(pl.col("end_ns") - begins) / _SECOND,
        at=pl.Series([seconds(ns) for ns in rows["start_ns"]], dtype=pl.String),
        lasted=pl.Series([duration(ns) for ns in rows["took_ns"]], dtype=pl.String),
    ).drop(*of_thread, "start_ns", "end_ns", "took_ns")
    return Timeline(made, list(dict.fromkeys(label.values())), chains.height, busiest.height)


def _busiest(chains: pl.DataFrame, steps: pl.DataFrame) -> pl.DataFrame:
    """Return threads (source, tid) by number of busy answers and refused entries, most first."""
    of_thread = ["source", "tid"]
    return (
        pl.concat(
            [chains.select(*of_thread, "n_busy"), steps.select(*of_thread, n_busy="n_refused")]
        )
        .group_by(of_thread)
        .agg(pl.col("n_busy").sum())
        .sort("n_busy", *of_thread, descending=[True, False, False])
    )


def _chains(chains: pl.DataFrame) -> pl.DataFrame:
    return chains.select(
        "source",
        "tid",
        "start_ns",
        "end_ns",
        "took_ns",
        kind=pl.col("outcome").cast(pl.String).replace_strict(_KINDS),
        what=leaf_labels(pl.col("leaf")),
        ended=pl.col("outcome").cast(pl.String).str.replace_all("_", " "),
        tries=pl.format("{} attempts", "n_attempts"),
        line=pl.col("first_seq"),
    )


def _episodes(steps: pl.DataFrame) -> pl.DataFrame:
    return steps.select(
        "source",
        "tid",
        "start_ns",
        "end_ns",
        took_ns=pl.col("end_ns") - pl.col("start_ns"),
        kind=pl.lit(EPISODE),
        what=pl.format(
            "{} ({})", pl.col("form").cast(pl.String), pl.col("strength").cast(pl.String)
        ),
        ended=pl.col("ended").cast(pl.String).str.replace_all("_", " "),
        tries=pl.format("{} entries refused", "n_refused"),
        line=pl.col("first_seq"),
    )


TOOLTIP: Final = {
    "what": "what",
    "thread": "thread",
    "at": "start, s",
    "lasted": "took",
    "tries": "tries",
    "ended": "ended",
    "line": "row",
}
"""Fields of a mark, and their titles: the columns of the list of all marks, too."""


def timeline(shown: Timeline) -> alt.Chart | alt.LayerChart:
    """Draw retried chains and zero-step episodes, by thread.

    Drag to pan, Ctrl and the wheel to zoom, double click to reset.

    Args:
        shown: Result of :func:`timeline_rows`.
    """
    import altair as alt  # noqa: PLC0415

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
        tooltip=[alt.Tooltip(name, title=title) for name, title in TOOLTIP.items()],
    )
    is_episode = alt.datum.kind == EPISODE
    until = alt.X2("to_s:Q")
    background = (
        base.transform_filter(is_episode)
        .mark_bar(height=18, opacity=0.35, clip=True, cornerRadius=2)
        .encode(until)
    )
    # A chain of microseconds is narrower than a pixel: a tick marks its position.
    chains = base.transform_filter(~is_episode)
    bars = chains.mark_bar(height=9, clip=True).encode(until)
    ticks = chains.mark_tick(size=9, thickness=1, clip=True)
    # An empty layer has no extent, for which Vega logs a warning.
    layers = ([background] if EPISODE in kinds else []) + (
        [bars, ticks] if kinds != [EPISODE] else []
    )
    drawn: Any = alt.layer(*layers)  # Altair's types allow a facet here
    return themed(drawn.add_params(zoom), height=22 * len(shown.threads))
