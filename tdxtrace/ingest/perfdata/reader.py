"""Read a perf.data from a file or a pipe: records in blocks, events in time order."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from tdxtrace.compiler import Runner
from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import MAX_CPUS, UNKNOWN, I32Array, Index, RecordBatch
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.loops import perf_records as kinds
from tdxtrace.ingest.loops.perf_records import END, FIRST_SAMPLE
from tdxtrace.ingest.perfdata.file import (
    CPU,
    TIME,
    TRACEPOINT,
    TRACING_DATA,
    Attr,
    PerfFile,
    read_head,
)
from tdxtrace.ingest.perfdata.ordered_events import LostSamples, OrderedBatch, OrderedEvents
from tdxtrace.ingest.records.datafile import CutShortError, DataFile
from tdxtrace.ingest.records.formats import EventFormat
from tdxtrace.ingest.records.layouts import PADDING, EventCatalog
from tdxtrace.ingest.stats import Header, SourceStats

# enum perf_event_type, Linux include/uapi/linux/perf_event.h, and enum
# perf_user_event_type, tools/perf/lib/include/perf/event.h.
_LOST, _COMM, _THROTTLE, _FORK, _LOST_SAMPLES = 2, 3, 5, 7, 13
_ATTR, _FINISHED_ROUND, _FEATURE = 64, 68, 80
# Record types of the kernel (1 to 21) and of perf (64 to 84); those without a constant
# above are ignored.
_KNOWN_TYPES: Final = frozenset([*range(1, 22), *range(64, 85)])
_FILTERED: Final = 1 << 15  # PERF_RECORD_MISC_LOST_SAMPLES_BPF: dropped by a filter, not lost
_NO_TIME: Final = -1
_MAX_TIME: Final = (1 << 63) - 1
_RECORD_HEADER: Final = struct.Struct("<IHH")  # type, misc, size
_COMM_NAME_AT: Final = 16
_MAX_NAME: Final = 64


@dataclass(slots=True)
class ThreadNames:
    """The names of threads over time, from COMM and FORK records."""

    stats: SourceStats
    _changes: list[tuple[int, int, int | str]] = field(default_factory=list)
    """Time, thread, and its new name or the thread it was forked from; in file order."""
    _named: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    """By thread: start time and name; only names that may still be needed."""

    def change(self, ts_ns: int, tid: int, name: int | str) -> None:
        """Add the new name of a thread, or the thread that it was forked from."""
        self._changes.append((ts_ns, tid, name))

    def record(self, batch: RecordBatch, limit: int, tids: I32Array, first_row: Index) -> None:
        """Record the threads of events in ``stats``, with the names valid at the events' times.

        Args:
            batch: The events.
            limit: Latest possible time of the events, in ns.
            tids: The threads of the events.
            first_row: The first event of each thread.
        """
        self._apply(limit)
        rows, of_tid = np.empty(0, np.int64), np.empty(0, np.int32)
        if any(len(self._named.get(tid, ())) > 1 for tid in tids.tolist()):
            rows = np.argsort(batch.tid, kind="stable")
            of_tid = batch.tid[rows]
        for tid, row in zip(tids.tolist(), first_row.tolist(), strict=True):
            names, tgid = self._named.get(tid), int(batch.tgid[row])
            if names is None:
                self.stats.record_thread(tid, "swapper" if tid == 0 else f":{tid}", tgid)
            elif len(names) == 1:
                self.stats.record_thread(tid, names[0][1], tgid)
            else:
                since = np.array([ts_ns for ts_ns, _ in names], np.int64)
                first = np.searchsorted(of_tid, tid)
                past_end = np.searchsorted(of_tid, tid, "right")
                indexes = np.searchsorted(since, batch.ts_ns[rows[first:past_end]], "right") - 1
                for index in np.unique(np.maximum(indexes, 0)).tolist():
                    self.stats.record_thread(tid, names[index][1], tgid)
                self._named[tid] = names[-1:]

    def _apply(self, limit: int) -> None:
        self._changes.sort(key=lambda change: change[0])
        n_due = bisect_right(self._changes, limit, key=lambda change: change[0])
        for ts_ns, tid, name_or_parent in self._changes[:n_due]:
            if isinstance(name_or_parent, str):
                name: str | None = name_or_parent
            else:
                parent = self._named.get(name_or_parent)
                name = parent[-1][1] if parent else None
            if name is not None:
                self._named.setdefault(tid, []).append((ts_ns, name))
        del self._changes[:n_due]


@dataclass(slots=True)
class SidebandRecords:
    """Processes the records that are not samples, one at a time, in file order."""

    perf: PerfFile
    stats: SourceStats
    names: ThreadNames
    ordered: OrderedEvents

    def process(self, record: bytes, newest: int) -> None:
        """Process a record; ``newest`` is the time of the newest sample before it, ns."""
        kind, _, _ = _RECORD_HEADER.unpack_from(record)
        self.stats.n_lines += 1
        self.stats.n_headers += 1
        handlers = {
            _LOST: self._lost,
            _COMM: self._comm,
            _THROTTLE: self._throttle,
            _FORK: self._fork,
            _LOST_SAMPLES: self._lost_samples,
            _ATTR: self._attr,
            _FINISHED_ROUND: lambda _, newest: self.ordered.end_round(newest),
            _FEATURE: self._feature,
        }
        if kind in handlers:
            try:
                handlers[kind](record, newest)
            except (CutShortError, struct.error):
                self._record_unknown("undecoded", kind)
        elif kind not in _KNOWN_TYPES:
            self._record_unknown("unknown_record", kind)

    def _record_unknown(self, loss: str, kind: int) -> None:
        self.stats.count(loss, f"record of type {kind}", None)
        self.stats.n_headers -= 1

    def _trailer(self, record: bytes) -> tuple[int, int]:
        """Return time and CPU of a record; _AT_NO_TIME and UNKNOWN if it does not have them."""
        places = self.perf.attrs[0].trailer if self.perf.attrs else None
        if places is None:
            return _NO_TIME, UNKNOWN
        begin = len(record) - 8 * len(places)
        if begin < _RECORD_HEADER.size:
            raise CutShortError
        time, cpu = _NO_TIME, UNKNOWN
        if TIME in places:
            time = min(struct.unpack_from("<Q", record, begin + places[TIME])[0], _MAX_TIME)
        if CPU in places:
            (number,) = struct.unpack_from("<I", record, begin + places[CPU])
            cpu = number if number < MAX_CPUS else UNKNOWN
        return time, cpu

    def _lost(self, record: bytes, newest: int) -> None:
        """Process LOST: a number of dropped samples; without a time, at the time ``newest``."""
        _, n_events = struct.unpack_from("<QQ", record, 8)
        time, cpu = self._trailer(record)
        if n_events:
            self.ordered.lost.append(LostSamples(newest if time < 0 else time, cpu, n_events))
            self.stats.n_headers -= 1

    def _lost_samples(self, record: bytes, _: int) -> None:
        """Process LOST_SAMPLES: a number of samples that were never written, at unknown times."""
        misc, _, n_events = struct.unpack_from("<HHQ", record, 4)
        if not misc & _FILTERED:
            self.stats.record_loss("lost_events", n_events, "LOST_SAMPLES record, no place")

    def _throttle(self, record: bytes, _: int) -> None:
        time, cpu = self._trailer(record)
        start = {"start_ns": time} if time >= 0 else {}
        self.stats.record_loss("throttled", None, f"{self.stats.n_lines}", cpu=cpu, **start)

    def _comm(self, record: bytes, _: int) -> None:
        _, tid = struct.unpack_from("<ii", record, 8)
        end = record.find(b"\0", _COMM_NAME_AT)
        if end < 0:
            raise CutShortError
        name = record[_COMM_NAME_AT:end].decode("utf-8", "replace")[:_MAX_NAME]
        self.names.change(max(0, self._trailer(record)[0]), tid, name)

    def _fork(self, record: bytes, _: int) -> None:
        _, _, tid, parent, time = struct.unpack_from("<iiiiQ", record, 8)
        self.names.change(min(time, _MAX_TIME), tid, parent)

    def _attr(self, record: bytes, _: int) -> None:
        """Process ATTR, an event's attributes in pipe mode; their second word is their size."""
        (size,) = struct.unpack_from("<I", record, 12)
        self.perf.take_attr(record[8 : 8 + size], record[8 + size :])

    def _feature(self, record: bytes, _: int) -> None:
        (number,) = struct.unpack_from("<Q", record, 8)
        self.perf.take_feature(number, record[16:])


