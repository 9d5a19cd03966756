"""What has to be known about the inputs before their answers are believed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from tdxtrace.ingest.headers import TICK_CLOCKS
from tdxtrace.tables.clocks import LOG_FORMATS, agreement
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Source

RELATIVE: Final = ("ftrace-latency", "ftrace-verbose")
"""Formats whose times count from their first event."""


def notes_on(sources: Sequence[Source]) -> tuple[str, ...]:
    """Say of each input what its times mean, and of each log what it can be compared with."""
    return tuple(note for source in sources for note in _notes(source, sources))


def _notes(source: Source, sources: Sequence[Source]) -> Iterator[str]:
    where = one_line(source.path)
    if source.clock in ("integer", *TICK_CLOCKS):
        yield f"{where}: {source.clock} clock; times are in its ticks, shown as ns"
    if source.clock == "local":
        yield f"{where}: clock 'local' differs between CPUs; record with mono (-C mono)"
    if source.format in RELATIVE:
        yield f"{where}: times count from the first event; cannot be merged by time"
    if source.format in LOG_FORMATS:
        for trace in sources:
            if trace.format not in LOG_FORMATS:
                agreed = agreement(trace, source)
                how = "compared" if agreed.comparable else "NOT compared"
                yield f"{where}: {how} by time with {one_line(trace.path)}: {agreed.reason}"
