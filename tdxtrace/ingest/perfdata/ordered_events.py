"""Sort samples by time, and place the losses between them.

As perf's ordered events, tools/perf/util/ordered-events.c: ``perf record`` drains the buffers of
all CPUs in turn; after two such rounds, no sample older than the newest one of the first round
can follow (tools/perf/Documentation/perf.data-file-format.txt, FINISHED_ROUND).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.compiler import Runner, interpreted
from tdxtrace.ingest.batch import EVENT_COLUMNS, BoolArray, I32Array, I64Array, Index, RecordBatch
from tdxtrace.ingest.loops import perf_records as loops
from tdxtrace.ingest.loops.pages import MAX_ROW_WORDS, N_COUNTS, CommonFields, event_number
from tdxtrace.ingest.loops.perf_records import copy_in_order, drop_until
from tdxtrace.ingest.perfdata import file as parts
from tdxtrace.ingest.perfdata.file import Attr
from tdxtrace.ingest.records.datafile import Bytes
from tdxtrace.ingest.records.layouts import EventCatalog, common_fields_of, int64_at
from tdxtrace.ingest.stats import USUAL_TIDS, Loss, SourceStats

_NO_LIMIT: Final = np.iinfo(np.int64).max
# Most queued samples while no round ends: perf itself flushes half of its queue when
# it is full (OE_FLUSH__HALF).
_MAX_QUEUED: Final = 1 << 22
# Least queued samples for a batch: half as many took 1.6 instead of 1.3 s for 12 million.
_MIN_QUEUED: Final = 1 << 17
_MIN_CAPACITY: Final = 1 << 12
_MAX_SIDEBAND: Final = 1 << 12


@dataclass(slots=True)
class LostSamples:
    """A LOST record: number of samples of a CPU that were dropped before a time."""

    ts_ns: int
    cpu: int
    n_events: int


@dataclass(slots=True)
class OrderedBatch:
    """Samples returned in time order: those that become rows, and their threads."""

    batch: RecordBatch
    limit: int
    """Latest possible time of the samples, in ns."""
    tids: I32Array
    first_row: Index
    """The first event of each of ``tids``."""


@dataclass(slots=True)
class OrderedEvents:
    """Queues samples until rounds of perf's buffers end, and returns them in time order."""

    stats: SourceStats
    run: Runner[Any] = interpreted
    """Runs loops, interpreted or compiled; set before the first sample."""
    n_returned: int = 0
    """Number of samples returned; perf script prints a line for each."""
    lost: list[LostSamples] = field(default_factory=list)
    """Losses that are not yet placed between returned samples."""
    _catalog: EventCatalog = field(init=False)
    _layouts: tuple[Any, ...] = field(init=False)
    """Argument ``samples`` of queue_samples."""
    _common: CommonFields = field(init=False)
    """Offsets of the common fields of records."""
    _queue: list[NDArray[Any]] = field(init=False)
    _sideband: I64Array = field(default_factory=lambda: np.empty((2, _MAX_SIDEBAND), np.int64))
    _n: int = 0
    """Number of queued samples."""
    _n_words: int = 0
    """Number of words of their fields."""
    _is_known: BoolArray = field(default_factory=lambda: np.zeros(USUAL_TIDS, np.bool_))
    """By thread ID: whether the batch being built has the thread; all false between batches."""
    _newest: int = -1
    _newest_of_round: int = -1
    """Time of the newest sample before the end of the last round, ns."""
    _limit: int = -1
    """Time up to which no further sample can follow, ns."""
    _returned_limit: int = -1
    """Time up to which samples were returned, ns; later arrivals wait for the next limit."""

    def __post_init__(self) -> None:
        columns = np.empty((_MIN_CAPACITY, loops.N_COLUMNS), np.int64)
        self._queue = [
            np.empty(_MIN_CAPACITY, np.int64),
            columns,
            np.empty(_MIN_CAPACITY, np.int64),
        ]

    def set_events(
        self, attrs: Sequence[Attr], event_name: Callable[[int], str], catalog: EventCatalog
    ) -> None:
        """Set the events of the samples; without attributes no sample is queued.

        Args:
            attrs: The attributes of events.
            event_name: Returns perf's name of the event of an attribute.
            catalog: Catalog in which events are looked up or added.
        """
        self._catalog = catalog
        self._common = common_fields_of(catalog.common)
        # Samples without a record are counted under synthetic event IDs.
        names = [event_name(n) for n in range(len(attrs))]
        numbers = {
            name: catalog.add_synthetic_event("noise", name) for name in dict.fromkeys(names)
        }
        no_record = catalog.index[[numbers[name] for name in names]]
        self._layouts = *_sample_layouts(attrs), no_record

    def queue(self, data: Bytes, at: int, n_bytes: int) -> tuple[int, int, list[tuple[int, int]]]:
        """Queue the samples of a block up to a record that the caller must handle.

        Args:
            data: The block, PADDING bytes longer than its records.
            at: The byte at which a record begins.
            n_bytes: The byte at which its records end.

        Returns:
            Why it stopped, a constant of loops.perf_records; the byte at which it stopped; and,
            for each record before that which is not a sample, its byte and the time of the newest
            sample before it.
        """
        catalog, words = self._catalog, int64_at(data)
        tables = catalog.tables.layouts, catalog.tables.fields
        reason, record, at, self._n, self._n_words, n_sideband, self._newest = self.run(
            loops.queue_samples
        )(
            words,
            at,
            n_bytes,
            self._layouts,
            (self._common, catalog.common.type.end, catalog.index, *tables),
            tuple(self._queue),
            tuple(self._sideband),
            self._n,
            self._n_words,
            self._newest,
        )
        if reason == loops.FULL:
            self._grow()
        elif reason == loops.NEW_EVENT:
            catalog.intern(event_number(words, record, self._common), words, record)
        return reason, at, list(zip(*self._sideband[:, :n_sideband].tolist(), strict=True))

    def _grow(self) -> None:
        """Double the arrays of the queue that have no room for another sample."""
        used = self._n, self._n, self._n_words + MAX_ROW_WORDS - 1
        for index, (column, n) in enumerate(zip(self._queue, used, strict=True)):
            if n >= len(column):
                larger = np.empty((2 * n, *column.shape[1:]), np.int64)
                larger[: len(column)] = column
                self._queue[index] = larger

    def end_round(self, newest: int) -> None:
        """Handle the end of a round; ``newest`` is the time of the newest sample before it."""
        self._limit = self._newest_of_round
        self._newest_of_round = max(newest, self._newest_of_round)

    def ready(self) -> OrderedBatch | None:
        """Return samples that no later sample can precede; None if there are too few."""
        if self._n < _MIN_QUEUED:
            return None
        limit = self._limit
        if self._n > _MAX_QUEUED:
            limit = int(np.median(self._queue[0][: self._n]))
        elif limit == self._returned_limit:
            return None
        self._returned_limit = limit
        return self._take_until(limit)

    def flush(self) -> OrderedBatch | None:
        """Return all queued samples."""
        return self._take_until(_NO_LIMIT)

    def _take_until(self, limit: int) -> OrderedBatch | None:
        indexes = np.flatnonzero(self._queue[0][: self._n] <= limit)
        if not len(indexes) and limit != _NO_LIMIT:
            return None
        order = indexes[in_time_order(self._queue[0][indexes])]
        lost = sorted((x for x in self.lost if x.ts_ns <= limit), key=lambda x: x.ts_ns)
        if lost or self.stats.has_open_gaps:
            # The next sample of a CPU ends its loss, so losses are recorded one by one.
            self._record_losses(lost, order)
            self.lost = [x for x in self.lost if x.ts_ns > limit]
        result = self._copy(order, limit)
        self.n_returned += len(order)
        self.stats.n_lines += len(order)
        self._n, self._n_words = self.run(drop_until)(
            limit, self._n, tuple(self._queue), self._catalog.tables.layouts
        )
        return result

    def _copy(self, order: Index, limit: int) -> OrderedBatch:
        """Copy the samples at these indexes of the queue to a batch, and count them."""
        tables = self._catalog.tables
        counts = np.zeros((len(self._catalog.layouts), N_COUNTS), np.int64)
        rows = tuple(np.empty(len(order), kind) for kind in EVENT_COLUMNS.values())
        words = np.empty(self._n_words, np.int64)
        tids, first_row = np.empty(len(order), np.int32), np.empty(len(order), np.int64)
        n, n_words, n_tids = self.run(copy_in_order)(
            order,
            self.n_returned,
            tuple(self._queue),
            tables.layouts,
            counts,
            (self.stats.first_ns, self.stats.last_ns),
            (self._is_known, tids, first_row),
            rows,
            words,
        )
        self._catalog.count(counts)
        tids, first_index = np.unique(tids[:n_tids], return_index=True)
        self._is_known[tids[(tids >= 0) & (tids < len(self._is_known))]] = False
        columns = {name: column[:n] for name, column in zip(EVENT_COLUMNS, rows, strict=True)}
        fields = words[:n_words].view(np.uint64)
        batch = RecordBatch(**columns, words=fields, layouts=tables.slots)
        return OrderedBatch(batch, limit, tids, first_row[first_index])

    def _record_losses(self, lost: list[LostSamples], order: Index) -> None:
        """Record losses, and the timestamps of samples by CPU, in time order."""
        cpu = self._queue[1][order, loops.ON_CPU].astype(np.int32)
        ts_ns = self._queue[0][order]
        start = 0
        for loss in lost:
            end = int(np.searchsorted(ts_ns, loss.ts_ns, "right"))
            self.stats.observe_timestamps(cpu[start:end], ts_ns[start:end])
            self._record_loss(loss, self.n_returned + end + 1)
            start = end
        self.stats.observe_timestamps(cpu[start:], ts_ns[start:])

    def _record_loss(self, lost: LostSamples, line: int) -> None:
        same: Loss | None = next(
            (g for g in self.stats.gaps[-8:] if (g.line_no, g.cpu) == (line, lost.cpu)), None
        )
        if same is not None:
            same.n_events = (same.n_events or 0) + lost.n_events
            same.n_lines += 1
        else:
            self.stats.record_lost_events(lost.cpu, lost.n_events, line)