Bytes = NDArray[np.uint8]
ProcessBlock = Callable[[Bytes, int], int]
"""Processes the records at the start of a block of the given number of bytes, and returns the byte
of the first record left; PADDING zeros follow the block."""

# A block should stay in the processor's cache until the last loop has read it: 2, 4 and
# 8 MiB took 1.44, 1.33 and 1.35 s for 12 million samples.
_BLOCK_BYTES: Final = 4 << 20
# Size of the first block, and of a block after a record that ``process_block`` leaves: the next
# record may be one too.
_SMALL_BYTES: Final = 8 << 10
_HEADER: Final = 8
_MAX_RECORD: Final = 1 << 16
# A record has at most 64 KiB of compressed data; its unpacked size is limited so that a
# decompression bomb does not fill the memory.
_MAX_UNPACKED: Final = 64 << 20
_MAX_RATIO: Final = 1000
# Compressed bytes unpacked at a time: four bytes can unpack to 128 KiB (RFC 8878, 3.1.1.2.2).
_SLICE_BYTES: Final = 1024


class _Zstd(Protocol):
    def decompress(self, data: bytes, /) -> bytes:
        """Return the bytes that ``data`` adds to the unpacked stream."""


@dataclass(slots=True)
class RecordReader:
    """Reads the records of a perf.data, in file order."""

    perf: PerfFile
    at: int = field(init=False)
    """Offset in the file up to which records were read."""
    is_damaged: bool = False
    """Whether reading stopped at an invalid record."""
    cut_short: str = ""
    _block: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    _zstd: _Zstd | None = None
    _partial_record: bytes = b""
    _n_packed: int = 0
    _n_unpacked: int = 0
    _end: int = field(init=False)

    def __post_init__(self) -> None:
        self.at = self.perf.data_at
        self._end = min(self.perf.data_at + self.perf.data_size, self.perf.file.size)

    def read(self, process_block: ProcessBlock) -> Iterator[None]:
        """Call ``process_block`` for one block after the other; yield after each.

        The next block overwrites the previous one.  If ``process_block`` leaves the first record of
        a block, that record is processed here.
        """
        window = _SMALL_BYTES
        while self.at < self._end:
            n_bytes = self._fill(min(window, self._end - self.at))
            n_taken = process_block(self._block, n_bytes)
            self.at += n_taken
            window = min(4 * window, _BLOCK_BYTES) if n_taken else _SMALL_BYTES
            if not n_taken and not self._process_one(process_block):
                break
            yield
        if self._partial_record:
            self.cut_short = self.cut_short or "compressed records end in the middle"

    def _fill(self, n_wanted: int) -> int:
        if len(self._block) < n_wanted + PADDING:
            self._block = np.empty(n_wanted + PADDING, np.uint8)
        n_bytes = self.perf.file.fill(self.at, self._block[:n_wanted])
        self._block[n_bytes : n_bytes + PADDING] = 0
        return n_bytes

    def _process_one(self, process_block: ProcessBlock) -> bool:
        """Process the record at ``at``, which is longer than its block or of a rare type.

        Returns:
            False at the end, and at an invalid record, after which no next one can be found.
        """
        head = self.perf.file.read(self.at, _HEADER)
        size, kind = int.from_bytes(head[6:8], "little"), int.from_bytes(head[:4], "little")
        if len(head) == _HEADER and size < _HEADER:
            self.is_damaged = True
            return False
        if len(head) < _HEADER or self.at + size > self._end:
            self.cut_short = "the file ends in the middle of a record"
            return False
        body = self.perf.file.read(self.at + _HEADER, size - _HEADER)
        self.at += size
        if kind in (kinds.COMPRESSED, kinds.COMPRESSED2):
            self._unpack(body, kind, process_block)
        elif kind == kinds.AUXTRACE:
            self.at += int.from_bytes(body[:8], "little")
        elif kind == kinds.TRACING_DATA:
            n_bytes = int.from_bytes(body[:4], "little")
            self.perf.take_feature(TRACING_DATA, self.perf.file.read(self.at, n_bytes))
            self.at += (n_bytes + 7) // 8 * 8
        else:
            process_block(_padded(head + body), size)
        return True

    def _unpack(self, body: bytes, kind: int, process_block: ProcessBlock) -> None:
        """Unpack the next part of the stream that all compressed records form, and process it."""
        if kind == kinds.COMPRESSED2:
            body = body[8 : 8 + int.from_bytes(body[:8], "little")]
        unpacked = self._unpacked(body)
        if unpacked is None:
            self.is_damaged, self.at = True, self._end
            return
        data = self._partial_record + unpacked
        self._partial_record = data[process_block(_padded(data), len(data)) :]
        if len(self._partial_record) > _MAX_RECORD:
            # No record is that long: this one is damaged, and no later one can be found.
            self.is_damaged, self._partial_record, self.at = True, b"", self._end

    def _unpacked(self, body: bytes) -> bytes | None:
        import zstandard  # noqa: PLC0415 - slow to import, seldom needed

        if self._zstd is None:
            self._zstd = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(
                read_across_frames=True
            )
        output = bytearray()
        for start in range(0, len(body), _SLICE_BYTES):
            try:
                output += self._zstd.decompress(body[start : start + _SLICE_BYTES])
            except (zstandard.ZstdError, MemoryError):
                return None
            if len(output) > _MAX_UNPACKED:
                return None
        self._n_packed += len(body)
        self._n_unpacked += len(output)
        bound = _MAX_RATIO * self._n_packed + _MAX_UNPACKED
        return bytes(output) if self._n_unpacked < bound else None


