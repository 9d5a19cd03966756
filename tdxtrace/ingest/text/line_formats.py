"""Formats of one line of ftrace, trace-cmd or perf text, with patterns and parsers for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from tdxtrace.ingest.batch import UNKNOWN


class LinePrefix(NamedTuple):
    """One parsed event line: the fields that every event has, then its name and arguments."""

    comm: str
    tid: int
    tgid: int
    cpu: int
    flags: str
    ts: tuple[int, str]
    """Seconds (or the whole timestamp) and the digits after the point ("" if none)."""
    event: str
    """Name, with its group if that is printed; "" if the line names no event."""
    args: str

    @property
    def ts_ns(self) -> int:
        """The timestamp in ns, or in ticks of an integer clock."""
        whole, digits = self.ts
        return whole * 1_000_000_000 + int(digits[:9].ljust(9, "0")) if digits else whole


@dataclass(frozen=True, slots=True)
class Lost:
    """A marker of dropped events: the CPU, and the number of events; None if it is unknown."""

    cpu: int
    n_events: int | None


@dataclass(frozen=True, slots=True)
class LineFormat:
    """One row of the registry: the syntax of lines in one text format."""

    name: str
    """Value of ``--input-format``."""
    patterns: tuple[re.Pattern[str], ...]
    """Patterns of the part before the event, likeliest first.

    All groups except ``rest`` are optional.  ``rest``: the event with its arguments.  ``comm``:
    the name of the thread; instead ``task``, or ``short`` (its first 8 bytes), if the name of a
    trace-cmd instance may precede it.  ``tid``, ``tgid``, ``cpu``, ``flags``.  The timestamp: a
    number named after its unit (UNITS), and ``frac``, the digits after its point.
    """
    event: re.Pattern[str]
    """Pattern of ``rest``, with groups ``event`` and ``args``."""
    others: tuple[str, ...] = ()
    """Formats whose lines may occur among lines of this one."""


# Linux prints no longer numbers: a thread has at most 7 digits (PID_MAX_LIMIT,
# include/linux/threads.h), a CPU 4 (NR_CPUS, arch/x86/Kconfig); 19 digits are less than 2**64.
_TID = r"(?P<tid>\d{1,9})"
_CPU = r"(?P<cpu>\d{1,4})"
_N = r"(?P<n>\d{1,19})"

# The kernel prints a name right-aligned in 16 columns ("%16s-%-7d", Linux
# kernel/trace/trace_output.c, trace_print_context), so the '-' after it is in column
# 16 whatever the name contains.  Only the output of tools that cut or pad names
# differently needs the second, leftmost match.
_TASK = rf"(?P<task>.{{16}}|.+?|(?<=\s))-{_TID}\s++"
_TGID = r"(?:\(\s*+(?P<tgid>\d{1,9}|-++)\)\s++)?"
# irqs-off, need-resched, context, preempt depth and, since 5.15, migrate depth.
_FLAGS = r"(?:(?P<flags>[.a-zA-Z#][.a-zA-Z0-9#]{3,4})\s++)?"
_WORDS = r"(?P<comm>\S++(?:\s++\S++)*?)"
_STAMP = r"(?P<sec>\d{1,19})(?:\.(?P<frac>\d++))?"
_REST = r"(?P<rest>.*)"
# trace-cmd report --ts-diff: the time since the previous line, after the timestamp.
_STEP = r"(?:\([+-]\d++\)\s++)?"

FTRACE: Final = re.compile(
    rf"^\s*+{_TASK}{_TGID}\[{_CPU}\]\s*+{_FLAGS}{_STAMP}:\s++{_STEP}{_REST}", re.ASCII
)
_FTRACE_FIXED: Final = re.compile(
    rf"^(?P<comm>.{{16}})-{_TID}\s++{_TGID}\[{_CPU}\]\s*+{_FLAGS}{_STAMP}:\s++{_STEP}{_REST}",
    re.ASCII,
)
# CPU and flags in one word; the tracefs file prints microseconds since its first
# event and a mark for long gaps, trace-cmd report -l the absolute timestamp.
LATENCY: Final = re.compile(
    rf"^\s*+(?P<short>.+?|(?<=\s))-{_TID}\s++{_CPU}(?P<flags>[^\s\d][^\s]{{3,4}})"
    # --raw-ts -l: no blank before the timestamp of an integer clock.
    r"(?:\s++|(?<=[^\s\d])(?=\d))"
    rf"(?:(?P<us>\d{{1,19}})us.?\s*|{_STAMP}):\s++{_STEP}{_REST}",
    re.ASCII,
)
VERBOSE: Final = re.compile(
    rf"^\s*+(?:{_WORDS}\s++|(?<=\s\s)){_TID}\s++{_CPU}\s++\d++\s++[0-9a-f]{{8}}\s++[0-9a-f]{{8}}\s++"
    rf"\[[0-9a-f]++\]\s++(?P<ms>\d{{1,19}})\.(?P<frac>\d{{3}})ms\s++\([+-]?\d++\.\d++ms\):\s++{_REST}",
    re.ASCII,
)
NO_PAYLOAD: Final = re.compile(rf"^{_TID}\s+{_CPU}\s+(?P<ts>\d+)\s+type:\s+(?P<id>\d+)$")
# Option context-info is off: the event alone, without a timestamp.
NO_CONTEXT: Final = re.compile(r"^\s*[A-Za-z_][\w:.-]*: +(?:\(|vcpu |reason |rip |[a-z_]\w*[=:])")
# perf script: every part can be switched on and off with -F.  Their order is that of Linux
# tools/perf/builtin-script.c, perf_sample__fprintf_start and process_event: name, process and
# thread, CPU, misc (one letter for each bit of perf_event_header.misc), time of day, time, period.
_TIME_OF_DAY = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d++"
_PERF_TIME = (
    rf"(?:[KUHGgMESp]{{1,6}}\s++)?(?:{_TIME_OF_DAY}\s++)?"
    r"(?P<sec>\d{1,19})\.(?P<frac>\d{6}|\d{9}):\s++(?:\d++\s++)?"
    r"(?P<rest>[A-Za-z_][\w.:/-]*:.*|PERF_RECORD_\w+ .*|[0-9a-f]{8,16} .*|\(.*|vcpu .*|reason .*)"
)
# A CPU in brackets is no part of a name: it would be followed by an unknown column.
_PERF_WORD = r"(?!\[\d{3,4}\]\s)\S++"
PERF: Final = re.compile(
    rf"^(?:{_TIME_OF_DAY})?+\s*+(?:(?P<comm>{_PERF_WORD}(?:\s++{_PERF_WORD})*?)\s++)??"
    r"(?:(?:(?P<tgid>-?\d{1,9})/\s*+)?(?P<tid>-?\d{1,9})\s++)?"
    rf"(?:(?P<flags>[.a-zA-Z]{{4,5}})\s++)?(?:\[(?P<cpu>\d{{1,4}})\]\s++)?{_PERF_TIME}",
    re.ASCII,
)
# The same with -L: the first 8 bytes of a name ("%8.8s "), and a CPU without brackets ("%3d "),
# which only its width distinguishes from a thread ("%5d " up to 6.5, "%7d " later).
PERF_LATENCY: Final = re.compile(
    r"^(?:(?P<comm>.{8}) )?"
    r"(?:(?: *+(?P<tgid>\d{1,9})/|(?=[ \d]{5}) *+)(?P<tid>\d{1,9})(?(tgid) {0,4}?) )?"
    rf"(?=  \d | \d\d |\d{{3,4}} ) *+(?P<cpu>\d{{1,4}}) ++{_PERF_TIME}",
    re.ASCII,
)
# perf's records other than samples, printed by --show-task-events and similar options; some have
# no time.
SIDEBAND: Final = re.compile(r"^PERF_RECORD_\w+", re.ASCII)
# Arguments of a probe or a KVM tracepoint, not preceded by the name of the event.
NAMELESS: Final = re.compile(r"^(?:\(\w.*\)|vcpu \d|reason [A-Z])", re.ASCII)
_EVENT = re.compile(r"^(?P<event><[^>]*>|[\w.:-]*?\w):(?:\s++(?P<args>.*)|$)", re.DOTALL | re.ASCII)
_PERF_EVENT = re.compile(
    r"^(?P<event>[\w./-]++(?::[\w./-]++)?):(?:\s++(?P<args>.*)|$)", re.DOTALL | re.ASCII
)

LOST: Final = re.compile(
    rf"^\s*(?:\S+:\s+)?CPU:{_CPU} \[(?:LOST )?(?:{_N} )?EVENTS(?: DROPPED)?\]\s*$"
)
_PERF_LOST = re.compile(rf"PERF_RECORD_LOST(?:_SAMPLES)? lost {_N}")
# Lines in which tools describe the recording: trace-cmd's header, perf's comments.
HEADER: Final = re.compile(
    r"^(?:#|\s*+(?:$|cpus=\d+\s*$|version = \d+\s*$|CPU \d+ is empty\s*$|trace-cmd version ))"
)
CALLCHAIN: Final = re.compile(
    r"^(?:\s++(?:[0-9a-f]{4,16} (?>.*?\().*\)|=> .*+)"
    r"|\s*+[0-9a-f]{8,16}\s++\S++|.*: <stack trace>)\s*$"
)
QUOTE: Final = re.compile(r"^(?:> ?)+")
WITHOUT_EVENT: Final = (HEADER, LOST, NO_CONTEXT, NO_PAYLOAD)
"""Patterns of lines without an event by which a text is recognised as ftrace."""


# The registry of line formats.  A line has the format of the first row that it matches.
LINE_FORMATS: Final = (
    LineFormat("ftrace", (_FTRACE_FIXED, FTRACE), _EVENT, ("ftrace-latency", "perf-script")),
    LineFormat("ftrace-latency", (LATENCY,), _EVENT, ("ftrace",)),
    LineFormat("ftrace-verbose", (VERBOSE,), _EVENT, ("ftrace",)),
    LineFormat("perf-script", (PERF_LATENCY, PERF), _PERF_EVENT, ("ftrace",)),
)
# Unit, in ns, of the number before the point of a timestamp, by the name of its group.
UNITS: Final = {"sec": 1_000_000_000, "ms": 1_000_000, "us": 1000}


def formats_of(name: str) -> tuple[LineFormat, ...]:
    """Return the formats that lines of an input in format ``name`` may have, likeliest first."""
    rows = {row.name: row for row in LINE_FORMATS}
    return (rows[name], *(rows[other] for other in rows[name].others))


def match_prefix(
    line: str, formats: Iterable[LineFormat]
) -> tuple[LineFormat, re.Match[str]] | None:
    """Return the first format that a line matches, with the match; None if it matches none."""
    for row in formats:
        for pattern in row.patterns:
            found = pattern.match(line)
            if found is not None:
                return row, found
    return None


def prefix_of(row: LineFormat, found: re.Match[str]) -> LinePrefix:
    """Return the fields of a prefix, with the event after it, from a match of ``match_prefix``."""
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
    """Read the prefix of a line in the first format that it matches; None if it matches none."""
    made = match_prefix(line, formats)
    return None if made is None else prefix_of(*made)


# "one:        CPU 0/KVM-100     [000] ...": trace-cmd report of several instances.
_INSTANCE: Final = re.compile(
    r"^(?:(?P<name>[^\s:]{1,255}):)?[^\S\n]+\S[^\n\[]{0,60}-\d{1,9} [^\n\[]{0,40}\[\d{1,4}\]",
    re.MULTILINE | re.ASCII,
)


def count_instances(text: str) -> int:
    """Return the number of tracefs instances that the first lines of a text name, at least 1.

    Lines without a name come from the top instance.
    """
    return max(1, len({found["name"] for found in _INSTANCE.finditer(text)}))


def lost_of(line: str) -> Lost | None:
    """Read a marker of lost events as tracefs or trace-cmd prints it; None for other lines."""
    found = LOST.match(line)
    if found is None:
        return None
    return Lost(int(found["cpu"]), int(found["n"]) if found["n"] else None)


def perf_lost_of(head: LinePrefix) -> Lost | None:
    """Read perf's marker of lost events, which looks like arguments without an event name."""
    found = _PERF_LOST.match(head.args) if head.event == "" else None
    return None if found is None else Lost(head.cpu, int(found["n"]))


