"""Reader of function_graph output: a tree of calls with arguments and return values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.batch import UNKNOWN, FieldLayouts, RecordBatch
from tdxtrace.ingest.events import fields
from tdxtrace.ingest.events.fields import Fields
from tdxtrace.ingest.events.registry import KEYS, Event, EventRegistry, Role, functions
from tdxtrace.ingest.source import MAX_LINE_BYTES, Block, matched_part
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.text import line_formats
from tdxtrace.ingest.text.line_formats import LinePrefix
from tdxtrace.ingest.text.reader import Line, batches_by_line
from tdxtrace.tables.text import one_line
from tdxtrace.tdx import wrappers

# Columns, each an option: absolute time (funcgraph-abstime), CPU, task
# (funcgraph-proc), flags (latency-format), duration, then the tree.  Linux
# kernel/trace/trace_functions_graph.c, print_graph_prologue, print_graph_duration.  Without the
# option funcgraph-duration there is no bar before the tree: then the line must have a time.
# A duration has 7 digits at most: from 10 ms on fewer than 3 after the point, from 1 s on none.
LINE: Final = re.compile(
    r"^\s*+(?:(?P<sec>\d{1,10})\.(?P<frac>\d{6})\s*+\|\s*+)?(?P<cpu>\d{1,4})\)\s*+"
    r"(?:(?P<comm>\S.*?)-(?P<tid>\d{1,9})\s*+\|\s*+)?"
    r"(?:(?P<flags>[.a-zA-Z][.a-zA-Z0-9]{3,4})\s*+\|)?"
    r"(?:\s*+[$@*#!+]?\s*+(?:(?P<us>\d{1,12})(?:\.(?P<ns>\d{1,3}))? us)?\s*+\|\s|(?(sec)|(?!)))"
    r"(?P<body>.*)"
)
_CALL: Final = re.compile(
    r"^\s*(?P<function>[A-Za-z_][\w.]*)(?: \[\w+\])?\((?P<args>.*?)\)\s*(?P<end>;|\{)"
    r"\s*(?:/\*(?P<note>.*)\*/)?"
)
_END: Final = re.compile(
    r"^\s*+\}(?:\s*+/\*\s*+(?P<function>(?!ret=)[A-Za-z_][\w.]*+)?+(?P<note>.*)\*/)?+\s*$"
)
# 6.5 to 6.12 print "= VALUE", later kernels "ret=VALUE".
_RETURNED: Final = re.compile(r"(?:\bret=|= )(?P<n>-?(?:0x)?[0-9a-f]+)\b")
_SWITCH: Final = re.compile(
    r"^(?=.*-\d{1,9}\s*$)\s*+(?P<cpu>\d{1,4})\)\s++(?P<from>\S.*?)-\d++\s++=>\s++"
    r"(?P<comm>\S.*?)-(?P<tid>\d{1,9})\s*$"
)
# Largest call depth that the tracer follows: Linux include/linux/ftrace.h, FTRACE_RETFUNC_DEPTH.
_MAX_OPEN: Final = 50
# Separator lines, and the report that no call was skipped (funcgraph-overrun).
_RULE: Final = re.compile(r"^\s*-{5,}\s*$|^[^|]*[=<]={5,}[=>]|^ *\(Overruns: 0\)\s*$")


@dataclass(slots=True)
class GraphReader:
    """Reads function_graph lines of one source into raw events, and counts all other lines."""

    registry: EventRegistry
    stats: SourceStats
    layouts: FieldLayouts = field(default_factory=FieldLayouts)
    resolution_ns: int = 1000
    """Resolution of the timestamps (Linux print_graph_abs_time: whole microseconds).

    Durations have nanoseconds, but calls are compared by their timestamps: the clock cannot show
    a shorter overlap."""
    has_integer_clock: bool = False
    _running: dict[int, tuple[str, int]] = field(default_factory=dict)
    _open: dict[tuple[int, int], list[tuple[int, str]]] = field(default_factory=dict)
    """By CPU and thread: indentation and name of each open function, outermost first."""

    def batches(self, blocks: Iterable[Block]) -> Iterator[RecordBatch]:
        """Yield one batch with the calls of each block of whole lines."""
        return batches_by_line(blocks, self.line, self.stats, self.layouts)

    def line(self, number: int, text: bytes) -> Line | None:
        """Read one line; None if it yields no event, in which case it is counted in the stats."""
        line = matched_part(text).decode("utf-8", "replace").rstrip("\r")
        switch = _SWITCH.match(line)
        if switch is not None:
            self._running[int(switch["cpu"])] = switch["comm"], int(switch["tid"])
        if switch is not None or line_formats.HEADER.match(line) or _RULE.match(line):
            self.stats.n_headers += 1
            return None
        found = LINE.match(line)
        if found is not None:
            if len(text) <= MAX_LINE_BYTES:
                return self._body(number, found)
            self._count_overlong(number, found["body"])
            return None
        lost = line_formats.lost_of(line)
        if lost is not None:
            self.stats.record_lost_events(lost.cpu, lost.n_events, number)
            self._open.clear()
        else:
            self.stats.count_sample("unparsed", one_line(line, 80), number)
        return None

    def _count_overlong(self, number: int, body: str) -> None:
        """Count a call that is too long to be read, by the name at its beginning."""
        function = body.strip().partition("(")[0]
        kind = ("overlong", function) if function in functions() else ("noise", "function_graph")
        self.stats.count(*kind, number)

    def _body(self, number: int, found: re.Match[str]) -> Line | None:
        call = _CALL.match(found["body"])
        end = _END.match(found["body"]) if call is None else None
        function = self._function(found, call, end)
        if function not in functions():
            self.stats.count("noise", "function_graph", number)
            return None
        if found["sec"] is None:
            self.stats.count("no_abstime", "function_graph", number)
            return None
        ts_ns = int(found["sec"]) * 1_000_000_000 + int(found["frac"]) * 1000
        cpu = int(found["cpu"])
        self.stats.observe_timestamps(np.array([cpu], np.int32), np.array([ts_ns], np.int64))
        values = _values(call, end)
        role: Role = "return" if call is None else "single" if call["end"] == ";" else "entry"
        if role == "single" and found["us"] is None:
            # The timestamp is that of the entry: without a duration the return has no time.
            self.stats.count("undecoded", f"{function} without funcgraph-duration", number)
            return None
        if role == "single":
            duration = int(found["us"]) * 1000 + int((found["ns"] or "").ljust(3, "0"))
            values.values["duration_ns"] = duration
            ts_ns += duration
        if role != "entry" and "status" not in values.values:
            self.stats.count("undecoded", f"{function} without ret=", number)
            return None
        return self._made(number, found, function, role, ts_ns, values)

    def _function(
        self, found: re.Match[str], call: re.Match[str] | None, end: re.Match[str] | None
    ) -> str | None:
        """Return the function of a line; for a brace without a name, the function that it closes.

        Without funcgraph-tail a brace stands alone, with the indentation of the function that it
        closes.  If no open function has that indentation, lines were lost: the result is None.
        """
        cpu = int(found["cpu"])
        tid = int(found["tid"]) if found["tid"] else self._running.get(cpu, ("", UNKNOWN))[1]
        below = self._open.setdefault((cpu, tid), [])
        indent = len(found["body"]) - len(found["body"].lstrip())
        while below and below[-1][0] > indent:
            below.pop()
        closed = below.pop()[1] if end is not None and below and below[-1][0] == indent else None
        if call is None:
            return closed if end is None or end["function"] is None else end["function"]
        if call["end"] == "{":
            del below[_MAX_OPEN:]
            below.append((indent, call["function"]))
        return call["function"]

    def _made(
        self,
        number: int,
        found: re.Match[str],
        function: str,
        role: Role,
        ts_ns: int,
        values: Fields,
    ) -> Line:
        cpu = int(found["cpu"])
        comm, tid = self._running.get(cpu, ("", UNKNOWN))
        if found["tid"]:
            comm, tid = self._running[cpu] = found["comm"], int(found["tid"])
        index = self.registry.add(_event(function, role))
        self.stats.events[function] += 1
        self.stats.record_thread(tid, comm, UNKNOWN)
        head = LinePrefix(comm, tid, UNKNOWN, cpu, found["flags"] or "", (0, ""), function, "")
        return Line(number, head, ts_ns, index, values)


def _event(function: str, role: Role) -> Event:
    # A call printed on one line is complete: it must not be paired with the entry of another call.
    return Event(
        f"{function}() {role}",
        "call",
        "entry" if role == "entry" else "return",
        f"{function};" if role == "single" else function,
        wrappers.leaf_of(function),
        "function_graph",
    )


def _values(call: re.Match[str] | None, end: re.Match[str] | None) -> Fields:
    made = Fields()
    if call is not None:
        made.values |= fields.pairs(call["args"].replace(", ", " "), KEYS).values
        made.values.pop("status", None)
    note = (call or end or {"note": None})["note"]
    returned = _RETURNED.search(note or "")
    if returned is not None:
        word = fields.to_word(returned["n"])
        if word is not None:
            made.values["status"] = word
    return made
