"""From the ring-buffer pages of all CPUs to batches of events in the order of their time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.compiler import Runner, interpreted
from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import HEADS, UNKNOWN, BoolArray, I32Array, I64Array, RecordBatch
from tdxtrace.ingest.loops import pages as loop
from tdxtrace.ingest.loops.pages import Heads, event_number
from tdxtrace.ingest.records.formats import PageLayout
from tdxtrace.ingest.records.layouts import PADDING, EventCatalog, heads_of, int64_at
from tdxtrace.ingest.stats import USUAL_TIDS, SourceStats
from tdxtrace.ingest.tracedat.options import Clock, Shift, shifts_of

# What trace-cmd and the kernel print for a thread whose name was not saved.
_NO_NAME: Final = "<...>"
_IDLE: Final = "<idle>"
# Pages of one CPU and of all that are read at a time: what the loop reads stays in the
# processor's cache.
_CPU_BYTES: Final = 256 << 10
_ALL_BYTES: Final = 8 << 20
_MAX_BYTES: Final = 512 << 20
BATCH_ROWS: Final = 1 << 17
_WORDS_PER_ROW: Final = 6
_GAPS: Final = 1 << 10
# Events after which progress is told, though few of them are ours.
_MANY_EVENTS: Final = 1 << 20


@dataclass(slots=True)
class CpuPages:
    """The pages of one CPU's buffer, as they lie in the recording."""

    cpu: int
    read: Callable[[NDArray[np.uint8]], int]
    """Fills an array with further whole pages; returns how many bytes, 0 at the end."""
    shift: Shift | None = None
    """What makes its times comparable with those of other CPUs, if they are not."""


@dataclass(slots=True)
class _Output:
    """Arrays of a batch that the loop fills."""

    columns: tuple[NDArray[Any], ...]
    words: I64Array
    gaps: I64Array
    counts: I64Array
    threads: I32Array

    @classmethod
    def with_room(cls, n_rows: int, n_layouts: int) -> _Output:
        """Arrays for so many rows."""
        return cls(
            tuple(np.empty(n_rows, kind) for name, kind in HEADS.items() if name != "tgid"),
            np.empty(n_rows * _WORDS_PER_ROW + loop.MOST_WORDS, np.int64),
            np.empty((_GAPS, loop.GAP_COLUMNS), np.int64),
            np.zeros((n_layouts, loop.N_COUNTS), np.int64),
            np.empty(n_rows, np.int32),
        )


