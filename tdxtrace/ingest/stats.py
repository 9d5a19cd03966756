"""Statistics and provenance of one input: lines, events, losses, threads; kernel, tool, clock."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.ingest.batch import MAX_CPUS, UNKNOWN, I32Array, I64Array
from tdxtrace.tables.events import LOSSES, THREADS
from tdxtrace.tables.formats import format_named
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Source, agreement

_INT64: Final = np.iinfo(np.int64)
# PID_MAX_LIMIT of a 64-bit kernel: Linux include/linux/threads.h.
USUAL_TIDS: Final = 4 << 20

# Of a loss that is not named here: "error".
_SEVERITY: Final = {
    **dict.fromkeys("noise callchain merged joined unpaired_entry unpaired_return".split(), "info"),
    **dict.fromkeys(
        "unmapped started_midway lost_events overwritten buffer_full truncated damaged unread "
        "sampled excluded throttled suppressed no_thread changed_while_read".split(),
        "data_loss",
    ),
}
_ADVICE: Final = {
    "noise": "none needed; record only the tdx and kvm events to make the file smaller",
    "callchain": "none needed; record without -g to make the file smaller",
    "merged": "none needed; the inner SEAMCALLs are the attempts, the wrapper named the request",
    "unmapped": "name its function: --map EVENT=FUNCTION, e.g. --map {name}=tdh_mem_page_remove",
    "started_midway": "switch tracing on before the TD starts, or ignore each thread's first chain",
    "unpaired_entry": "calls with an entry only: the return probe missed them",
    "unpaired_return": "calls with a return only; probe the entry too, or fetch $argN",
    "lost_events": "use a larger buffer (buffer_size_kb, -b, -m) or record fewer events",
    "overwritten": "use a larger buffer_size_kb, or read trace_pipe while recording",
    "buffer_full": "use a larger buffer_size_kb; with overwrite off the newest events are dropped",
    "damaged": "parts of the file cannot be what the kernel wrote; copy it again",
    "sampled": "perf kept only some of the events; {name}",
    "excluded": "perf was set to exclude events of the kernel or of user space; {name}",
    "throttled": "perf stopped recording for a tick; raise kernel.perf_event_max_sample_rate",
    "unknown_record": "a record of a newer perf; if it holds events, please report its type",
    "unread": "these events were still in the kernel; stop tracing before the recorder ends",
    "truncated": "the input ends early; copy it again whole",
    "changed_while_read": "it was written while it was read; read it when its recorder has ended",
    "unparsed": "not a line of ftrace, trace-cmd or perf text; if it is, please report its shape",
    "undecoded": "the event's fields are missing or of another kernel; please report the line",
    "overlong": "longer than a line of the kernel can be; if it is one, please report it",
    "no_payload": "the 'raw' trace option drops the fields; switch it off: echo 0 > options/raw",
    "no_abstime": "switch absolute time on: echo 1 > options/funcgraph-abstime",
    "suppressed": "the kernel's rate limit: counts of messages are lower bounds; probe the calls",
    "no_thread": "threads are not printed: calls that overlap are not paired; print them: -F +tid",
    "joined": "none needed; lines that a mailer wrapped were joined again",
    "wrapped": "lines are wrapped and parts are missing; send the file as an attachment",
    "no_event": "the names of events are not printed; print them: -F +event",
    "no_time": "switch context back on: echo 1 > options/context-info",
}

OF_AMD: Final = "(AMD, not Intel)"
"""End of the description of an exit reason that only AMD processors have."""

# Values that are not known, each with a loss of its own.
_MAX_UNKNOWN: Final = 64


@dataclass(slots=True)
class Loss:
    """One row of ``losses``, counted so far."""

    kind: str
    detail: str = ""
    line_no: int | None = None
    cpu: int = UNKNOWN
    start_ns: int | None = None
    end_ns: int | None = None
    n_events: int | None = 0
    n_lines: int = 0


@dataclass(slots=True)
class SourceStats:
    """Statistics of one source, filled batch by batch."""

    n_lines: int = 0
    """Lines or records."""
    n_headers: int = 0
    n_buffers: int = 1
    """Buffers of the recording: one, unless it is of several instances of tracefs."""
    events: Counter[str] = field(default_factory=Counter)
    """Events that became rows, by name."""
    entries: dict[tuple[str, str], Loss] = field(default_factory=dict)
    """Lines that became no row, by kind and detail."""
    gaps: list[Loss] = field(default_factory=list)
    """Losses that no line stands for, and lost events."""
    threads: dict[tuple[int, str], int] = field(default_factory=dict)
    """Process (tgid) of each thread, by tid and name."""
    first_ns: I64Array = field(default_factory=lambda: np.full(MAX_CPUS + 1, _INT64.max))
    """First timestamp by CPU; at UNKNOWN that of all."""
    last_ns: I64Array = field(default_factory=lambda: np.full(MAX_CPUS + 1, _INT64.min))
    """Last timestamp by CPU; at UNKNOWN that of all."""
    _open_gaps: dict[int, list[Loss]] = field(default_factory=dict)
    """Gaps without an end, by CPU."""
    _without_thread: Loss | None = None
    _unknown: dict[str, Loss] = field(default_factory=dict)

    def reset(self) -> None:
        """Reset the counters of a running trace once they were handed over; timestamps are kept."""
        self.gaps.clear()
        self.entries.clear()
        self.threads.clear()
        self.events.clear()
        self._open_gaps.clear()
        self._unknown.clear()
        self._without_thread = None

    def count(self, kind: str, detail: str, line_no: int | None, n: int = 1) -> None:
        """Count ``n`` lines of a kind that become no row; ``line_no`` is the first of them."""
        entry = self.entries.setdefault((kind, detail), Loss(kind, detail, line_no))
        if line_no is not None and entry.line_no is not None:
            entry.line_no = min(entry.line_no, line_no)
        entry.n_lines += n
        entry.n_events = (entry.n_events or 0) + n

    def count_sample(self, kind: str, sample: str, line_no: int, n_lines: int = 1) -> None:
        """Count lines of a kind, of one event; its detail is the text of the first such event."""
        entry = self.entries.setdefault((kind, ""), Loss(kind, sample, line_no))
        entry.n_lines += n_lines
        entry.n_events = (entry.n_events or 0) + 1

    def record_thread(self, tid: int, comm: str, tgid: int) -> None:
        """Record the name of a thread, and its process if ``tgid`` is not UNKNOWN.

        A tid that was used again has the later process: the kernel assigns numbers in ascending
        order (alloc_pid, kernel/pid.c).
        """
        self.threads[tid, comm] = max(tgid, self.threads.get((tid, comm), UNKNOWN))

    def record_loss(
        self, kind: str, n_events: int | None, detail: str = "", **location: int | None
    ) -> None:
        """Record a loss that no line of the input reports, unless ``n_events`` is 0."""
        if n_events is None or n_events > 0:
            self.gaps.append(Loss(kind, detail, n_events=n_events, **location))  # type: ignore[arg-type]

    def record_lost_events(self, cpu: int, n_events: int | None, line_no: int) -> None:
        """Record a line that reports lost events; the gap ends at the next event of its CPU."""
        before = self.last_ns[min(cpu, MAX_CPUS)]
        start = int(before) if before != _INT64.min else None
        gap = Loss("lost_events", "", line_no, cpu, start, None, n_events, 1)
        self.gaps.append(gap)
        self._open_gaps.setdefault(cpu, []).append(gap)

    def record_unknown(self, value: str, line_no: int, n: int = 1) -> None:
        """Record a value of ``n`` rows that is not known and null there: "exit reason EXIT_NPF"."""
        detail = one_line(value, 60)
        gap = self._unknown.get(detail)
        if gap is None:
            if len(self._unknown) >= _MAX_UNKNOWN:
                detail = "other values"
            gap = self._unknown.setdefault(detail, Loss("undecoded", detail, line_no))
        gap.n_events = (gap.n_events or 0) + n

    def record_without_thread(self, tid: I32Array, ts_ns: I64Array) -> None:
        """Record events whose thread is not known: one loss from the first to the last of them."""
        times = ts_ns[tid == UNKNOWN]
        if not len(times):
            return
        first, last = int(times.min()), int(times.max())
        if self._without_thread is None:
            self._without_thread = Loss("no_thread", "", start_ns=first, end_ns=last)
            self.gaps.append(self._without_thread)
        gap = self._without_thread
        gap.start_ns, gap.end_ns = min(gap.start_ns or first, first), max(gap.end_ns or 0, last)
        gap.n_events = (gap.n_events or 0) + len(times)

    def record_damage(self, n_damaged: int) -> None:
        """Record the number of damaged pages of a recording."""
        self.record_loss("damaged", None if n_damaged else 0, f"{n_damaged} pages")

    def record_gap(
        self,
        cpu: int,
        n_events: int | None,
        line_no: int | None,
        start_ns: int | None,
        end_ns: int | None,
    ) -> None:
        """Record events lost on a CPU between two times; ``line_no`` is the first record after."""
        self.gaps.append(Loss("lost_events", "", line_no, cpu, start_ns, end_ns, n_events))

    def extend_cpu_span(self, cpu: int, first_ns: int, last_ns: int) -> None:
        """Extend the time in which a CPU recorded; UNKNOWN represents a CPU that is not printed."""
        for index in (min(cpu, MAX_CPUS), UNKNOWN):
            self.first_ns[index] = min(int(self.first_ns[index]), first_ns)
            self.last_ns[index] = max(int(self.last_ns[index]), last_ns)

    def observe_timestamps(self, cpu: I32Array, ts_ns: I64Array) -> None:
        """Extend the time in which each CPU recorded, by events in order; end its open gaps."""
        if not len(cpu):
            return
        if self._open_gaps:
            self._close_gaps(cpu, ts_ns)
        index = np.minimum(cpu, MAX_CPUS)
        if (ts_ns[1:] >= ts_ns[:-1]).all():
            # Of several values assigned to one index numpy keeps the last one.
            first, last = self.first_ns.copy(), self.last_ns.copy()
            first[index[::-1]], last[index] = ts_ns[::-1], ts_ns
            np.minimum(self.first_ns, first, out=self.first_ns)
            np.maximum(self.last_ns, last, out=self.last_ns)
        else:
            np.minimum.at(self.first_ns, index, ts_ns)
            np.maximum.at(self.last_ns, index, ts_ns)
        self.first_ns[UNKNOWN] = min(self.first_ns[UNKNOWN], ts_ns.min())
        self.last_ns[UNKNOWN] = max(self.last_ns[UNKNOWN], ts_ns.max())

    @property
    def has_open_gaps(self) -> bool:
        """Whether a gap waits for the next event of its CPU."""
        return bool(self._open_gaps)

    def _close_gaps(self, cpu: I32Array, ts_ns: I64Array) -> None:
        """End open gaps at the first timestamp of their CPU; of any CPU where theirs is unknown."""
        cpus, first = np.unique(cpu, return_index=True)
        for cpu_number, at in ((UNKNOWN, 0), *zip(cpus.tolist(), first.tolist(), strict=True)):
            for gap in self._open_gaps.pop(cpu_number, ()):
                gap.end_ns = int(ts_ns[at])

    def cpus(self) -> list[int]:
        """CPUs that recorded an event, in ascending order."""
        return [int(c) for c in np.flatnonzero(self.last_ns[:MAX_CPUS] != _INT64.min)]

    def span(self) -> tuple[int | None, int | None]:
        """Timestamps of the first and of the last event of any kind, in ns; None without events."""
        if self.last_ns[UNKNOWN] == _INT64.min:
            return None, None
        return int(self.first_ns[UNKNOWN]), int(self.last_ns[UNKNOWN])

    @property
    def has_amd_exits(self) -> bool:
        """Whether an exit reason of AMD processors was read."""
        return any(OF_AMD in reason for reason in self._unknown)

    def losses(self, source: int) -> pl.DataFrame:
        """Return the ``losses`` rows of this source."""
        # By line: readers count in blocks of any size, the decoder (without a line) at any time.
        by_line = sorted(self.entries.values(), key=lambda e: (e.line_no is None, e.line_no or 0))
        entries = [*self.gaps, *self._unknown.values(), *by_line]
        rows = [
            {
                "source": source,
                "line_no": e.line_no,
                "kind": e.kind,
                "severity": _SEVERITY.get(e.kind, "error"),
                "cpu": e.cpu if 0 <= e.cpu < MAX_CPUS else None,
                "start_ns": e.start_ns,
                "end_ns": e.end_ns,
                "n_events": e.n_events,
                "n_lines": e.n_lines,
                "detail": e.detail,
                "advice": _ADVICE[e.kind].replace("{name}", one_line(e.detail, 40)),
            }
            for e in entries
        ]
        return pl.DataFrame(rows, schema=LOSSES.schema, orient="row") if rows else LOSSES.empty()

    def thread_table(self, source: int) -> pl.DataFrame:
        """Return the ``threads`` rows of this source."""
        rows = [
            (source, tid, None if tgid == UNKNOWN else tgid, comm)
            for (tid, comm), tgid in sorted(self.threads.items())
            if tid != UNKNOWN
        ]
        return pl.DataFrame(rows, schema=THREADS.schema, orient="row")


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
    """Metadata of a recording as stated in the input; None where it is not stated."""

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
    path = one_line(source.path)
    if source.clock in ("integer", *TICK_CLOCKS):
        yield f"{path}: {source.clock} clock; times are in its ticks, shown as ns"
    if source.clock == "order":
        yield f"{path}: has no times: the numbers of its lines stand for them, in their order"
    if source.clock == "local":
        yield f"{path}: clock 'local' differs between CPUs; record with mono (-C mono)"
    if source.clock == "relative" or format_named(source.format).times != "absolute":
        yield f"{path}: times count from the first event; cannot be merged by time"
    if source.is_log:
        for trace in sources:
            if not trace.is_log:
                agreed = agreement(trace, source)
                comparison = "compared" if agreed.comparable else "NOT compared"
                yield f"{path}: {comparison} by time with {one_line(trace.path)}: {agreed.reason}"
