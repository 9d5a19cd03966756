"""One line at a time: the general path, which reads every shape that is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.events.fields import Fields
from tdxtrace.ingest.events.registry import Event, EventRegistry, names_a_probe
from tdxtrace.ingest.raw import UNKNOWN, I32Array, I64Array, RawEvents
from tdxtrace.ingest.source import MAX_LINE_BYTES, matched_part
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.text import shapes
from tdxtrace.ingest.text.shapes import Head
from tdxtrace.tables.text import one_line

Splitter = Callable[[str], Head | None]

# Which shapes to try, likeliest first, for each format the front door names.
SPLITTERS: Final[Mapping[str, tuple[Splitter, ...]]] = {
    "ftrace": (shapes.split_ftrace, shapes.split_latency, shapes.split_perf),
    "ftrace-latency": (shapes.split_latency, shapes.split_ftrace),
    "ftrace-verbose": (shapes.split_verbose, shapes.split_ftrace),
    "perf-script": (shapes.split_perf, shapes.split_ftrace),
}
_INT64_MAX: Final = (1 << 63) - 1
_KVM_TABLES: Final = ("vm_entry", "page_fault", "host_event")


@dataclass(frozen=True, slots=True)
class Line:
    """One event line, read: its head, its stamp in ns and its fields."""

    number: int
    head: Head
    ts_ns: int
    event: int
    fields: Fields


@dataclass(slots=True)
class Quick:
    """Where and when lines were recorded that the fast path read, in their order."""

    line: I64Array
    cpu: I32Array
    ts_ns: I64Array
    _told: int = 0

    def take(self, upto: int | None) -> Quick:
        """Those before line ``upto`` (None: all) that were not taken yet."""
        end = len(self.line) if upto is None else int(np.searchsorted(self.line, upto))
        taken = slice(self._told, end)
        self._told = end
        return Quick(self.line[taken], self.cpu[taken], self.ts_ns[taken])


@dataclass(slots=True)
class LineReader:
    """Reads lines of one source into raw events, and counts the rest."""

    format: str
    registry: EventRegistry
    stats: SourceStats
    resolution_ns: int = 0
    """Finest step of the stamps seen; 0 until one was, 1 also for integer clocks."""
    has_integer_clock: bool = False
    quick: Quick | None = None
    """Lines of the same block that the fast path read: they are told in order with ours."""
    _seen: list[tuple[int, int, int]] = field(default_factory=list)

    def line(self, number: int, text: bytes) -> Line | None:
        """Read one line; None if it became no event, and is then accounted for."""
        is_whole = len(text) <= MAX_LINE_BYTES
        if not is_whole:
            text = matched_part(text)
        # latin-1 keeps bytes and columns apart; names are decoded when they are kept.
        line = text.decode("latin-1").rstrip("\r")
        if line.startswith(">"):
            line = shapes.QUOTE.sub("", line)
        if shapes.HEADER.match(line):
            self.stats.n_headers += 1
            return None
        head = self.head(line)
        if head is None:
            self._no_event(number, line)
            return None
        ts_ns = self._ts_ns(head)
        lost = shapes.perf_lost_of(head)
        if ts_ns > _INT64_MAX:
            self._no_event(number, line)
        elif lost is not None:
            self.tell_seen(number)
            self.stats.record_lost_events(lost.cpu, lost.n_events, number)
        else:
            self._seen.append((number, head.cpu, ts_ns))
            return self._event(number, head, ts_ns, is_whole)
        return None

    def head(self, line: str) -> Head | None:
        """Read the head of a line in the first of the format's shapes that fits."""
        for split in SPLITTERS[self.format]:
            head = split(line)
            if head is not None:
                return head
        return None

    def may_be_probe(self, name: str) -> bool:
        """Whether lines of this name should look like a probe's."""
        return names_a_probe(name, self.registry.mappings)

    def understood(self, event: Event, args: str) -> Fields | None:
        """Read the fields of an event's line; None if its table cannot do with them."""
        fields = event.decode(args)
        if event.kind in _KVM_TABLES and not fields.values:
            return None
        return fields if all(slot in fields.values for slot in event.needs) else None

    def tell_seen(self, upto: int | None = None) -> None:
        """Let the stats know of the stamps of the lines before line ``upto``, in their order."""
        line, cpu, ts_ns = (np.array([seen[i] for seen in self._seen], np.int64) for i in range(3))
        self._seen = []
        if self.quick is not None:
            quick = self.quick.take(upto)
            order = np.argsort(np.concatenate([line, quick.line]), kind="stable")
            cpu = np.concatenate([cpu, quick.cpu])[order]
            ts_ns = np.concatenate([ts_ns, quick.ts_ns])[order]
        self.stats.observe_timestamps(cpu.astype(np.int32), ts_ns)

    def note_digits(self, digits: int) -> None:
        """Note how fine a stamp with so many digits after the point is."""
        if digits == 0:
            self.has_integer_clock = True
        step = 10 ** (9 - digits) if digits else 1
        self.resolution_ns = min(self.resolution_ns or step, step)

    def _no_event(self, number: int, line: str) -> None:
        lost = shapes.lost_of(line)
        sample = one_line(line.encode("latin-1").decode("utf-8", "replace"), 80)
        if lost is not None:
            self.tell_seen(number)
            self.stats.record_lost_events(lost.cpu, lost.n_events, number)
        elif shapes.CALLCHAIN.match(line):
            self.stats.count("callchain", "", number)
        elif shapes.NO_PAYLOAD.match(line):
            self.stats.count("no_payload", "", number)
        elif shapes.NO_CONTEXT.match(line):
            self.stats.count_sample("no_time", sample, number)
        else:
            self.stats.count_sample("unparsed", sample, number)

    def _ts_ns(self, head: Head) -> int:
        whole, digits = head.ts
        self.note_digits(min(len(digits), 9))
        return whole * 1_000_000_000 + int(digits[:9].ljust(9, "0")) if digits else whole

    def _event(self, number: int, head: Head, ts_ns: int, is_whole: bool) -> Line | None:
        index = self.registry.event_id(head.event or "(no event name)", head.args)
        event = self.registry.events[index]
        if event.kind in ("noise", "unmapped"):
            damaged = event.kind == "noise" and self.may_be_probe(event.name)
            self.stats.count("undecoded" if damaged else event.kind, event.name, number)
            return None
        if not is_whole:
            self.stats.count("overlong", event.name, number)
            return None
        fields = self.understood(event, head.args)
        if fields is None:
            self.stats.count("undecoded", event.name, number)
            return None
        self.stats.events[event.name] += 1
        comm = head.comm.encode("latin-1").decode("utf-8", "replace")
        self.stats.record_thread(head.tid, comm, head.tgid)
        return Line(number, head, ts_ns, index, fields)


