"""What one line of ftrace, trace-cmd or perf text looks like, whatever wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from tdxtrace.ingest.batch import UNKNOWN


class LinePrefix(NamedTuple):
    """The part of a line that every event has, and where its event begins."""

    comm: str
    tid: int
    tgid: int
    cpu: int
    flags: str
    ts: tuple[int, str]
    """Seconds (or the whole stamp) and the digits after the point ("" if none)."""
    event: str
    """Name with its group if printed; "" where the text names none."""
    args: str

    @property
    def ts_ns(self) -> int:
        """The stamp in ns, or in ticks of an integer clock."""
        whole, digits = self.ts
        return whole * 1_000_000_000 + int(digits[:9].ljust(9, "0")) if digits else whole


@dataclass(frozen=True, slots=True)
class Lost:
    """A marker that says events were dropped: on which CPU, and how many if known."""

    cpu: int
    n_events: int | None


@dataclass(frozen=True, slots=True)
class LineFormat:
    """One row of the registry: what lines of a text format look like."""

    name: str
    """As ``--input-format`` has it."""
    patterns: tuple[re.Pattern[str], ...]
    """Of the part before the event, likeliest first.

    Their groups are what is read, all but ``rest`` optional.  ``rest``: the event with its
    arguments.  ``comm``: the thread's name, or ``task``: the same, perhaps with the name of a
    trace-cmd instance before it.  ``tid``, ``tgid``, ``cpu``, ``flags``.  The stamp: a number
    named after its unit (UNITS), and ``frac``, the digits after its point.
    """
    event: re.Pattern[str]
    """Of ``rest``: groups ``event`` and ``args``."""
    others: tuple[str, ...] = ()
    """Formats whose lines may be among those of this one."""


# Longer numbers are no numbers of Linux: a thread has at most 7 digits (PID_MAX_LIMIT,
# include/linux/threads.h), a CPU 4 (NR_CPUS, arch/x86/Kconfig); 19 digits are less than 2**64.
_TID = r"(?P<tid>\d{1,9})"
_CPU = r"(?P<cpu>\d{1,4})"
_N = r"(?P<n>\d{1,19})"

# The kernel prints a name right-aligned in 16 columns ("%16s-%-7d", Linux
# kernel/trace/trace_output.c, trace_print_context), so its '-' stands in column
# 16 whatever the name holds.  Only tools that cut or pad differently need the
# second, leftmost match.
_TASK = rf"(?P<task>.{{16}}|.+?|(?<=\s))-{_TID}\s++"
_TGID = r"(?:\(\s*+(?P<tgid>\d{1,9}|-++)\)\s++)?"
# irqs-off, need-resched, context, preempt depth and, since 5.15, migrate depth.
_FLAGS = r"(?:(?P<flags>[.a-zA-Z#][.a-zA-Z0-9#]{3,4})\s++)?"
_WORDS = r"(?P<comm>\S++(?:\s++\S++)*?)"
_STAMP = r"(?P<sec>\d{1,19})(?:\.(?P<frac>\d++))?"
_REST = r"(?P<rest>.*)"

FTRACE: Final = re.compile(
    rf"^\s*+{_TASK}{_TGID}\[{_CPU}\]\s*+{_FLAGS}{_STAMP}:\s++{_REST}", re.ASCII
)
_FTRACE_FIXED: Final = re.compile(
    rf"^(?P<comm>.{{16}})-{_TID}\s++{_TGID}\[{_CPU}\]\s*+{_FLAGS}{_STAMP}:\s++{_REST}",
    re.ASCII,
)
# CPU and flags in one word; the tracefs file prints microseconds since its first
# event and a mark for long gaps, trace-cmd report -l the absolute stamp.
LATENCY: Final = re.compile(
    rf"^\s*+(?P<comm>.+?|(?<=\s))-{_TID}\s++{_CPU}(?P<flags>[^\s\d][^\s]{{3,4}})\s++"
    rf"(?:(?P<us>\d{{1,19}})us.?\s*|{_STAMP}):\s++{_REST}",
    re.ASCII,
)
VERBOSE: Final = re.compile(
    rf"^\s*+(?:{_WORDS}\s++|(?<=\s\s)){_TID}\s++{_CPU}\s++\d++\s++[0-9a-f]{{8}}\s++[0-9a-f]{{8}}\s++"
    rf"\[[0-9a-f]++\]\s++(?P<ms>\d{{1,19}})\.(?P<frac>\d{{3}})ms\s++\([+-]?\d++\.\d++ms\):\s++{_REST}",
    re.ASCII,
)
NO_PAYLOAD: Final = re.compile(rf"^{_TID}\s+{_CPU}\s+(?P<ts>\d+)\s+type:\s+(?P<id>\d+)$")
# The option context-info switched off: the event alone, at no time.
NO_CONTEXT: Final = re.compile(r"^\s*[A-Za-z_][\w:.-]*: +(?:\(|vcpu |reason |rip |[a-z_]\w*[=:])")
# perf script: every part but the event can be switched off with -F.
PERF: Final = re.compile(
    r"^(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d++)?+"
    rf"\s*+(?:{_WORDS}\s++)??(?:(?:(?P<tgid>-?\d{{1,9}})/\s*+)?(?P<tid>-?\d{{1,9}})\s++)?"
    r"(?:(?P<flags>[.a-zA-Z]{4,5})\s++)?(?:\[(?P<cpu>\d{1,4})\]\s++)?"
    r"(?P<sec>\d{1,19})\.(?P<frac>\d{6}|\d{9}):\s++(?:\d++\s++)?"
    r"(?P<rest>[A-Za-z_][\w.:/-]*:.*|PERF_RECORD_\w+ .*|[0-9a-f]{8,16} .*)",
    re.ASCII,
)
_EVENT = re.compile(r"^(?P<event><[^>]*>|[\w.:-]*?\w):(?:\s++(?P<args>.*)|$)", re.DOTALL | re.ASCII)
_PERF_EVENT = re.compile(
    r"^(?P<event>[\w./-]++(?::[\w./-]++)?):(?:\s++(?P<args>.*)|$)", re.DOTALL | re.ASCII
)

LOST: Final = re.compile(
    rf"^\s*(?:\S+:\s+)?CPU:{_CPU} \[(?:LOST )?(?:{_N} )?EVENTS(?: DROPPED)?\]\s*$"
)
_PERF_LOST = re.compile(rf"PERF_RECORD_LOST(?:_SAMPLES)? lost {_N}")
# Lines of tools that describe the recording: trace-cmd's head, perf's comments.
HEADER: Final = re.compile(
    r"^(?:#|\s*$|cpus=\d+\s*$|version = \d+\s*$|CPU \d+ is empty\s*$|trace-cmd version )"
)
CALLCHAIN: Final = re.compile(
    r"^(?:\s++(?:[0-9a-f]{4,16} (?>.*?\().*\)|=> .*+)"
    r"|\s*+[0-9a-f]{8,16}\s++\S++|.*: <stack trace>)\s*$"
)
QUOTE: Final = re.compile(r"^(?:> ?)+")
WITHOUT_EVENT: Final = (HEADER, LOST, NO_CONTEXT, NO_PAYLOAD)
"""What shows that a text is of ftrace though none of its lines is an event."""


# What tells the formats of text apart: the first row that a line fits names it.
LINE_FORMATS: Final = (
    LineFormat("ftrace", (_FTRACE_FIXED, FTRACE), _EVENT, ("ftrace-latency", "perf-script")),
    LineFormat("ftrace-latency", (LATENCY,), _EVENT, ("ftrace",)),
    LineFormat("ftrace-verbose", (VERBOSE,), _EVENT, ("ftrace",)),
    LineFormat("perf-script", (PERF,), _PERF_EVENT, ("ftrace",)),
)
# Nanoseconds in one of the number before the point of a stamp.
UNITS: Final = {"sec": 1_000_000_000, "ms": 1_000_000, "us": 1000}


def formats_of(name: str) -> tuple[LineFormat, ...]:
    """Return the formats that lines of an input may have, likeliest first."""
    rows = {row.name: row for row in LINE_FORMATS}
    return (rows[name], *(rows[other] for other in rows[name].others))


def match_prefix(
    line: str, formats: Iterable[LineFormat]
) -> tuple[LineFormat, re.Match[str]] | None:
    """Return the first format that a line fits, and how."""
    for row in formats:
        for pattern in row.patterns:
            found = pattern.match(line)
            if found is not None:
                return row, found
    return None


def prefix_of(row: LineFormat, found: re.Match[str]) -> LinePrefix:
    """Return what the prefix of a line says, and its event."""
    groups = found.groupdict()
    rest = found["rest"]
    event = row.event.match(rest)
    name, args = ("", rest) if event is None else (event["event"], event["args"] or "")
    return LinePrefix(
        _comm(groups).strip(" \t"),
        _number(groups.get("tid")),
        _number(groups.get("tgid")),
        _number(groups.get("cpu")),
        groups.get("flags") or "",
        _stamp(groups),
        name,
        args,
    )


def read_prefix(line: str, formats: Iterable[LineFormat]) -> LinePrefix | None:
    """Read the prefix of a line in the first format that it fits; None if it fits none."""
    made = match_prefix(line, formats)
    return None if made is None else prefix_of(*made)


def lost_of(line: str) -> Lost | None:
    """Read a marker of lost events in the words of tracefs or trace-cmd."""
    found = LOST.match(line)
    if found is None:
        return None
    return Lost(int(found["cpu"]), int(found["n"]) if found["n"] else None)


def perf_lost_of(head: LinePrefix) -> Lost | None:
    """Read perf's marker, which looks like an event without a group."""
    found = _PERF_LOST.match(head.args) if head.event == "" else None
    return None if found is None else Lost(head.cpu, int(found["n"]))


def _comm(groups: Mapping[str, str | None]) -> str:
    """The name of the thread: 16 columns where an instance's name, "rig: ", is before it."""
    task = groups.get("task") or ""
    if len(task) > 16 and task[:-16].rstrip().endswith(":"):
        return task[-16:]
    return task or groups.get("comm") or ""


def _stamp(groups: Mapping[str, str | None]) -> tuple[int, str]:
    """Seconds and the digits after their point; or the number of an integer clock and none."""
    frac = groups.get("frac") or ""
    if text := groups.get("sec"):
        return int(text), frac
    unit, n_digits = ("ms", 3) if "ms" in groups else ("us", 6)
    seconds, rest = divmod(int(groups[unit] or 0), 10**n_digits)
    return seconds, f"{rest:0{n_digits}}{frac}"


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else UNKNOWN
