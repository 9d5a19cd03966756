"""A perf.data, of a file or a pipe, becomes events in order of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tdxtrace.compiler import Runner
from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import RecordBatch
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.loops.perf_records import END, FIRST_SAMPLE
from tdxtrace.ingest.perfdata.file import TRACEPOINT, Attr, PerfFile, read_head
from tdxtrace.ingest.perfdata.ordered_events import Given, OrderedEvents
from tdxtrace.ingest.perfdata.records import Bytes, RecordReader
from tdxtrace.ingest.perfdata.sideband import SidebandRecords, ThreadNames
from tdxtrace.ingest.provenance import Header
from tdxtrace.ingest.records.catalog import EventCatalog
from tdxtrace.ingest.records.datafile import DataFile
from tdxtrace.ingest.records.formats import EventFormat, common_of
from tdxtrace.ingest.stats import SourceStats


@dataclass(slots=True)
class PerfReader:
    """Reads one perf.data into batches of events, and counts the rest."""

    file: DataFile
    registry: EventRegistry
    stats: SourceStats
    perf: PerfFile = field(init=False)
    names: ThreadNames = field(init=False)
    ordered: OrderedEvents = field(init=False)
    sideband: SidebandRecords = field(init=False)
    _catalog: EventCatalog = field(init=False)
    _has_begun: bool = False
    """Whether events were learnt."""
    _records: RecordReader = field(init=False)

    def __post_init__(self) -> None:
        self.perf = read_head(self.file)
        self.names = ThreadNames(self.stats)
        self.ordered = OrderedEvents(self.stats)
        self.sideband = SidebandRecords(self.perf, self.stats, self.names, self.ordered)
        self._records = RecordReader(self.perf)
        self._learn({}, [])

    def _learn(self, formats: Mapping[int, EventFormat], attrs: Sequence[Attr]) -> None:
        common = common_of(formats.values())
        self._catalog = EventCatalog(formats, common, self.registry, self.stats, _printed_name)
        self.ordered.learn(attrs, self.perf.event_name, self._catalog)

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return self.file.size

    def batches(self, run: Runner[Any]) -> Iterator[RecordBatch]:
        """Yield the events that may become rows, in the order of their time.

        Raises:
            FormatError: If nothing describes the events.
        """
        self.ordered.run = run
        for _ in self._records.read(self._follow):
            yield from self._batch(self.ordered.ready())
        if not self._has_begun:
            self._begin()
        yield from self._batch(self.ordered.rest())
        self._note_losses()

    @property
    def position(self) -> int:
        """Bytes of the file that were read, for progress."""
        return self._records.at

    def header(self) -> Header:
        """What the file says of the recording."""
        clocks = {attr.clock for attr in self.perf.attrs}
        clock = clocks.pop() if len(clocks) == 1 else None
        return Header(self.perf.kernel, self.perf.tool or "perf", clock, None, None, True)

    def _follow(self, data: Bytes, n_bytes: int) -> int:
        """Take the records of a block; return where the first stands that is not simply taken."""
        why, at = FIRST_SAMPLE, 0
        while why != END:
            why, at, others = self.ordered.queue(data, at, n_bytes)
            for place, newest in others:
                size = int.from_bytes(data[place + 6 : place + 8].tobytes(), "little")
                self.sideband.take(data[place : place + size].tobytes(), newest)
            if why == FIRST_SAMPLE:
                self._begin()
        return at

    def _begin(self) -> None:
        """Learn the events, which have all been described before the first sample."""
        if not self.perf.attrs:
            raise FormatError(f"{self.file.shown} is a perf.data without any event's attributes")
        if not self.perf.formats.events and any(attr.is_tracepoint for attr in self.perf.attrs):
            raise FormatError(
                f"{self.file.shown} has no event formats"
                + (f": {self.perf.cut_short}" if self.perf.cut_short else "")
                + "; let perf record end by itself or with Ctrl-C, which writes them"
            )
        self._has_begun = True
        self._learn(self.perf.formats.events, self.perf.attrs)

    def _batch(self, given: Given | None) -> Iterator[RecordBatch]:
        """Yield the events of samples, if there are any, and record their threads."""
        if given is not None:
            self.names.record(given.batch, given.limit, given.tids, given.first_row)
            yield given.batch

    def _note_losses(self) -> None:
        """Note what the recording as a whole lost, or was told to leave out."""
        ours = set(self._catalog.wanted_numbers())
        wanted = [a for a in self.perf.attrs if a.type == TRACEPOINT and a.config in ours]
        for kind, way in sorted({loss for attr in wanted for loss in attr.missing().items()}):
            self.stats.record_loss(kind, None, f"record with {way}")
        if self._records.is_damaged:
            n_left = self.perf.data_at + self.perf.data_size - self._records.at
            self.stats.record_loss("damaged", None, f"{max(0, n_left)} bytes of records")
        for detail in dict.fromkeys((self.perf.cut_short, self._records.cut_short)):
            if detail:
                self.stats.record_loss("truncated", None, detail)


def _printed_name(made: EventFormat) -> str:
    """What perf script prints as the name of a tracepoint."""
    return f"{made.system}:{made.name}"
