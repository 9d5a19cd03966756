"""A perf.data, of a file or a pipe, becomes raw events in order of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.errors import FormatError
from tdxtrace.ingest.events.met import Vocabulary
from tdxtrace.ingest.headers import Header
from tdxtrace.ingest.perf import attrs
from tdxtrace.ingest.perf.blocks import RecordReader, Records
from tdxtrace.ingest.perf.file import PerfFile, read_head
from tdxtrace.ingest.perf.names import Names
from tdxtrace.ingest.perf.notes import Notes
from tdxtrace.ingest.perf.order import Held, Order
from tdxtrace.ingest.perf.samples import SampleReader, Samples, noise_name, printed_name
from tdxtrace.ingest.raw import RawEvents
from tdxtrace.ingest.records.datafile import DataFile
from tdxtrace.ingest.records.formats import common_of
from tdxtrace.ingest.records.gather import Places
from tdxtrace.ingest.records.known import KnownEvents
from tdxtrace.ingest.tally import Tally

_SAMPLE: Final = 9  # PERF_RECORD_SAMPLE, Linux include/uapi/linux/perf_event.h
_FINISHED_ROUND: Final = 68  # tools/perf/lib/include/perf/event.h
# A block of which so small a part is ours is not kept in memory for that.
_MUCH: Final = 4


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
    _stand_ins: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.perf = read_head(self.file)
        self.names = Names(self.tally)
        self._records = RecordReader(self.perf)
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
        is_first = True
        for records in self._records.blocks():
            kind = (records.block.words[records.start >> 2]).astype(np.intp)
            which = np.flatnonzero(kind == _SAMPLE)
            self.notes.take(records, np.flatnonzero(kind != _SAMPLE), kind)
            if len(which) and is_first:
                is_first = False
                self._begin()
            self._hold(records, which, np.flatnonzero(kind == _FINISHED_ROUND))
            made = self.order.ready()
            if made is not None:
                yield made
        if is_first:
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

    def _hold(self, records: Records, which: Places, rounds: Places) -> None:
        """Hand over the samples; a round ends behind those in front of its mark."""
        if not len(which):
            for _ in rounds:
                self.order.end_round(-1)
            return
        samples = self.samples.read(records, which)
        self.order.hold(self._held(samples))
        ends = np.searchsorted(which, rounds)
        newest = np.maximum.accumulate(samples.ts_ns)
        for end in ends.tolist():
            self.order.end_round(int(newest[end - 1]) if end else -1)

    def _held(self, samples: Samples) -> Held:
        known, block = self.known, samples.block
        self._name_silent(samples)
        number = samples.number
        every = known.are_wanted(known.meet(number, samples.base, block))
        ours = np.arange(len(number)) if every else np.flatnonzero(known.is_wanted(number))
        index = known.index(number[ours])
        fits = known.has_room(index, samples.size[ours])
        if not fits.all():
            for place, layout in zip(ours[~fits].tolist(), index[~fits].tolist(), strict=True):
                number[place] = self._stand_in("undecoded", known.layouts[layout].name)
            ours, index = ours[fits], index[fits]
        base = samples.base[ours]
        _, in_irq = known.context(block, base)
        is_much = len(ours) * _MUCH >= len(number)
        kept = known.kept(block, base, index) if is_much else None
        raw = RawEvents(
            np.zeros(len(ours), np.int64),
            samples.ts_ns[ours],
            samples.tid[ours],
            samples.tgid[ours],
            samples.cpu[ours],
            in_irq,
            known.events(index),
            *(({}, {}) if kept is not None else known.fields(block, base, index)),
            kept,
        )
        return Held(samples.ts_ns, samples.cpu, number, ours, raw)

    def _name_silent(self, samples: Samples) -> None:
        """Give samples without a record the number that stands for their attribute."""
        for attr in np.unique(samples.attr).tolist():
            name = noise_name(self.perf.attrs[attr], self.perf.names)
            mine = samples.silent[samples.attr == attr]
            samples.number[mine] = self._stand_in("noise", name)

    def _stand_in(self, kind: str, name: str) -> int:
        if (kind, name) not in self._stand_ins:
            self._stand_ins[kind, name] = self.known.stand_in(kind, name)
        return self._stand_ins[kind, name]

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
