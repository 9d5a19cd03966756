"""Parse the header of a perf.data: events, layouts of samples, event formats, clock, tool."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.errors import FormatError
from tdxtrace.ingest.records.datafile import Cursor, CutShortError, DataFile
from tdxtrace.ingest.records.formats import Formats, foreign_machine, part

_SWAPPED_MAGIC: Final = b"2ELIFREP"
_PIPE_HEADER: Final = 16
_MAX_ATTRS: Final = 1 << 16
_MAX_IDS_BYTES: Final = 1 << 20
# Features, tools/perf/util/header.h: bit numbers of the flags in the header.
TRACING_DATA, _OSRELEASE, _VERSION, _EVENT_DESC = 1, 4, 5, 12
_N_FEATURES: Final = 256

# enum perf_event_sample_format, Linux include/uapi/linux/perf_event.h: parts of a
# sample, in the order of _SAMPLE_ORDER; READ, CALLCHAIN and RAW have no fixed size, all
# others have eight bytes.
IP, TID, TIME, ADDR, READ, CALLCHAIN = 1, 2, 4, 8, 16, 32
ID, CPU, PERIOD, STREAM_ID, RAW, IDENTIFIER = 64, 128, 256, 512, 1024, 1 << 16
_SAMPLE_ORDER: Final = (IDENTIFIER, IP, TID, TIME, ADDR, ID, STREAM_ID, CPU, PERIOD)
# Parts at the end of other records if sample_id_all is set.
_TRAILER_ORDER: Final = (TID, TIME, ID, STREAM_ID, CPU, IDENTIFIER)
# enum perf_event_read_format.
_TIME_ENABLED, _TIME_RUNNING, _READ_ID, _GROUP, _READ_LOST = 1, 2, 4, 8, 16
TRACEPOINT: Final = 2  # PERF_TYPE_TRACEPOINT
# Bits of the flags after read_format in struct perf_event_attr.
_EXCLUDE_USER, _EXCLUDE_KERNEL, _FREQ, _SAMPLE_ID_ALL, _USE_CLOCKID = 4, 5, 10, 18, 25
# clockid_t, Linux include/uapi/linux/time.h, named as perf names them.
_CLOCKS: Final = {0: "realtime", 1: "monotonic", 4: "monotonic_raw", 7: "boottime", 11: "tai"}
# struct perf_event_attr: type, size, config, period, sample_type, read_format, flags.
_ATTR: Final = struct.Struct("<IIQQQQQ")
_MIN_ATTR: Final = 64  # PERF_ATTR_SIZE_VER0
_CLOCKID_AT: Final = 92


@dataclass(frozen=True, slots=True)
class Attr:
    """One event that perf recorded: its ``struct perf_event_attr``."""

    type: int
    config: int
    """For a tracepoint: its event ID."""
    period: int
    sample_type: int
    read_format: int
    flags: int
    clockid: int
    ids: tuple[int, ...]
    """IDs in its samples."""

    def has(self, bit: int) -> bool:
        """Return whether a bit of ``flags`` is set."""
        return bool(self.flags >> bit & 1)

    @property
    def is_tracepoint(self) -> bool:
        """Whether its samples contain tracepoint records."""
        return self.type == TRACEPOINT and bool(self.sample_type & RAW)

    @property
    def clock(self) -> str:
        """The clock of its timestamps, as perf names it."""
        if not self.has(_USE_CLOCKID):
            return "perf"
        return _CLOCKS.get(self.clockid, f"clockid {self.clockid}")

    @property
    def fixed(self) -> dict[int, int]:
        """Offsets of the fixed-size parts of a sample, in bytes from the end of its header."""
        return _offsets(_SAMPLE_ORDER, self.sample_type)

    @property
    def trailer(self) -> dict[int, int] | None:
        """Offsets of the parts at the end of other records, in bytes from the first; None: none."""
        if not self.has(_SAMPLE_ID_ALL):
            return None
        return _offsets(_TRAILER_ORDER, self.sample_type)

    @property
    def id_at(self) -> int:
        """Offset of a sample's ID, in bytes from the end of its header; -1: it has no ID."""
        fixed = self.fixed
        return fixed.get(IDENTIFIER, fixed.get(ID, -1))

    @property
    def read_words(self) -> tuple[int, int]:
        """Words that READ adds to a sample, and words per item counted by its first word."""
        if not self.sample_type & READ:
            return 0, 0
        each = 1 + bool(self.read_format & _READ_ID) + bool(self.read_format & _READ_LOST)
        times = bool(self.read_format & _TIME_ENABLED) + bool(self.read_format & _TIME_RUNNING)
        return (1 + times, each) if self.read_format & _GROUP else (each + times, 0)

    def missing(self) -> dict[str, str]:
        """Return the losses that its settings cause: by kind, how to run perf record instead."""
        has_no_record = self.type == TRACEPOINT and not self.sample_type & RAW
        is_excluded = self.has(_EXCLUDE_USER) or self.has(_EXCLUDE_KERNEL)
        kinds = (
            ("sampled", "-c 1 (every event)", self.has(_FREQ) or self.period > 1),
            ("no_payload", "-R (raw records)", has_no_record),
            ("no_time", "-T (times)", not self.sample_type & TIME),
            ("excluded", "events without :u or :k", is_excluded),
        )
        return {kind: way for kind, way, lacks in kinds if lacks}


