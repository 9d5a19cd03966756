"""What inputs say of the recording (kernel, tool, clock), and notes on what their times mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tdxtrace.tables.formats import format_named
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Source, agreement

# trace clocks that do not count nanoseconds: Linux Documentation/trace/ftrace.rst,
# trace_clock; trace-cmd prints their timestamps as integers (trace-input.c, extract_trace_clock).
TICK_CLOCKS: Final = ("counter", "x86-tsc", "ppc-tb")

_ENTRIES: Final = re.compile(
    rb"^# entries-in-buffer/entries-written: (\d{1,19})/(\d{1,19})\b", re.MULTILINE
)
_KERNELS: Final = (
    re.compile(rb"^# \w+ latency trace v\S+ on (\S+)", re.MULTILINE),
    re.compile(rb"^# os release : (\S+)", re.MULTILINE),
)
_PERF_CLOCK: Final = re.compile(rb"^# clockid: (\w+)", re.MULTILINE)
_PERF: Final = re.compile(rb"^# perf version : (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Header:
    """What an input says of the recording; None where it says nothing."""

    kernel: str | None = None
    tool: str | None = None
    clock: str | None = None
    entries_kept: int | None = None
    entries_written: int | None = None
    counts_losses: bool = False
    """Whether the recording has the kernel's own counts of what was lost."""
    kind_of_clock: str = "unnamed"
    """What is known of the clock without its name: see ``tables.trace.Source.clock``."""
    resolution_ns: int = 1
    """Finest step of the timestamps, in ns."""


def read_comments(head: bytes) -> Header:
    """Read the comments in the first block of a text."""
    entries = _ENTRIES.search(head)
    perf = _PERF.search(head)
    clock = _PERF_CLOCK.search(head)
    kernel = next((found for pattern in _KERNELS if (found := pattern.search(head))), None)
    tool = f"perf {perf[1].decode('ascii', 'replace')}" if perf else None
    if tool is None and re.search(rb"^cpus=\d+\s*$", head, re.MULTILINE):
        tool = "trace-cmd report"
    if tool is None and head.startswith(b"# tracer:"):
        tool = "tracefs trace"
    return Header(
        kernel[1].decode("ascii", "replace") if kernel else None,
        tool,
        clock[1].decode("ascii", "replace") if clock else None,
        int(entries[1]) if entries else None,
        int(entries[2]) if entries else None,
    )


def notes_on(sources: Sequence[Source]) -> tuple[str, ...]:
    """Return a note on each input whose times need one, and on what each log is compared with."""
    return tuple(note for source in sources for note in _notes(source, sources))


def _notes(source: Source, sources: Sequence[Source]) -> Iterator[str]:
    where = one_line(source.path)
    if source.clock in ("integer", *TICK_CLOCKS):
        yield f"{where}: {source.clock} clock; times are in its ticks, shown as ns"
    if source.clock == "local":
        yield f"{where}: clock 'local' differs between CPUs; record with mono (-C mono)"
    if format_named(source.format).times != "absolute":
        yield f"{where}: times count from the first event; cannot be merged by time"
    if source.is_log:
        for trace in sources:
            if not trace.is_log:
                agreed = agreement(trace, source)
                how = "compared" if agreed.comparable else "NOT compared"
                yield f"{where}: {how} by time with {one_line(trace.path)}: {agreed.reason}"