@dataclass(slots=True)
class RingReader:
    """Reads the events of one recording's ring buffers, and counts the rest."""

    cpus: Sequence[CpuPages]
    layout: PageLayout
    catalog: EventCatalog
    stats: SourceStats
    clock: Clock = field(default_factory=Clock)
    comms: Mapping[int, str] = field(default_factory=dict)
    tgids: Mapping[int, int] = field(default_factory=dict)
    run: Runner[Any] = interpreted
    _bytes: NDArray[np.uint8] = field(init=False)
    _part: int = 0
    """Bytes of ``_bytes`` that each CPU has."""
    _sources: I64Array = field(init=False)
    """By CPU: the columns that loops.pages names."""
    _tids: set[int] = field(default_factory=set)
    _is_known: BoolArray = field(default_factory=lambda: np.zeros(USUAL_TIDS, np.bool_))
    """Which of the usual thread numbers are in ``_tids``."""

    def __post_init__(self) -> None:
        n, size = len(self.cpus), self.layout.size
        self._part = max(1, min(_CPU_BYTES, _ALL_BYTES // max(1, n)) // size) * size
        if n * self._part > _MAX_BYTES:
            raise FormatError(f"{n} CPUs with pages of {size} bytes")
        self._bytes = np.zeros(n * self._part + PADDING, np.uint8)
        self._sources = np.zeros((n, loop.N_COLUMNS), np.int64)
        self._sources[:, loop.CPU] = [pages.cpu for pages in self.cpus]
        self._sources[:, loop.HAS_MORE] = 1
        for column in (loop.RECORD, loop.TIME, loop.LAST_TIME):
            self._sources[:, column] = -1

    def batches(self) -> Iterator[RecordBatch]:
        """Yield the events that may become rows, in the order of their time."""
        order = np.arange(len(self.cpus), dtype=np.int64)
        status, n_sources = loop.NEEDS_PAGES, len(order)
        while status != loop.END:
            status, n_sources, batch = self._next(order, n_sources)
            yield batch
        for source in self._sources:
            cpu, first, last = (
                int(source[column]) for column in (loop.CPU, loop.FIRST_TIME, loop.LAST_TIME)
            )
            first_ns, last_ns = self.clock.one(first), self.clock.one(last)
            if source[loop.N_EVENTS] and first_ns is not None and last_ns is not None:
                self.stats.extend_cpu_span(cpu, first_ns, last_ns)
            if source[loop.N_LOST]:
                n_lost = _counted(int(source[loop.N_LOST]))
                self.stats.record_gap(cpu, n_lost, self.stats.n_lines + 1, last_ns, None)

    @property
    def n_damaged(self) -> int:
        """Pages so far of which something could not be read."""
        return int(self._sources[:, loop.N_DAMAGED].sum())

    def n_events(self) -> list[int]:
        """Events so far of each CPU's pages."""
        found: list[int] = self._sources[:, loop.N_EVENTS].tolist()
        return found

    def _next(self, order: I64Array, n_sources: int) -> tuple[int, int, RecordBatch]:
        """Run the loop until a batch is full, or all is read."""
        run, tables, at = self.run(loop.merge), self.catalog.tables, int64_at(self._bytes)
        forms = self._forms()
        out = _Output.with_room(BATCH_ROWS, len(tables.layouts))
        done = n_sources, self.stats.n_lines, 0, 0, 0, 0
        while True:
            status, done = run(
                at,
                forms,
                self._sources,
                order,
                (self.catalog.index, tables.layouts, tables.fields),
                (out.columns, out.words, out.gaps, out.counts),
                (self._is_known, out.threads),
                done,
            )
            if status == loop.NEEDS_PAGES:
                self._fill(int(order[0]))
                if done[1] - self.stats.n_lines > _MANY_EVENTS:
                    break
            elif status == loop.NEEDS_LAYOUT:
                record = int(self._sources[order[0], loop.RECORD])
                self.catalog.intern(event_number(at, record, forms[1]), at, record)
                n_more = len(tables.layouts) - len(out.counts)
                out.counts = np.pad(out.counts, ((0, n_more), (0, 0)))
            else:
                break
        return status, done[0], self._batch(out, done)

    def _forms(self) -> tuple[loop.PageShape, Heads, loop.Shifts]:
        """How pages and the heads of records look, and what corrects the clocks."""
        shape = self.layout.size, self.layout.data, self.layout.commit
        heads = heads_of(self.catalog.common)
        return shape, heads, shifts_of([pages.shift for pages in self.cpus])

    def _fill(self, source: int) -> None:
        """Read further pages of a CPU, all of whose pages in memory were given out."""
        start = source * self._part
        n_bytes = self.cpus[source].read(self._bytes[start : start + self._part])
        state = self._sources[source]
        state[loop.NEXT_PAGE], state[loop.PAGES_END] = start, start + n_bytes
        state[loop.HAS_MORE] = n_bytes > 0

    def _batch(self, out: _Output, done: loop.Done) -> RecordBatch:
        """Account for what the loop gave out, and return its rows."""
        _, n_lines, n_rows, n_words, n_gaps, n_threads = done
        self.catalog.count(out.counts)
        for source, n_lost, after, before, line in out.gaps[:n_gaps].tolist():
            start_ns, end_ns = self.clock.one(after), self.clock.one(before)
            self.stats.record_gap(self.cpus[source].cpu, _counted(n_lost), line, start_ns, end_ns)
        self.stats.n_lines = n_lines
        self._name(out.threads[:n_threads])
        line, time, tid, cpu, in_irq, event, layout, first_word = (
            _cut(column, n_rows) for column in out.columns
        )
        heads = line, self.clock.to_ns(time), tid, self._tgids_of(tid), cpu, in_irq, event
        words = _cut(out.words, n_words).view(np.uint64)
        return RecordBatch(*heads, layout, first_word, words, self.catalog.tables.slots)

    def _tgids_of(self, tid: I32Array) -> I32Array:
        if not self.tgids:
            return np.full(len(tid), UNKNOWN, np.int32)
        known = np.array(sorted(self.tgids), np.int32)
        process = np.array([self.tgids[t] for t in known.tolist()], np.int32)
        place = np.minimum(np.searchsorted(known, tid), len(known) - 1)
        return np.where(known[place] == tid, process[place], UNKNOWN).astype(np.int32)

    def _name(self, tids: I32Array) -> None:
        """Name the threads that are new."""
        for tid in np.unique(tids).tolist():
            if tid not in self._tids:
                self._tids.add(tid)
                comm = self.comms.get(tid, _IDLE if tid == 0 else _NO_NAME)
                self.stats.record_thread(tid, comm, self.tgids.get(tid, UNKNOWN))


def _counted(n_lost: int) -> int | None:
    return None if n_lost < 0 else n_lost


def _cut(column: NDArray[Any], n: int) -> NDArray[Any]:
    """The first ``n`` entries, in an array of their own if they are few."""
    return column[:n] if 2 * n > len(column) else column[:n].copy()