def _offsets(order: tuple[int, ...], sample_type: int) -> dict[int, int]:
    present = [bit for bit in order if sample_type & bit]
    return {bit: 8 * place for place, bit in enumerate(present)}


@dataclass(slots=True)
class PerfFile:
    """A perf.data whose header was read; in pipe mode records make up the rest of the file."""

    file: DataFile
    data_at: int
    data_size: int
    attrs: list[Attr] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    """Name of the event by sample ID."""
    formats: Formats = field(default_factory=Formats)
    kernel: str | None = None
    tool: str | None = None
    cut_short: str = ""
    _n_id_bytes: int = 0
    """Bytes of sample IDs read so far; limited to the size of the file."""

    def take_attr(self, data: bytes, ids: bytes) -> None:
        """Parse a ``struct perf_event_attr`` and the IDs of its samples; add them to ``attrs``."""
        if len(data) < _MIN_ATTR or len(self.attrs) >= _MAX_ATTRS:
            return
        kind, _, config, period, sample_type, read_format, flags = _ATTR.unpack_from(data)
        clockid = int.from_bytes(data[_CLOCKID_AT : _CLOCKID_AT + 4], "little")
        numbers = tuple(np.frombuffer(ids[: len(ids) // 8 * 8], "<u8").tolist())
        made = Attr(kind, config, period, sample_type, read_format, flags, clockid, numbers)
        self.attrs.append(made)

    def ids(self, at: int, size: int) -> bytes:
        """Read the sample IDs of an event; the IDs of different events do not overlap."""
        found = self.file.read(at, min(size, _MAX_IDS_BYTES, self.file.size - self._n_id_bytes))
        self._n_id_bytes += len(found)
        return found

    def take_feature(self, number: int, data: bytes) -> None:
        """Parse feature ``number`` of the header or of a FEATURE record.

        Raises:
            FormatError: If the recording is from a big-endian or 32-bit machine.
        """
        cursor = Cursor(data)
        try:
            if number == TRACING_DATA:
                self._tracing_data(data)
            elif number == _OSRELEASE:
                self.kernel = _string(cursor)
            elif number == _VERSION:
                self.tool = f"perf {_string(cursor)}"
            elif number == _EVENT_DESC:
                self._event_desc(cursor)
        except CutShortError:
            self.cut_short = self.cut_short or f"feature {number} of the header is damaged"

    def _tracing_data(self, data: bytes) -> None:
        """Read the kernel's formats, which are laid out as in a trace.dat of version 6."""
        cursor = Cursor(data, at=10)
        cursor.text()
        is_big_endian, long_size = cursor.take(2)
        if is_big_endian == 1 or long_size == 4:
            raise _foreign_machine(self.file, is_big_endian == 1)
        cursor.take(4)
        self.formats.read_headers(cursor)
        self.formats.read_ftrace(cursor)
        self.formats.read_events(cursor)

    def _event_desc(self, cursor: Cursor) -> None:
        n_events, size = cursor.number(4), cursor.number(4)
        for _ in range(min(n_events, _MAX_ATTRS)):
            cursor.take(size)
            n_ids, name = cursor.number(4), _string(cursor)
            for _ in range(n_ids):
                self.names[cursor.number(8)] = name

    def event_name(self, attr: int) -> str:
        """Return perf's name of an attribute's event, also for events other than tracepoints."""
        made = self.attrs[attr]
        named = next((self.names[i] for i in made.ids if i in self.names), None)
        return named or f"event type {made.type} config {made.config:#x}"


def _string(cursor: Cursor) -> str:
    return cursor.take(cursor.number(4)).partition(b"\0")[0].decode("utf-8", "replace")


def _foreign_machine(file: DataFile, is_big_endian: bool) -> FormatError:
    return foreign_machine(file.shown, is_big_endian, f"print it: perf script -i {file.shown}")


def read_head(file: DataFile) -> PerfFile:
    """Read the header and the features that it lists.

    Raises:
        FormatError: If it is damaged, or from a big-endian or 32-bit machine.
    """
    if file.read(0, 8) == _SWAPPED_MAGIC:
        raise _foreign_machine(file, True)
    cursor = Cursor(file, at=8)
    try:
        if cursor.number(8) == _PIPE_HEADER:
            return PerfFile(file, _PIPE_HEADER, file.size - _PIPE_HEADER)
        attr_size = cursor.number(8)
        attrs, data, _ = (_section(cursor) for _ in range(3))
        flags = [cursor.number(8) for _ in range(4)]
    except CutShortError:
        raise FormatError(
            f"{file.shown} is a truncated perf.data: its header is incomplete"
        ) from None
    perf = PerfFile(file, *data)
    if not 80 <= attr_size <= 4096:
        raise FormatError(f"{file.shown} is a damaged perf.data: attributes of {attr_size} bytes")
    _attrs(perf, *attrs, attr_size)
    if not perf.data_size or perf.data_at + perf.data_size > file.size:
        # perf writes the size last: it was killed, or the copy is cut short.
        perf.data_size = max(0, file.size - perf.data_at)
        perf.cut_short = "the file ends in its data: perf record was killed, or the copy is cut"
    else:
        _features(perf, flags)
    return perf


def _section(cursor: Cursor) -> tuple[int, int]:
    return cursor.number(8), cursor.number(8)


def _attrs(perf: PerfFile, at: int, size: int, attr_size: int) -> None:
    cursor = Cursor(perf.file, at=at)
    for _ in range(min(size // attr_size, _MAX_ATTRS)):
        try:
            data = cursor.take(attr_size - 16)
            ids_at, ids_size = _section(cursor)
        except CutShortError:
            perf.cut_short = "the file ends in its attributes"
            return
        perf.take_attr(data, perf.ids(ids_at, ids_size))


def _features(perf: PerfFile, flags: list[int]) -> None:
    table = Cursor(perf.file, at=perf.data_at + perf.data_size)
    for number in range(_N_FEATURES):
        if not flags[number // 64] >> number % 64 & 1:
            continue
        try:
            at, size = _section(table)
            if number in (TRACING_DATA, _OSRELEASE, _VERSION, _EVENT_DESC):
                perf.take_feature(number, part(Cursor(perf.file, at=at), size))
        except CutShortError:
            perf.cut_short = perf.cut_short or "the file ends in its list of features"
            return
