"""What one line of ftrace, trace-cmd or perf text looks like, whatever wrote it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from tdxtrace.ingest.raw import UNKNOWN


@dataclass(frozen=True, slots=True)
class Head:
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
    args_at: int
    """Column of the line at which ``args`` begins."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A marker that says events were dropped: on which CPU, and how many if known."""

    cpu: int
    n_events: int | None


# Longer numbers are no numbers of Linux: a thread has at most 7 digits (PID_MAX_LIMIT,
# include/linux/threads.h), a CPU 4 (NR_CPUS, arch/x86/Kconfig); 19 digits are less than 2**64.
_TID = r"(?P<tid>\d{1,9})"
_CPU = r"(?P<cpu>\d{1,4})"
_N = r"(?P<n>\d{1,19})"

# The kernel prints a name right-aligned in 16 columns ("%16s-%-7d", Linux
# kernel/trace/trace_output.c, trace_print_context), so its '-' stands in column
# 16 whatever the name holds.  Only tools that cut or pad differently need the
# second, leftmost match.
_TASK = rf"(?P<comm>.{{16}}|.+?|(?<=\s))-{_TID}\s++"
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
BUFFER_START: Final = re.compile(rf"^#+ CPU {_CPU} buffer started #+\s*$")
# Lines of tools that describe the recording: trace-cmd's head, perf's comments.
HEADER: Final = re.compile(
    r"^(?:#|\s*$|cpus=\d+\s*$|version = \d+\s*$|CPU \d+ is empty\s*$|trace-cmd version )"
)
CALLCHAIN: Final = re.compile(
    r"^(?:\s++(?:[0-9a-f]{4,16} (?>.*?\().*\)|=> .*+)"
    r"|\s*+[0-9a-f]{8,16}\s++\S++|.*: <stack trace>)\s*$"
)
QUOTE: Final = re.compile(r"^(?:> ?)+")


def split_ftrace(line: str) -> Head | None:
    """Read a line of the tracefs ``trace`` file, ``trace_pipe`` or trace-cmd report."""
    found = _FTRACE_FIXED.match(line) or FTRACE.match(line)
    if found is None:
        return None
    comm = found["comm"]
    # trace-cmd names the instance of every line: "rig: " before the 16 columns.
    if len(comm) > 16 and comm[:-16].rstrip().endswith(":"):
        comm = comm[-16:]
    tgid = found["tgid"]
    return _head(
        found,
        comm.strip(" \t"),
        _digits(tgid),
        found["flags"] or "",
        (int(found["sec"]), found["frac"]),
    )


def split_latency(line: str) -> Head | None:
    """Read a line in latency format: tracefs option ``latency-format``, ``report -l``."""
    found = LATENCY.match(line)
    if found is None:
        return None
    if found["us"]:
        seconds, micros = divmod(int(found["us"]), 1_000_000)
        stamp: tuple[int, str | None] = (seconds, f"{micros:06}")
    else:
        stamp = (int(found["sec"]), found["frac"])
    return _head(found, found["comm"], UNKNOWN, found["flags"], stamp)


def split_verbose(line: str) -> Head | None:
    """Read a line of latency format with the ``verbose`` option."""
    found = VERBOSE.match(line)
    if found is None:
        return None
    seconds, millis = divmod(int(found["ms"]), 1000)
    return _head(found, found["comm"] or "", UNKNOWN, "", (seconds, f"{millis:03}{found['frac']}"))


def split_perf(line: str) -> Head | None:
    """Read an event line of perf script, with whatever -F left of it."""
    found = PERF.match(line)
    if found is None:
        return None
    event = _PERF_EVENT.match(found["rest"])
    name, args, at = ("", found["rest"], 0) if event is None else _event_parts(event)
    return Head(
        (found["comm"] or "").strip(" \t"),
        _digits(found["tid"]),
        _digits(found["tgid"]),
        _digits(found["cpu"]),
        found["flags"] or "",
        (int(found["sec"]), found["frac"] or ""),
        name,
        args,
        found.start("rest") + at,
    )


def lost_of(line: str) -> Lost | None:
    """Read a marker of lost events in the words of tracefs or trace-cmd."""
    found = LOST.match(line)
    if found is None:
        return None
    return Lost(int(found["cpu"]), int(found["n"]) if found["n"] else None)


def perf_lost_of(head: Head) -> Lost | None:
    """Read perf's marker, which looks like an event without a group."""
    found = _PERF_LOST.match(head.args) if head.event == "" else None
    return None if found is None else Lost(head.cpu, int(found["n"]))


def _event_parts(found: re.Match[str]) -> tuple[str, str, int]:
    args = found["args"]
    return found["event"], args or "", found.start("args") if args is not None else found.end()


def _head(
    found: re.Match[str], comm: str, tgid: int, flags: str, stamp: tuple[int, str | None]
) -> Head:
    rest = found["rest"]
    event = _EVENT.match(rest)
    name, args, at = ("", rest, 0) if event is None else _event_parts(event)
    return Head(
        comm,
        int(found["tid"]),
        tgid,
        int(found["cpu"]),
        flags,
        (stamp[0], stamp[1] or ""),
        name,
        args,
        found.start("rest") + at,
    )


def _digits(text: str | None) -> int:
    return int(text) if text and text.lstrip("-").isdigit() and text[0] != "-" else UNKNOWN
