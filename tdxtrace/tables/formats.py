"""Formats of inputs, as named in provenance: contents, unit of counting and kind of times.

How an input of each format is recognised and read: ``ingest.formats``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class InputFormat:
    """One input format."""

    name: str
    """Value of ``--input-format``."""
    unit: Literal["line", "record"] = "line"
    """Unit of ``seq`` and of counts: lines of text, or records of a binary file."""
    holds: Literal["events", "messages"] = "events"
    """Events of a trace, or messages of the kernel's log."""
    times: Literal["absolute", "since first event"] = "absolute"


FTRACE: Final = InputFormat("ftrace")
FTRACE_LATENCY: Final = InputFormat("ftrace-latency", times="since first event")
FTRACE_VERBOSE: Final = InputFormat("ftrace-verbose", times="since first event")
FUNCTION_GRAPH: Final = InputFormat("function-graph")
PERF_SCRIPT: Final = InputFormat("perf-script")
BPFTRACE: Final = InputFormat("bpftrace")
TRACE_DAT: Final = InputFormat("trace.dat", unit="record")
PERF_DATA: Final = InputFormat("perf.data", unit="record")
RAW_PAGES: Final = InputFormat("trace_pipe_raw", unit="record")
KERNEL_LOG: Final = InputFormat("kernel-log", holds="messages")
JOURNAL_JSON: Final = InputFormat("journal-json", holds="messages")
JOURNAL_EXPORT: Final = InputFormat("journal-export", holds="messages")

INPUT_FORMATS: Final = {
    made.name: made
    for made in (
        FTRACE,
        FTRACE_LATENCY,
        FTRACE_VERBOSE,
        FUNCTION_GRAPH,
        PERF_SCRIPT,
        BPFTRACE,
        TRACE_DAT,
        PERF_DATA,
        RAW_PAGES,
        KERNEL_LOG,
        JOURNAL_JSON,
        JOURNAL_EXPORT,
    )
}
"""Formats by name."""


def format_named(name: str) -> InputFormat:
    """Return the format of this name; an unknown one (from a later version) is lines of events."""
    return INPUT_FORMATS.get(name) or InputFormat(name)