def _padded(data: bytes) -> Bytes:
    return np.frombuffer(data + bytes(PADDING), np.uint8).copy()


@dataclass(slots=True)
class PerfReader:
    """Reads one perf.data into batches of events, and counts all other records."""

    file: DataFile
    registry: EventRegistry
    stats: SourceStats
    perf: PerfFile = field(init=False)
    names: ThreadNames = field(init=False)
    ordered: OrderedEvents = field(init=False)
    sideband: SidebandRecords = field(init=False)
    _catalog: EventCatalog = field(init=False)
    _has_begun: bool = False
    """Whether the events are set up for decoding."""
    _records: RecordReader = field(init=False)

    def __post_init__(self) -> None:
        self.perf = read_head(self.file)
        self.names = ThreadNames(self.stats)
        self.ordered = OrderedEvents(self.stats)
        self.sideband = SidebandRecords(self.perf, self.stats, self.names, self.ordered)
        self._records = RecordReader(self.perf)
        self._set_events({}, [])

    def _set_events(self, formats: Mapping[int, EventFormat], attrs: Sequence[Attr]) -> None:
        self._catalog = EventCatalog(formats, self.registry, self.stats, _printed_name)
        self.ordered.set_events(attrs, self.perf.event_name, self._catalog)

    @property
    def n_bytes(self) -> int:
        """Size of the file in bytes."""
        return self.file.size

    def batches(self, run: Runner[Any]) -> Iterator[RecordBatch]:
        """Yield the events that may become rows, in time order.

        Raises:
            FormatError: If the file has no attributes or formats of the events.
        """
        self.ordered.run = run
        for _ in self._records.read(self._process_block):
            yield from self._batch(self.ordered.ready())
        if not self._has_begun:
            self._begin()
        yield from self._batch(self.ordered.flush())
        self._record_losses()

    @property
    def position(self) -> int:
        """Number of bytes of the file read so far, for progress."""
        return self._records.at

    def header(self) -> Header:
        """Return the metadata of the recording, from the file."""
        clocks = {attr.clock for attr in self.perf.attrs}
        clock = clocks.pop() if len(clocks) == 1 else None
        return Header(self.perf.kernel, self.perf.tool or "perf", clock, None, None, True)

    def _process_block(self, data: Bytes, n_bytes: int) -> int:
        """Process the records of a block; return the byte of the first one that was left."""
        reason, at = FIRST_SAMPLE, 0
        while reason != END:
            reason, at, records = self.ordered.queue(data, at, n_bytes)
            for offset, newest in records:
                size = int.from_bytes(data[offset + 6 : offset + 8].tobytes(), "little")
                self.sideband.process(data[offset : offset + size].tobytes(), newest)
            if reason == FIRST_SAMPLE:
                self._begin()
        return at

    def _begin(self) -> None:
        """Set up decoding of the events, all of which are described before the first sample."""
        if not self.perf.attrs:
            raise FormatError(f"{self.file.shown} is a perf.data without event attributes")
        if not self.perf.formats.events and any(attr.is_tracepoint for attr in self.perf.attrs):
            raise FormatError(
                f"{self.file.shown} has no event formats"
                + (f": {self.perf.cut_short}" if self.perf.cut_short else "")
                + "; perf record writes them when it ends by itself or by Ctrl-C"
            )
        self._has_begun = True
        self._set_events(self.perf.formats.events, self.perf.attrs)

    def _batch(self, ordered: OrderedBatch | None) -> Iterator[RecordBatch]:
        """Yield the batch of ``ordered``, unless it is None, and record its threads."""
        if ordered is not None:
            self.names.record(ordered.batch, ordered.limit, ordered.tids, ordered.first_row)
            yield ordered.batch

    def _record_losses(self) -> None:
        """Record losses of the whole recording, and those that its settings caused."""
        used_ids = set(self._catalog.used_event_ids())
        used_attrs = [a for a in self.perf.attrs if a.type == TRACEPOINT and a.config in used_ids]
        for kind, option in sorted(
            {loss for attr in used_attrs for loss in attr.missing().items()}
        ):
            self.stats.record_loss(kind, None, f"record with {option}")
        if self._records.is_damaged:
            n_left = self.perf.data_at + self.perf.data_size - self._records.at
            self.stats.record_loss("damaged", None, f"{max(0, n_left)} bytes of records")
        for detail in dict.fromkeys((self.perf.cut_short, self._records.cut_short)):
            if detail:
                self.stats.record_loss("truncated", None, detail)


def _printed_name(event: EventFormat) -> str:
    """Return the name of a tracepoint as perf script prints it."""
    return f"{event.system}:{event.name}"
