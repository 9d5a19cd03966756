"""What the head of a perf.data says: events, formats, clock, tool, where the data is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tdxtrace.errors import FormatError
from tdxtrace.ingest.perf.attrs import Attr, attr_of
from tdxtrace.ingest.records.cursor import Cursor, CutShortError, FileCursor
from tdxtrace.ingest.records.datafile import DataFile
from tdxtrace.ingest.records.metadata import Formats, part

MAGICS: Final = {b"PERFILE2": False, b"2ELIFREP": True}  # by byte order: is it big-endian
_PIPE_HEADER: Final = 16
_MAX_ATTRS: Final = 1 << 16
# Features, tools/perf/util/header.h: bit numbers of the flags in the header.
TRACING_DATA, _OSRELEASE, _VERSION, _CMDLINE, _EVENT_DESC = 1, 4, 5, 11, 12
_COMPRESSED_ZSTD: Final = 1
_N_FEATURES: Final = 256


@dataclass(slots=True)
class PerfFile:
    """A perf.data whose head was read; in pipe mode the records fill the rest."""

    file: DataFile
    big_endian: bool
    is_pipe: bool
    data_at: int
    data_size: int
    attrs: list[Attr] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    """Name of the event, by sample id."""
    formats: Formats = field(default_factory=Formats)
    kernel: str | None = None
    tool: str | None = None
    cut_short: str = ""

    def take_attr(self, data: bytes, ids: tuple[int, ...]) -> None:
        """Take an event's attributes."""
        made = attr_of(data, self.big_endian, ids)
        if made is not None and len(self.attrs) < _MAX_ATTRS:
            self.attrs.append(made)

    def take_feature(self, number: int, data: bytes) -> None:
        """Take what the header or a record says of the recording."""
        cursor = Cursor(data, self.big_endian)
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
        """Read the kernel's formats: laid out like the head of a trace.dat of version 6."""
        cursor = Cursor(data, False, 10)
        cursor.text()
        cursor.big_endian = cursor.number(1) == 1
        cursor.take(5)
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


def _string(cursor: Cursor) -> str:
    return cursor.take(cursor.number(4)).partition(b"\0")[0].decode("utf-8", "replace")


def read_head(file: DataFile) -> PerfFile:
    """Read the header, and the features that it lists.

    Raises:
        FormatError: If it is damaged.
    """
    big_endian = MAGICS[file.read(0, 8)]
    cursor = FileCursor(file, big_endian, 8)
    try:
        if cursor.number(8) == _PIPE_HEADER:
            return PerfFile(file, big_endian, True, _PIPE_HEADER, file.size - _PIPE_HEADER)
        attr_size = cursor.number(8)
        attrs, data, _ = (_section(cursor) for _ in range(3))
        flags = [cursor.number(8) for _ in range(4)]
    except CutShortError:
        raise FormatError(f"{file.shown} is a perf.data cut short in its header") from None
    perf = PerfFile(file, big_endian, False, *data)
    if not 80 <= attr_size <= 4096:
        raise FormatError(f"{file.shown} is a damaged perf.data: attributes of {attr_size} bytes")
    _attrs(perf, *attrs, attr_size)
    if not perf.data_size or perf.data_at + perf.data_size > file.size:
        # perf writes the size last: the recorder was killed, or the copy is cut.
        perf.data_size = max(0, file.size - perf.data_at)
        perf.cut_short = "the file ends in its data: perf record was killed, or the copy is cut"
    else:
        _features(perf, flags)
    return perf


def _section(cursor: FileCursor) -> tuple[int, int]:
    return cursor.number(8), cursor.number(8)


def _attrs(perf: PerfFile, at: int, size: int, attr_size: int) -> None:
    cursor = FileCursor(perf.file, perf.big_endian, at)
    for _ in range(min(size // attr_size, _MAX_ATTRS)):
        try:
            data = cursor.take(attr_size - 16)
            ids_at, ids_size = _section(cursor)
            ids = Cursor(perf.file.read(ids_at, min(ids_size, 1 << 20)), perf.big_endian)
            perf.take_attr(data, tuple(ids.number(8) for _ in range(ids.left // 8)))
        except CutShortError:
            perf.cut_short = "the file ends in its attributes"
            return


def _features(perf: PerfFile, flags: list[int]) -> None:
    table = FileCursor(perf.file, perf.big_endian, perf.data_at + perf.data_size)
    for number in range(_N_FEATURES):
        if not flags[number // 64] >> number % 64 & 1:
            continue
        try:
            at, size = _section(table)
            if number in (TRACING_DATA, _OSRELEASE, _VERSION, _EVENT_DESC):
                perf.take_feature(number, part(FileCursor(perf.file, False, at), size))
        except CutShortError:
            perf.cut_short = perf.cut_short or "the file ends in its list of features"
            return
