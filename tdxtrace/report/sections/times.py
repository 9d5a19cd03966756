"""Section on the duration of requests, and on when and on which thread they were retried."""

from __future__ import annotations

import polars as pl

from tdxtrace.report.charts import times
from tdxtrace.report.charts.times import Timeline
from tdxtrace.report.findings_text import chain_end, worst_chains
from tdxtrace.report.names import Threads, definition, leaf_label
from tdxtrace.report.section import Figure, Grid, Section, grid, more
from tdxtrace.report.units import count, duration, plural, word
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.trace import Findings

_WORST = 12


def section(findings: Findings) -> Section:
    """Return the section on durations of requests, retries by time and thread, worst requests."""
    chains = findings.retry_chains
    title, about = "Retries by time and thread", definition(RETRY_CHAINS)
    n_retried = chains.select((pl.col("n_busy") > 0).sum()).item()
    if chains.is_empty():
        return Section("retry_chains", title, about, ["No request was captured."])
    if not n_retried:
        says = ["No request was retried."]
        return Section("retry_chains", title, about, says, figures=_times(findings))
    shown = times.timeline_rows(findings)
    return Section(
        "retry_chains",
        title,
        about,
        [_sentences(chains, n_retried)],
        figures=[
            *_times(findings),
            Figure(
                "rate",
                "Requests answered busy, over time",
                "By start of the request; hover for the counts.",
                lambda: times.retried_over_time(findings),
            ),
            Figure(
                "timeline",
                "Retried requests and zero-step episodes, by thread",
                _drawn(shown) + " Drag to move, Ctrl and the wheel to zoom, double click to reset.",
                lambda: times.timeline(shown),
            ),
        ],
        grids=[_worst(findings, n_retried)],
    )


def _times(findings: Findings) -> list[Figure]:
    n = times.timed(findings.retry_chains).height
    if not n:
        return []
    missing = findings.retry_chains["took_ns"].null_count()
    note = f"{plural(n, 'request')}, without successful vCPU entries"
    if missing:
        note += f" and without {count(missing)} whose start or end was not recorded"
    resolution = max(source.clock_resolution_ns for source in findings.provenance.sources)
    return [
        Figure(
            "times",
            "Duration of requests",
            f"{note}. Each kind adds up to 100 %, retried ones downwards. Clock resolution: "
            f"{duration(resolution)}.",
            lambda: times.request_times(findings.retry_chains, resolution),
        )
    ]


def _sentences(chains: pl.DataFrame, n_retried: int) -> str:
    known = times.timed(chains)
    quick = known.filter(pl.col("n_busy") == 0)["took_ns"].to_physical().median()
    slow = known.filter(pl.col("n_busy") > 0)["took_ns"].to_physical().median()
    if not isinstance(quick, float) or not isinstance(slow, float):
        return f"Answered busy at least once: {plural(n_retried, 'request')}."
    return (
        f"Median duration: {duration(round(quick))} of requests that succeeded at once, "
        f"{duration(round(slow))} of those that were retried."
    )


def _drawn(shown: Timeline) -> str:
    n = shown.rows.filter(pl.col("kind") != times.EPISODE).height
    text = f"All {plural(n, 'retried request')}"
    if n < shown.n_chains:
        text = f"The {count(n)} with most attempts of {plural(shown.n_chains, 'retried request')}"
    if len(shown.threads) < shown.n_threads:
        text += f", on the {len(shown.threads)} threads with most busy answers of {shown.n_threads}"
    return text + "."


def _worst(findings: Findings, n_retried: int) -> Grid:
    rows = worst_chains(findings.retry_chains, _WORST)
    threads = Threads(findings)
    return grid(
        ("TDH.", "page", "thread", "attempts", "time", "rows", "outcome"),
        [
            (
                leaf_label(row["leaf"]),
                word(row["gpa"]),
                threads.label(row["source"], row["tid"]),
                count(row["n_attempts"]),
                duration(row["took_ns"]),
                f"{row['first_seq']} to {row['last_seq']}",
                chain_end(row),
            )
            for row in rows.iter_rows(named=True)
        ],
        right=(3, 4, 5),
        droppable=(1,),
        caption="The requests with most attempts; rows are lines or records of the input "
        "(seamcalls.seq).",
        more=more(n_retried - rows.height, "retry-chains"),
    )
