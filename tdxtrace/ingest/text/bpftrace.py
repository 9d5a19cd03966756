"""Reader of bpftrace output about SEAMCALLs: printf lines of any form, plain or as JSON.

A line begins with the name of a function or leaf, followed by its arguments as pairs, as in the
program that edgelesssys/contrast documents: ``TDH_MEM_PAGE_ADD gpa=0x1000``.  A timestamp in
nanoseconds (``nsecs``) may precede it.  Where none is printed, only the order of lines is known:
the line number is used as the timestamp, and the clock is called ``order``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.batch import UNKNOWN, FieldLayouts, RecordBatch
from tdxtrace.ingest.events import fields
from tdxtrace.ingest.events.registry import KEYS, Event, EventRegistry, function_named
from tdxtrace.ingest.source import MAX_LINE_BYTES, Block, matched_part
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.text import line_formats
from tdxtrace.ingest.text.line_formats import LinePrefix
from tdxtrace.ingest.text.reader import Line, batches_by_line
from tdxtrace.tables.text import one_line
from tdxtrace.tdx import wrappers

# A name as in the kernel (tdh_mem_page_add) or the module (TDH.MEM.PAGE.ADD), then pairs.
_LINE: Final = re.compile(
    r"^\s*+(?:(?P<ns>\d{10,19})[ :,]\s*+)?(?P<name>(?:tdh|__seamcall)[\w.]*+)"
    r"(?:$|:?\s++(?!failed\b)(?=\w++[=:])|\((?=\w++[=:]))(?P<args>.*)$",
    re.IGNORECASE | re.ASCII,
)
# "gpa: 0x1000" is printed as often as "gpa=0x1000".
_COLON: Final = re.compile(r"(?<=\w):\s?+(?=\w)", re.ASCII)
_THREAD: Final = re.compile(r"\b(?P<key>tid|pid|cpu)=(?P<n>\d{1,9})\b", re.ASCII)
_RETURN_WORDS: Final = frozenset("exit ret return returned retval end done".split())
_LOST: Final = re.compile(
    r'^(?:Lost |\{"type": ?"lost_events", ?"data": ?\{"events": ?)(?P<n>\d{1,18})\b', re.ASCII
)
_HEADER: Final = re.compile(r"^\s*$|^Attach(?:ing|ed)\b", re.ASCII)
# Types in bpftrace's JSON (src/output.cpp, JsonOutput) that hold text printed by the program.
_TEXT_KINDS: Final = ("printf", "cat", "join")


def is_line(line: str) -> bool:
    """Return whether a line is a printf that names a SEAMCALL, plain or in bpftrace's JSON."""
    if line.startswith("{"):
        return any(is_line(text) for text in _texts_of(line) or ())
    found = _LINE.match(line)
    return found is not None and function_named(found["name"]) is not None


def _texts_of(line: str) -> list[str] | None:
    """Return the printed lines in an object of bpftrace's JSON; None for any other text."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("type"), str) or "data" not in said:
        return None
    is_text = said["type"] in _TEXT_KINDS and isinstance(said["data"], str)
    return said["data"].splitlines() if is_text else []


@dataclass(slots=True)
class BpftraceReader:
    """Reads lines of one source into raw events, and counts all other lines."""

    registry: EventRegistry
    stats: SourceStats
    layouts: FieldLayouts = field(default_factory=FieldLayouts)
    resolution_ns: int = 1
    _is_timed: bool | None = None
    """Whether the first call has a timestamp; None before it was read."""

    @property
    def clock(self) -> str:
        """Kind of clock, after lines were read: ``unnamed``, or ``order`` without timestamps."""
        return "unnamed" if self._is_timed else "order"

    def batches(self, blocks: Iterable[Block]) -> Iterator[RecordBatch]:
        """Yield one batch with the calls of each block of whole lines."""
        return batches_by_line(blocks, self.line, self.stats, self.layouts)

    def line(self, number: int, text: bytes) -> Line | None:
        """Read one line; None if it yields no event, in which case it is counted in the stats."""
        line = line_formats.QUOTE.sub("", matched_part(text).decode("utf-8", "replace")).rstrip(
            "\r"
        )
        if len(text) > MAX_LINE_BYTES:
            self.stats.count_sample("overlong", one_line(line, 80), number)
            return None
        texts = _texts_of(line) if line.startswith("{") else [line]
        if texts is None:
            self.stats.count_sample("unparsed", one_line(line, 80), number)
            return None
        called = [text for text in texts if is_line(text)]
        if len(called) == 1:
            return self._call(number, called[0])
        lost = _LOST.search(line)
        if lost is not None:
            self.stats.record_lost_events(UNKNOWN, int(lost["n"]), number)
        elif _HEADER.match(line) or (line.startswith("{") and not texts):
            self.stats.n_headers += 1
        elif called:
            self.stats.count_sample("undecoded", "several calls in one printf", number)
        else:
            self.stats.count("noise", "other lines of the program", number)
        return None

    def _call(self, number: int, line: str) -> Line | None:
        found = _LINE.match(line)
        name = None if found is None else function_named(found["name"])
        if found is None or name is None:
            return None
        args = _COLON.sub("=", found["args"])
        read = fields.pairs(args.replace(",", " ").rstrip(")"), KEYS)
        is_return = "status" in read.values or not _RETURN_WORDS.isdisjoint(
            re.split(r"[._]", found["name"].lower())
        )
        if is_return and "status" not in read.values:
            self.stats.count("undecoded", f"{name} without a status", number)
            return None
        if self._is_timed is None:
            self._is_timed = found["ns"] is not None
        if self._is_timed and found["ns"] is None:
            self.stats.count_sample("no_time", one_line(line, 80), number)
            return None
        ts_ns = int(found["ns"]) if self._is_timed else number
        if ts_ns >= 1 << 63:
            self.stats.count_sample("unparsed", one_line(line, 80), number)
            return None
        place = {key: int(n) for key, n in _THREAD.findall(args)}
        cpu = place.get("cpu", UNKNOWN) if place.get("cpu", 0) < 1 << 13 else UNKNOWN
        self.stats.observe_timestamps(np.array([cpu], np.int32), np.array([ts_ns], np.int64))
        event = self.registry.add(_event(name, is_return))
        self.stats.events[name] += 1
        tid = place.get("tid", UNKNOWN)
        self.stats.record_thread(tid, "", place.get("pid", UNKNOWN))
        prefix = LinePrefix("", tid, place.get("pid", UNKNOWN), cpu, "", (0, ""), name, args)
        return Line(number, prefix, ts_ns, event, read)


def _event(function: str, is_return: bool) -> Event:
    return Event(
        f"{function} ({'return' if is_return else 'entry'})",
        "call",
        "return" if is_return else "entry",
        function,
        wrappers.leaf_of(function),
    )