def in_time_order(ts_ns: I64Array) -> Index:
    """Return the indexes that sort samples by time; the sort is stable."""
    n_bits = max(1, len(ts_ns) - 1).bit_length()
    first, last = (int(ts_ns.min()), int(ts_ns.max())) if len(ts_ns) else (0, 0)
    if last - first >= 1 << 63 - n_bits:
        return np.argsort(ts_ns, kind="stable")
    # Time and index in one number: numpy's sort is 2 to 20 times as fast as its argsort (2 to 200
    # CPUs).
    key = (ts_ns - first << n_bits) | np.arange(len(ts_ns))
    key.sort()
    return key & (1 << n_bits) - 1


def _sample_layouts(attrs: Sequence[Attr]) -> tuple[Any, ...]:
    """Return the first three items of argument ``samples`` of queue_samples."""
    pairs = sorted({i: n for n, attr in enumerate(attrs) for i in attr.ids}.items())
    ids = np.array([i for i, _ in pairs], np.uint64).view(np.int64) ^ loops.SIGN
    attr_rows = [_layout_row(attr) for attr in attrs]
    id_at = attrs[0].id_at if pairs and len({attr.id_at for attr in attrs}) == 1 else -1
    # If samples have no ID, all are taken for samples of the first attribute.
    rows = list(dict.fromkeys(attr_rows if id_at >= 0 else attr_rows[:1]))
    row_number = {row: n for n, row in enumerate(rows)}
    return (
        np.array(rows, np.int64).reshape(-1, loops.CALLCHAIN + 1),
        np.array([row_number.get(row, 0) for row in attr_rows], np.int64),
        (id_at, ids, np.array([n for _, n in pairs], np.int64)),
    )


def _layout_row(attr: Attr) -> tuple[int, ...]:
    fixed = attr.fixed
    places = (fixed.get(part, -1) for part in (parts.TIME, parts.TID, parts.CPU))
    has_record, has_chain = attr.sample_type & parts.RAW, attr.sample_type & parts.CALLCHAIN
    return (8 * len(fixed), *places, int(has_record > 0), *attr.read_words, int(has_chain > 0))
