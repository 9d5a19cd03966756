"""How far can the data be trusted?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.sections import Grid, Section, grid
from tdxtrace.report.units import count, duration, plural, seconds, short_duration, total
from tdxtrace.tables.trace import Findings, Source

_MOST: Final = 20


def section(findings: Findings) -> Section:
    """Say what was read, what was lost, and how many answers suffer from it."""
    return Section(
        name="losses",
        title="Data quality",
        definition="What was lost, skipped or not understood bounds every answer below; a request "
        "that a gap or an end of the trace interrupts is cut, and is neither short nor done.",
        says=_says(findings),
        grids=[_sources(findings.provenance.sources), *_losses(findings)],
    )


def _says(findings: Findings) -> list[str]:
    losses = findings.losses
    bad = losses.filter(pl.col("severity") != "info")
    chains = findings.retry_chains
    cut = chains.filter(pl.col("outcome") == "cut")
    by_loss = cut.filter(pl.col("cut_by") == "lost_events").height
    said = []
    if bad.is_empty():
        said.append("Nothing was lost that the input tells of.")
    else:
        n = total(bad, "n_events")
        unknown = bad["n_events"].null_count()
        events = f"{count(n)} events" if n else "events"
        more = f" and an unknown number {plural(unknown, 'more time')}" if n and unknown else ""
        said.append(f"The input tells of {events} lost{more}.")
    if cut.height:
        told = f"Cut: {count(cut.height)} of {plural(chains.height, 'request')}, "
        said.append(told + _cut_by(by_loss, cut.height - by_loss))
    elif chains.height:
        said.append("Cut: no request.")
    weaker = chains.filter(pl.col("identity") != "request").height
    if weaker:
        said.append(
            f"Told apart without TD or page: {count(weaker)} of "
            f"{plural(chains.height, 'request')}. Probes that fetch the "
            "arguments would make them sure."
        )
    said += [note.rstrip(".") + "." for note in findings.provenance.notes]
    if findings.options:
        said.append(f"Only a part was asked for: {_options(findings)}.")
    return said


def _cut_by(n_lost: int, n_ends: int) -> str:
    parts = [(n_lost, "by lost events"), (n_ends, "by the beginning or end of the trace")]
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
                told.path.rpartition("/")[2],
                told.format + ("" if told.compression == "none" else f" ({told.compression})"),
                count(told.n_lines),
                duration(_length(told)),
                f"{told.clock} by {short_duration(told.clock_resolution_ns)}",
                told.kernel or "not told",
            )
            for told in sources
        ],
        right=(2, 3),
        spare=(5,),
    )


def _length(told: Source) -> int | None:
    if told.first_ns is None or told.last_ns is None:
        return None
    return told.last_ns - told.first_ns


def _losses(findings: Findings) -> list[Grid]:
    """What may change an answer, worst first; what cannot is counted below it."""
    order = pl.col("severity").cast(pl.String)  # data_loss stands before error, as it should
    losses = findings.losses.filter(pl.col("severity") != "info").sort(order, maintain_order=True)
    harmless = findings.losses.height - losses.height
    more = []
    if losses.height > _MOST:
        more.append(f"{plural(losses.height - _MOST, 'more row')} (tdxtrace events --table losses)")
    if harmless:
        more.append(f"{plural(harmless, 'row')} of no consequence (noise, headers) left out")
    if losses.is_empty():
        return []
    return [
        grid(
            ("what", "CPU", "from, s", "to, s", "events", "advice"),
            [
                (
                    row["kind"].replace("_", " "),
                    count(row["cpu"]),
                    seconds(row["start_ns"]),
                    seconds(row["end_ns"]),
                    count(row["n_events"]),
                    row["advice"],
                )
                for row in losses.head(_MOST).iter_rows(named=True)
            ],
            right=(1, 2, 3, 4),
            spare=(1, 2),
            more="; ".join(more),
        )
    ]