NAME_WIDTHS: Final = {"task": 16, "comm": 16, "short": 8}
"""Width of the field of a thread's name, by group: "%16s-%-7d" (Linux kernel/trace/trace_output.c,
trace_print_context; trace-cmd), "%16s " (perf, builtin-script.c), "%8.8s-" (latency format)."""
_MOST_NAME: Final = 15
_BLANK: Final = re.compile(r"\s")


def _comm(groups: Mapping[str, str | None]) -> str:
    """Return the name of the thread; of a longer text only its own columns.

    The name of an instance, "rig: ", or a decoration of lines may be before them.  A name has at
    most 15 bytes (TASK_COMM_LEN, Linux include/linux/sched.h), so its field begins with a blank;
    where it does not, blanks were lost, and the name is unknown.  Only a single word may be longer:
    names of Android, and of workers, which perf reads from /proc (kernel/workqueue.c).
    """
    for group, width in NAME_WIDTHS.items():
        text = groups.get(group)
        if text:
            is_instance = text[:-width].rstrip().endswith(":")
            is_word = width < _MOST_NAME or not _BLANK.search(text)
            is_name = len(text) <= width or (is_word and not is_instance)
            return text if is_name else name_field(text, width, is_instance)
    return ""


def name_field(text: str, width: int, is_instance: bool = False) -> str:
    """Return the last columns of a text; "" if they cannot be the field of a thread's name."""
    field = text[-width:]
    is_whole = is_instance or width < _MOST_NAME or field.startswith(" ")
    return field if is_whole else ""


def _stamp(groups: Mapping[str, str | None]) -> tuple[int, str]:
    """Return seconds and the digits after the point; for an integer clock, ticks and ""."""
    frac = groups.get("frac") or ""
    if text := groups.get("sec"):
        return int(text), frac
    unit, n_digits = ("ms", 3) if "ms" in groups else ("us", 6)
    seconds, rest = divmod(int(groups[unit] or 0), 10**n_digits)
    return seconds, f"{rest:0{n_digits}}{frac}"


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else UNKNOWN
