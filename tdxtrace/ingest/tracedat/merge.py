"""Read the pages of each CPU from a file, and merge the events of all CPUs by time.

Version 7 writes the list of a buffer's CPUs after its pages: a file that was cut short, or
whose recorder died, has the pages but not the list; then the pages are searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.compiler import Runner, interpreted
from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import (
    EVENT_COLUMNS,
    MAX_CPUS,
    UNKNOWN,
    BoolArray,
    I32Array,
    I64Array,
    RecordBatch,
)
from tdxtrace.ingest.loops import pages as loop
from tdxtrace.ingest.loops.pages import CommonFields, event_number
from tdxtrace.ingest.records.datafile import (
    Bytes,
    Cursor,
    CutShortError,
    DamagedPartError,
    DataFile,
    Unpack,
)
from tdxtrace.ingest.records.formats import PageLayout
from tdxtrace.ingest.records.layouts import PADDING, EventCatalog, common_fields_of, int64_at
from tdxtrace.ingest.stats import USUAL_TIDS, SourceStats
from tdxtrace.ingest.tracedat.options import Clock, CpuData, Shift, shifts_of

# Flag and length in a page's header, as in loops/pages.py; a page that is cut short has lost the
# count of lost events at its end.
_MISSED_EVENTS: Final = 1 << 31
_COMMIT_MASK: Final = (1 << 27) - 1
# trace-cmd compresses ten pages per chunk (lib/trace-cmd/trace-compress.c), whatever the
# size of a page; the compression ratio of a CPU's pages is below _MAX_RATIO.
_MAX_CHUNK_BYTES: Final = 16 << 20
_MAX_RATIO: Final = 1000
_DAMAGED: Final = "a compressed part of a CPU's pages is damaged"
_CUT_SHORT: Final = "the file ends in the middle of a CPU's pages"


@dataclass(slots=True)
class PlainPages:
    """Consecutive uncompressed pages in a file."""

    file: DataFile
    layout: PageLayout
    at: int
    size: int
    cut_short: str = ""

    @property
    def n_bytes(self) -> int:
        """Number of bytes left to read."""
        return self.size

    def read(self, into: Bytes) -> int:
        """Fill ``into`` with further pages; return the number of bytes, 0 at the end."""
        n_wanted = min(len(into), self.size)
        n_read = self.file.fill(self.at, into[:n_wanted])
        self.at, self.size = self.at + n_read, self.size - n_read
        if n_read < n_wanted:
            self.size, self.cut_short = 0, _CUT_SHORT
        return _complete_last_page(into, n_read, self.layout)


def _complete_last_page(pages: Bytes, n_bytes: int, layout: PageLayout) -> int:
    """Turn a last page that is cut short into a whole page with less data; return the new size.

    A page cut within its header is dropped, and so is one that has no room in ``pages``.
    """
    left = n_bytes % layout.size
    if not left:
        return n_bytes
    begin = n_bytes - left
    if left <= layout.data or begin + layout.size > len(pages):
        return begin
    pages[n_bytes : begin + layout.size] = 0
    commit = pages[begin + layout.commit : begin + layout.commit + 8].view("<u8")
    n_bytes = min(int(commit[0]) & _COMMIT_MASK, left - layout.data)
    commit[0] = int(commit[0]) & _MISSED_EVENTS | n_bytes
    return begin + layout.size


@dataclass(slots=True)
class CompressedPages:
    """Pages in chunks that are compressed separately: trace.dat version 7."""

    file: DataFile
    layout: PageLayout
    at: int
    unpack: Unpack
    end: int
    """Offset after the last chunk."""
    cut_short: str = ""
    n_unpacked: int = 0
    _max_unpacked: int = field(init=False)
    """Most bytes that all chunks together may unpack to."""
    n_bytes: int = field(init=False)
    """Estimate of the unpacked bytes: as if all chunks were as large as the first."""
    _n_chunks: int = 0
    _unread: memoryview = field(default_factory=lambda: memoryview(b""))

    def __post_init__(self) -> None:
        head = self.file.read(self.at, 12)
        self._max_unpacked = _MAX_CHUNK_BYTES + _MAX_RATIO * (self.end - self.at)
        self.at += 4
        self._n_chunks, size = (int.from_bytes(head[at : at + 4], "little") for at in (0, 8))
        self.n_bytes = self._n_chunks * size
        if len(head) < 4:
            self.cut_short = _CUT_SHORT

    def read(self, into: Bytes) -> int:
        """Fill ``into`` with further pages; return the number of bytes, 0 at the end."""
        done = 0
        while done < len(into):
            if not self._unread:
                self._unread = self._chunk()
                if not self._unread:
                    break
            part = self._unread[: len(into) - done]
            into[done : done + len(part)] = np.frombuffer(part, np.uint8)
            self._unread = self._unread[len(part) :]
            done += len(part)
        return _complete_last_page(into, done, self.layout)

    def _chunk(self) -> memoryview:
        """Unpack the next chunk; empty at the end, or if the chunk is damaged."""
        if not self._n_chunks:
            return memoryview(b"")
        self._n_chunks -= 1
        cursor = Cursor(self.file, at=self.at)
        try:
            packed, size = cursor.number(4), cursor.number(4)
            self.n_unpacked += size
            if self.at >= self.end:
                raise CutShortError
            if not 0 < size <= _MAX_CHUNK_BYTES or self.n_unpacked > self._max_unpacked:
                raise DamagedPartError
            chunk = memoryview(self.unpack(cursor.take(packed), size))
        except (CutShortError, DamagedPartError) as error:
            is_cut = isinstance(error, CutShortError)
            self.cut_short = _CUT_SHORT if is_cut else _DAMAGED
            self._n_chunks = 0
            return memoryview(b"")
        self.at = cursor.at
        return chunk


# Number of pages whose timestamps are read at a time.
_PAGES: Final = 1024
_UNKNOWN_CPU: Final = -1
# trace-cmd compresses ten pages per chunk (lib/trace-cmd/trace-compress.c), into some 4 KB; more
# chunks than one per _CHUNK_BYTES, beyond _FREE_CHUNKS, are not walked one by one.
_CHUNK_BYTES: Final = 1024
_FREE_CHUNKS: Final = 4096


def find_cpus(
    file: DataFile, span: tuple[int, int], page_size: int, is_compressed: bool, n_cpus: int | None
) -> tuple[CpuData, ...]:
    """Find the pages of each CPU in a buffer's data.

    trace-cmd writes the CPUs one after the other, each aligned to the page size
    (lib/trace-cmd/trace-output.c, out_write_cpu_data); for a CPU without events it writes
    nothing.  So CPU numbers are known only if as many runs of pages were found as there are
    CPUs; otherwise each run belongs to one unknown CPU, and its pages are in time order.

    Args:
        file: The trace.dat.
        span: Offset of the first byte of the data, and of the first byte after it.
        page_size: Size of a page in bytes.
        is_compressed: Whether the pages are compressed.
        n_cpus: Number of CPUs of the recorded machine, None if the file does not have it.

    Returns:
        Pages by CPU; empty if there are more runs than CPUs, as then the data are not pages.
    """
    max_runs = MAX_CPUS if n_cpus is None else n_cpus
    find = _compressed_runs if is_compressed else _plain_runs
    runs = find(file, _aligned(span[0], page_size), span[1], page_size, max_runs)
    if len(runs) > max_runs:
        return ()
    numbers = range(len(runs)) if len(runs) == n_cpus else [_UNKNOWN_CPU] * len(runs)
    return tuple(
        CpuData(cpu, at, after - at) for cpu, (at, after) in zip(numbers, runs, strict=True)
    )


def _aligned(at: int, page_size: int) -> int:
    return -(-at // page_size) * page_size


def _compressed_runs(
    file: DataFile, begin: int, end: int, page_size: int, max_runs: int
) -> list[tuple[int, int]]:
    """Walk the chunks of each CPU, a count followed by chunks with their lengths; return runs."""
    runs: list[tuple[int, int]] = []
    cursor = Cursor(file, at=begin)
    left = _FREE_CHUNKS + max(0, end - begin) // _CHUNK_BYTES
    while cursor.at < end and len(runs) <= max_runs:
        begin = cursor.at
        try:
            n_chunks = cursor.number(4)
            if not n_chunks:
                break
            left -= n_chunks
            if left < 0:
                raise CutShortError
            for _ in range(n_chunks):
                packed, _ = cursor.number(4), cursor.number(4)
                cursor.skip(packed)
        except CutShortError:
            runs.append((begin, end))
            break
        runs.append((begin, cursor.at))
        cursor.at = _aligned(cursor.at, page_size)
    return runs


def _plain_runs(
    file: DataFile, begin: int, end: int, page_size: int, max_runs: int
) -> list[tuple[int, int]]:
    """Split the pages into runs where time goes backwards, which it never does on one CPU."""
    starts = [begin]
    last = np.zeros(0, np.uint64)
    for at in range(begin, end, _PAGES * page_size):
        data = file.array(at, min(_PAGES * page_size, end - at))
        n_pages = len(data) // page_size
        words = data[: n_pages * page_size].reshape(n_pages, page_size)[:, :8]
        times = np.concatenate([last, np.ascontiguousarray(words).view("<u8")[:, 0]])
        resets = np.flatnonzero(times[1:] < times[:-1]) + 1 - len(last)
        starts += (at + resets * page_size).tolist()
        last = times[-1:]
        if len(starts) > max_runs:
            break
    return list(zip(starts, [*starts[1:], end], strict=True)) if begin < end else []


# Names that trace-cmd and the kernel print for a thread whose name was not saved, and for thread 0.
_NO_NAME: Final = "<...>"
_IDLE: Final = "<idle>"
# Most bytes of pages read at a time, for one CPU and for all CPUs: small enough to stay in the
# processor's cache.
_CPU_BYTES: Final = 256 << 10
_ALL_BYTES: Final = 8 << 20
_MAX_BYTES: Final = 512 << 20
BATCH_ROWS: Final = 1 << 17
_WORDS_PER_ROW: Final = 6
_GAPS: Final = 1 << 10
# Events after which a batch is returned even if it is not full, so that progress can be shown.
_MANY_EVENTS: Final = 1 << 20


@dataclass(slots=True)
class CpuPages:
    """The pages of one CPU's buffer in a recording."""

    cpu: int
    read: Callable[[NDArray[np.uint8]], int]
    """Fills an array with further whole pages; returns the number of bytes, 0 at the end."""
    shift: Shift | None = None
    """Correction of its timestamps to the clock of the other CPUs, if needed."""