def in_irq(flags: str) -> int:
    """1 in hard interrupt or NMI context, 0 elsewhere, UNKNOWN without flags.

    The third flag is the context: h, H, z and Z are hardirq, hardirq inside
    softirq and NMI (Linux kernel/trace/trace_output.c, trace_print_lat_fmt).
    uprobe events carry 0xff for all flags, so ``..ff`` tells nothing.
    """
    if len(flags) < 4 or flags.endswith("ff"):
        return UNKNOWN
    return int(flags[2] in "hHzZ")


def to_raw(lines: Sequence[Line]) -> RawEvents:
    """Put lines into columns."""
    names = sorted({slot for line in lines for slot in line.fields.values})
    n = len(lines)
    return RawEvents(
        np.fromiter((line.number for line in lines), np.int64, n),
        np.fromiter((line.ts_ns for line in lines), np.int64, n),
        np.fromiter((line.head.tid for line in lines), np.int32, n),
        np.fromiter((line.head.tgid for line in lines), np.int32, n),
        np.fromiter((line.head.cpu for line in lines), np.int32, n),
        np.fromiter((in_irq(line.head.flags) for line in lines), np.int8, n),
        np.fromiter((line.event for line in lines), np.int32, n),
        {
            name: np.fromiter((line.fields.values.get(name, 0) for line in lines), np.uint64, n)
            for name in names
        },
        {
            name: np.fromiter((name in line.fields.values for line in lines), np.bool_, n)
            for name in names
        },
    )
