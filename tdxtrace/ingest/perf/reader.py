"""A perf.data, of a file or a pipe, becomes raw events in order of time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from tdxtrace.errors import FormatError
from tdxtrace.ingest.compiled import pays
from tdxtrace.ingest.events.met import Vocabulary
from tdxtrace.ingest.headers import Header
from tdxtrace.ingest.perf import attrs, order
from tdxtrace.ingest.perf.blocks import RecordReader
from tdxtrace.ingest.perf.file import PerfFile, read_head
from tdxtrace.ingest.perf.held import Held, StandIns, Waiting
from tdxtrace.ingest.perf.names import Names
from tdxtrace.ingest.perf.notes import Notes
from tdxtrace.ingest.perf.order import Order
from tdxtrace.ingest.perf.samples import SampleReader, noise_name, printed_name
from tdxtrace.ingest.raw import RawEvents
from tdxtrace.ingest.records.datafile import DataFile
from tdxtrace.ingest.records.formats import common_of
from tdxtrace.ingest.records.known import KnownEvents
from tdxtrace.ingest.tally import Tally


@dataclass(slots=True)
class PerfReader:
    """Reads one perf.data into raw events, and counts the rest."""

    file: DataFile
    vocabulary: Vocabulary
    tally: Tally
    perf: PerfFile = field(init=False)
    names: Names = field(init=False)
    known: KnownEvents = field(init=False)
    order: Order = field(init=False)
    samples: SampleReader = field(default_factory=SampleReader)
    notes: Notes = field(init=False)
    _records: RecordReader = field(init=False)

    def __post_init__(self) -> None:
        self.perf = read_head(self.file)
        self.names = Names(self.tally)
        is_native = self.perf.big_endian == (sys.byteorder == "big")
        is_compiled = is_native and sys.byteorder == "little" and pays(self.file.size)
        self._records = RecordReader(self.perf, is_compiled)
        self._learn()
        self.order = Order(self.known, self.tally, self.names)
        self.notes = Notes(self.perf, self.tally, self.names, self.order)

    def _learn(self) -> None:
        """Take what is known of events so far; in pipe mode more may come."""
        formats = self.perf.formats.events
        common = common_of(formats.values())
        self.known = KnownEvents(formats, common, self.vocabulary, self.tally, printed_name)
        self.samples.learn(self.perf.attrs, common)

    def batches(self) -> Iterator[RawEvents]:
        """Yield the events that may become rows, in the order of their time.

        Raises:
            FormatError: If nothing describes the events.
        """
        for records in self._records.blocks():
            self.notes.take(records, records.types(records.others))
            if records.n_samples and self.order.waiting is None:
                self._begin()
            self.order.hold(records)
            made = self.order.ready()
            if made is not None:
                yield made
        if self.order.waiting is None:
            self._begin()
        made = self.order.rest()
        if made is not None:
            yield made
        self._losses()

    @property
    def position(self) -> int:
        """Bytes of the file that were read, for progress."""
        return self._records.at

    def header(self) -> Header:
        """What the file says of the recording."""
        clocks = {attr.clock for attr in self.perf.attrs}
        clock = clocks.pop() if len(clocks) == 1 else None
        return Header(self.perf.kernel, self.perf.tool or "perf", clock, None, None, True)

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
        self._learn()
        self.order.known = self.known
        self.order.waiting = self._waiting()
        self.order.n_least = order.LEAST_READY if self._records.is_reused else 0

    def _waiting(self) -> Waiting:
        """What holds samples until their turn comes."""
        names = StandIns(self.known, lambda n: noise_name(self.perf.attrs[n], self.perf.names))
        made: Waiting | None = None
        if self._records.is_compiled:
            from tdxtrace.ingest.perf.pool.pool import pool_of  # noqa: PLC0415 - see compiled.pays

            made = pool_of(self.known, self.samples, names, self.tally)
        # A pool copies what it needs of a block.
        self._records.is_reused = made is not None
        return Held(self.known, self.samples, names) if made is None else made

    def _losses(self) -> None:
        """Add what the recording as a whole lost, or was told to leave out."""
        ours = set(self.known.wanted_numbers())
        wanted = [a for a in self.perf.attrs if a.type == attrs.TRACEPOINT and a.config in ours]
        for kind, way in sorted({loss for attr in wanted for loss in attr.missing().items()}):
            self.tally.note(kind, None, f"record with {way}")
        if self._records.n_damaged:
            n_left = self.perf.data_at + self.perf.data_size - self._records.at
            self.tally.note("damaged", None, f"{max(0, n_left)} bytes of records")
        for detail in dict.fromkeys((self.perf.cut_short, self._records.cut_short)):
            if detail:
                self.tally.note("truncated", None, detail)