@dataclass(slots=True)
class _Output:
    """Output arrays of ``loops.pages.merge`` for one batch."""

    columns: tuple[NDArray[Any], ...]
    words: I64Array
    gaps: I64Array
    counts: I64Array
    threads: I32Array

    @classmethod
    def with_capacity(cls, n_rows: int, n_layouts: int) -> _Output:
        """Return arrays for ``n_rows`` rows."""
        return cls(
            tuple(np.empty(n_rows, kind) for name, kind in EVENT_COLUMNS.items() if name != "tgid"),
            np.empty(n_rows * _WORDS_PER_ROW + loop.MAX_ROW_WORDS, np.int64),
            np.empty((_GAPS, loop.GAP_COLUMNS), np.int64),
            np.zeros((n_layouts, loop.N_COUNTS), np.int64),
            np.empty(n_rows, np.int32),
        )


@dataclass(slots=True)
class RingReader:
    """Reads one recording's ring buffers into batches of events, and counts all other records."""

    cpus: Sequence[CpuPages]
    layout: PageLayout
    catalog: EventCatalog
    stats: SourceStats
    clock: Clock = field(default_factory=Clock)
    comms: Mapping[int, str] = field(default_factory=dict)
    tgids: Mapping[int, int] = field(default_factory=dict)
    run: Runner[Any] = interpreted
    _bytes: NDArray[np.uint8] = field(init=False)
    _part_bytes: int = 0
    """Bytes of ``_bytes`` for each CPU."""
    _sources: I64Array = field(init=False)
    """By CPU: the columns that loops.pages names."""
    _tids: set[int] = field(default_factory=set)
    _is_known: BoolArray = field(default_factory=lambda: np.zeros(USUAL_TIDS, np.bool_))
    """By thread ID up to USUAL_TIDS: whether it is in ``_tids``."""

    def __post_init__(self) -> None:
        n, size = len(self.cpus), self.layout.size
        self._part_bytes = max(1, min(_CPU_BYTES, _ALL_BYTES // max(1, n)) // size) * size
        if n * self._part_bytes > _MAX_BYTES:
            raise FormatError(
                f"{n} CPUs with pages of {size} bytes need buffers of over {_MAX_BYTES >> 20} MiB"
            )
        self._bytes = np.zeros(n * self._part_bytes + PADDING, np.uint8)
        self._sources = np.zeros((n, loop.N_COLUMNS), np.int64)
        self._sources[:, loop.CPU] = [pages.cpu for pages in self.cpus]
        self._sources[:, loop.HAS_MORE] = 1
        for column in (loop.RECORD, loop.TIME, loop.LAST_TIME):
            self._sources[:, column] = -1

    def batches(self) -> Iterator[RecordBatch]:
        """Yield the events that may become rows, in time order."""
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
                n_lost = _known_count(int(source[loop.N_LOST]))
                self.stats.record_gap(cpu, n_lost, self.stats.n_lines + 1, last_ns, None)

    @property
    def n_damaged(self) -> int:
        """Number of pages so far that could not be read completely."""
        return int(self._sources[:, loop.N_DAMAGED].sum())

    def n_events(self) -> list[int]:
        """Return the number of events so far, for each item of ``cpus``."""
        found: list[int] = self._sources[:, loop.N_EVENTS].tolist()
        return found

    def _next(self, order: I64Array, n_sources: int) -> tuple[int, int, RecordBatch]:
        """Run the loop until a batch is full or no event is left.

        Returns:
            Why it stopped, a constant of loops.pages; the number of CPUs that may have further
            events; and the batch.
        """
        run, tables, at = self.run(loop.merge), self.catalog.tables, int64_at(self._bytes)
        shapes = self._shapes()
        out = _Output.with_capacity(BATCH_ROWS, len(tables.layouts))
        done = n_sources, self.stats.n_lines, 0, 0, 0, 0
        while True:
            status, done = run(
                at,
                shapes,
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
                self.catalog.intern(event_number(at, record, shapes[1]), at, record)
                n_more = len(tables.layouts) - len(out.counts)
                out.counts = np.pad(out.counts, ((0, n_more), (0, 0)))
            else:
                break
        return status, done[0], self._batch(out, done)

    def _shapes(self) -> tuple[loop.PageShape, CommonFields, loop.Shifts]:
        """Return the layout of pages and of common fields, and the clock corrections."""
        shape = self.layout.size, self.layout.data, self.layout.commit
        common = common_fields_of(self.catalog.common)
        return shape, common, shifts_of([pages.shift for pages in self.cpus])

    def _fill(self, source: int) -> None:
        """Read further pages of a CPU, replacing its pages in memory, which are used up."""
        start = source * self._part_bytes
        n_bytes = self.cpus[source].read(self._bytes[start : start + self._part_bytes])
        state = self._sources[source]
        state[loop.NEXT_PAGE], state[loop.PAGES_END] = start, start + n_bytes
        state[loop.HAS_MORE] = n_bytes > 0

    def _batch(self, out: _Output, done: loop.Done) -> RecordBatch:
        """Add the loop's counts, gaps and threads to the statistics; return its rows."""
        _, n_lines, n_rows, n_words, n_gaps, n_threads = done
        self.catalog.count(out.counts)
        for source, n_lost, after, before, line in out.gaps[:n_gaps].tolist():
            start_ns, end_ns = self.clock.one(after), self.clock.one(before)
            self.stats.record_gap(
                self.cpus[source].cpu, _known_count(n_lost), line, start_ns, end_ns
            )
        self.stats.n_lines = n_lines
        self._record_threads(out.threads[:n_threads])
        line, time, tid, cpu, in_irq, event, layout, first_word = (
            _cut(column, n_rows) for column in out.columns
        )
        columns = line, self.clock.to_ns(time), tid, self._tgids_of(tid), cpu, in_irq, event
        words = _cut(out.words, n_words).view(np.uint64)
        return RecordBatch(*columns, layout, first_word, words, self.catalog.tables.slots)

    def _tgids_of(self, tid: I32Array) -> I32Array:
        if not self.tgids:
            return np.full(len(tid), UNKNOWN, np.int32)
        known = np.array(sorted(self.tgids), np.int32)
        process = np.array([self.tgids[t] for t in known.tolist()], np.int32)
        index = np.minimum(np.searchsorted(known, tid), len(known) - 1)
        return np.where(known[index] == tid, process[index], UNKNOWN).astype(np.int32)

    def _record_threads(self, tids: I32Array) -> None:
        """Record the names of new threads in the statistics."""
        for tid in np.unique(tids).tolist():
            if tid not in self._tids:
                self._tids.add(tid)
                comm = self.comms.get(tid, _IDLE if tid == 0 else _NO_NAME)
                self.stats.record_thread(tid, comm, self.tgids.get(tid, UNKNOWN))


def _known_count(n_lost: int) -> int | None:
    return None if n_lost < 0 else n_lost


def _cut(column: NDArray[Any], n: int) -> NDArray[Any]:
    """Return the first ``n`` entries, copied if they are at most half of the column."""
    return column[:n] if 2 * n > len(column) else column[:n].copy()
