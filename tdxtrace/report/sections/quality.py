"""Section on the quality of the data: inputs, losses, censored requests."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.loader_text import loader_sentences
from tdxtrace.report.section import Grid, Section, grid
from tdxtrace.report.units import clock_text, count, duration, plural, seconds, total
from tdxtrace.tables.trace import Findings, Source

_MAX_ROWS: Final = 20


def section(findings: Findings) -> Section:
    """Return the section on inputs, losses, and requests affected by losses."""
    return Section(
        name="losses",
        title="Data quality",
        definition="Events that were lost, skipped or not understood limit every result; a "
        "request interrupted by a gap or by an end of the trace is cut (censored): its number of "
        "attempts is a lower bound.",
        says=_sentences(findings),
        grids=[_sources(findings.provenance.sources), *_losses(findings)],
    )


def _sentences(findings: Findings) -> list[str]:
    losses = findings.losses
    data_losses = losses.filter(pl.col("severity") != "info")
    chains = findings.retry_chains
    cut = chains.select("outcome", "cut_by").filter(pl.col("outcome") == "cut")
    by_loss = cut.filter(pl.col("cut_by") == "lost_events").height
    sentences = []
    if data_losses.is_empty():
        sentences.append("The input reports no lost events.")
    else:
        n = total(data_losses, "n_events")
        unknown = data_losses["n_events"].null_count()
        events = f"{count(n)} events" if n else "events"
        more = f" and an unknown number {plural(unknown, 'more time')}" if n and unknown else ""
        sentences.append(f"The input reports {events} lost{more}.")
    if cut.height:
        text = f"Cut: {count(cut.height)} of {plural(chains.height, 'request')}, "
        sentences.append(text + _cut_by(by_loss, cut.height - by_loss))
    elif chains.height:
        sentences.append("Cut: no request.")
    weaker = chains.filter(pl.col("identity") != "request").height
    if weaker:
        sentences.append(
            f"Identified without TD or page: {count(weaker)} of "
            f"{plural(chains.height, 'request')}. Probes that fetch the "
            "arguments would identify them fully."
        )
    sentences += [f"P-SEAMLDR: {line}." for line in loader_sentences(findings.loader_calls)]
    sentences += [note.rstrip(".") + "." for note in findings.provenance.notes]
    if findings.options:
        sentences.append(f"Filtered: {_options(findings)}.")
    return sentences


def _cut_by(n_lost: int, n_ends: int) -> str:
    parts = [(n_lost, "by lost events"), (n_ends, "by the start or end of the trace")]
    return ", ".join(f"{count(n)} {what}" for n, what in parts if n) + "."


def _options(findings: Findings) -> str:
    parts = []
    for name, value in findings.options.items():
        shown = " or ".join(value) if isinstance(value, list | tuple) else str(value)
        parts.append(f"{name} {shown}")
    return ", ".join(parts)


def _sources(sources: tuple[Source, ...]) -> Grid:
    return grid(
        ("input", "format", "records", "length", "clock", "kernel"),
        [
            (
                source.path.rpartition("/")[2],
                _format(source),
                count(source.n_lines),
                duration(_length(source)),
                clock_text(source.clock, source.clock_resolution_ns),
                source.kernel or "unknown",
            )
            for source in sources
        ],
        right=(2, 3),
        droppable=(5,),
    )


def _format(source: Source) -> str:
    is_plain = source.compression == "none"
    return source.format if is_plain else f"{source.format} ({source.compression})"


def _length(source: Source) -> int | None:
    if source.first_ns is None or source.last_ns is None:
        return None
    return source.last_ns - source.first_ns


def _losses(findings: Findings) -> list[Grid]:
    """Return the losses that may change results, data_loss first; others are only counted."""
    order = pl.col("severity").cast(pl.String)  # data_loss sorts before error
    losses = findings.losses.filter(pl.col("severity") != "info").sort(order, maintain_order=True)
    harmless = findings.losses.height - losses.height
    more = []
    if losses.height > _MAX_ROWS:
        more.append(
            f"{plural(losses.height - _MAX_ROWS, 'more row')} (tdxtrace events --table losses)"
        )
    if harmless:
        more.append(f"{plural(harmless, 'row')} without effect on results (noise, headers) omitted")
    if losses.is_empty():
        return []
    return [
        grid(
            ("kind", "CPU", "from, s", "to, s", "events", "advice"),
            [
                (
                    row["kind"].replace("_", " "),
                    count(row["cpu"]),
                    seconds(row["start_ns"]),
                    seconds(row["end_ns"]),
                    count(row["n_events"]),
                    row["advice"],
                )
                for row in losses.head(_MAX_ROWS).iter_rows(named=True)
            ],
            right=(1, 2, 3, 4),
            droppable=(1, 2),
            more="; ".join(more),
        )
    ]
