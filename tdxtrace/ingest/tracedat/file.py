"""Find and decompress the parts of a trace.dat of version 6 or 7."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from tdxtrace.errors import FormatError
from tdxtrace.ingest.events.registry import functions
from tdxtrace.ingest.records.datafile import (
    MAX_PART_BYTES,
    Cursor,
    CutShortError,
    DamagedPartError,
    DataFile,
    Unpack,
    is_plausible,
    unpacker,
)
from tdxtrace.ingest.records.formats import (
    MAX_PAGE_BYTES,
    Formats,
    foreign_machine,
    page_size_of,
    part,
)
from tdxtrace.ingest.tracedat import options
from tdxtrace.ingest.tracedat.merge import find_cpus
from tdxtrace.ingest.tracedat.options import Buffer, CpuData, Options

MAGIC: Final = b"\x17\x08\x44tracing"
_COMPRESSED: Final = 1
_OPTIONS_SECTION: Final = 0
_BUFFER_SECTION: Final = 3
# Bytes of a section's header: number, flags, description, length.
_SECTION_HEADER_BYTES: Final = 16
# Most sections visited in search of pages: a file has some ten.
_MAX_SECTIONS: Final = 1 << 10
# Highest number of a section or option: trace-cmd.dat.v7(5), BUFFER_TEXT.
_MAX_SECTION: Final = 22


@dataclass(frozen=True, slots=True)
class _BufferSection:
    """The section of a buffer, found by walking the sections."""

    at: int
    size: int
    is_compressed: bool


@dataclass(slots=True)
class DatFile:
    """A trace.dat without its trace data; parts that it lacks are empty."""

    file: DataFile
    version: int
    page_size: int
    compression: str = "none"
    unpack: Unpack | None = None
    formats: Formats = field(default_factory=Formats)
    cmdlines: str = ""
    options: Options = field(default_factory=Options)
    cut_short: str = ""
    """Where the file ends early or is damaged, as text; "" if it is complete."""


def read_dat(file: DataFile) -> DatFile:
    """Read everything but the trace data.

    Raises:
        FormatError: If its version, machine or compression is unsupported, or its header is
            damaged.
    """
    cursor = Cursor(file, at=len(MAGIC))
    try:
        version = cursor.text(8)
        if version not in ("6", "7"):
            raise FormatError(
                f"{file.shown} is a trace.dat of version {version!r}; tdxtrace reads 6 and "
                "7: convert it with trace-cmd convert"
            )
        is_big_endian, long_size = cursor.number(1) == 1, cursor.number(1)
        if is_big_endian or long_size == 4:
            raise foreign_machine(
                file.shown, is_big_endian, f"print it with trace-cmd report {file.shown}"
            )
        page_size = cursor.number(4)
    except CutShortError:
        raise FormatError(
            f"{file.shown} is a truncated trace.dat: its header is incomplete"
        ) from None
    if long_size != 8 or not 64 <= page_size <= MAX_PAGE_BYTES or page_size % 4:
        raise FormatError(
            f"{file.shown} is a damaged trace.dat: its header has longs of {long_size} and pages "
            f"of {page_size} bytes"
        )
    dat = DatFile(file, int(version), page_size)
    if dat.version == 7:
        _read_v7(dat, cursor)
    else:
        _read_v6(dat, cursor)
    _remove_overlaps(dat)
    return dat


def _remove_overlaps(dat: DatFile) -> None:
    """Cut the data of each CPU where that of another begins, so that no byte is read twice."""
    cpu_data = [data for buffer in dat.options.buffers for data in buffer.cpus if data.size]
    starts = sorted({data.at for data in cpu_data})
    next_start = dict(pairwise(starts))
    unique: dict[int, CpuData] = {}
    for data in cpu_data:
        size = min(data.size, next_start.get(data.at, data.at + data.size) - data.at)
        unique.setdefault(data.at, replace(data, size=size))
    if list(unique.values()) == cpu_data:
        return
    dat.cut_short = dat.cut_short or "the data of its CPUs overlap"
    dat.options.buffers = [
        replace(b, cpus=tuple(unique.pop(d.at) for d in b.cpus if d.size and d.at in unique))
        for b in dat.options.buffers
    ]


def _read_v6(dat: DatFile, cursor: Cursor) -> None:
    """Read version 6, in which the parts follow one another."""
    part_name = "the event formats"
    try:
        dat.formats.read_headers(cursor)
        dat.formats.read_ftrace(cursor)
        dat.formats.read_events(cursor)
        part_name = "kallsyms"
        dat.options.parts[options.KALLSYMS] = cursor.at
        cursor.skip(cursor.number(4))
        part_name = "the printk formats"
        cursor.skip(cursor.number(4))
        part_name = "the command lines"
        dat.cmdlines = part(cursor, cursor.number(8)).decode("utf-8", "replace")
        part_name = "the options"
        _options_v6(dat, cursor)
    except CutShortError:
        dat.cut_short = f"the file ends in {part_name}"


def _options_v6(dat: DatFile, cursor: Cursor) -> None:
    n_cpus = cursor.number(4)
    kind = cursor.take(10)
    if kind.startswith(b"options"):
        while (number := cursor.number(2)) != options.DONE:
            data = part(cursor, cursor.number(4))
            dat.options.parse(number, data, False)
        kind = cursor.take(10)
    n_cpus = dat.options.n_cpus if dat.options.n_cpus is not None else n_cpus
    others = dat.options.buffers
    dat.options.buffers = [_buffer_v6(dat, cursor, kind, n_cpus, "")]
    for other in others:
        cursor.at = other.at
        dat.options.buffers.append(_buffer_v6(dat, cursor, cursor.take(10), n_cpus, other.name))


def _buffer_v6(dat: DatFile, cursor: Cursor, kind: bytes, n_cpus: int, name: str) -> Buffer:
    if kind.startswith(b"latency"):
        return Buffer(name, cursor.at, is_text=True)
    if not kind.startswith(b"flyrecord"):
        raise CutShortError
    table = Cursor(part(cursor, 16 * n_cpus))
    cpus = tuple(CpuData(cpu, table.number(8), table.number(8)) for cpu in range(n_cpus))
    if dat.options.has_clock and not name:
        text = part(cursor, cursor.number(8))
        dat.options.clock = options.clock_of(text.decode("utf-8", "replace"))
    return Buffer(name, cursor.at, page_size=dat.page_size, cpus=cpus)


def _read_v7(dat: DatFile, cursor: Cursor) -> None:
    """Read version 7: options have the offsets of parts; an option list may link to the next."""
    try:
        dat.compression = cursor.text(32)
        cursor.text(64)
        dat.unpack = unpacker(dat.compression, dat.file.shown)
        at = cursor.number(8)
    except CutShortError:
        raise FormatError(
            f"{dat.file.shown} is a truncated trace.dat: its header is incomplete"
        ) from None
    visited: set[int] = set()
    while at and at not in visited:
        visited.add(at)
        try:
            at = _options_v7(dat, Cursor(_section(dat, at, _OPTIONS_SECTION)))
        except CutShortError:
            dat.cut_short = "the file ends before its last list of options"
            break
        except DamagedPartError:
            dat.cut_short = "an options section is damaged"
            break
    if at and at in visited and not dat.cut_short:
        dat.cut_short = "its lists of options form a cycle"
    if dat.cut_short and not dat.options.buffers:
        found = _walk_sections(dat, cursor.at, visited)
        _parts_v7(dat)
        dat.options.buffers = [_buffer_without_cpus(dat, section) for section in found]
        if any(data.cpu < 0 for buffer in dat.options.buffers for data in buffer.cpus):
            dat.cut_short += "; the CPUs of its pages are unknown"
    else:
        _parts_v7(dat)


def _walk_sections(dat: DatFile, at: int, visited: set[int]) -> list[_BufferSection]:
    """Walk the sections, as their list is missing; return those of buffers.

    Each section has its length, but a buffer section only if it was written completely.
    """
    buffers: list[_BufferSection] = []
    for _ in range(_MAX_SECTIONS):
        head = Cursor(dat.file, at=at)
        try:
            number, flags = head.number(2), head.number(2)
            head.skip(4)
            size = head.number(8)
        except CutShortError:
            break
        if number == _BUFFER_SECTION:
            is_open = not size
            size = size or dat.file.size - head.at
            buffers.append(_BufferSection(at, size, bool(flags & _COMPRESSED)))
            if is_open:
                break
        elif number in options.PARTS:
            dat.options.parts.setdefault(number, at)
        elif number == _OPTIONS_SECTION and size and at not in visited:
            with suppress(CutShortError, DamagedPartError):
                _options_v7(dat, Cursor(_section(dat, at, _OPTIONS_SECTION)))
        elif number > _MAX_SECTION or not size:
            break
        at = head.at + size
    return [] if dat.options.buffers else buffers


def _buffer_without_cpus(dat: DatFile, found: _BufferSection) -> Buffer:
    """Return a buffer whose list of CPUs is missing, and with it the buffer's name and clock."""
    size = page_size_of(dat.formats.header_page) or dat.page_size
    # Guest clocks are corrected by CPU, which is impossible without the list.
    if dat.options.shifts:
        return Buffer("", found.at, page_size=size)
    at = found.at + _SECTION_HEADER_BYTES
    end = min(at + found.size, dat.file.size)
    cpus = find_cpus(dat.file, (at, end), size, found.is_compressed, dat.options.n_cpus)
    return Buffer("", found.at, page_size=size, cpus=cpus)


def _options_v7(dat: DatFile, cursor: Cursor) -> int:
    """Parse a list of options; return the offset of the next list, 0 if there is none."""
    while cursor.left >= 6:
        number, size = cursor.number(2), cursor.number(4)
        data = cursor.take(size)
        if number == options.DONE:
            return Cursor(data).number(8)
        dat.options.parse(number, data, True)
    return 0


def _parts_v7(dat: DatFile) -> None:
    for number, name in (
        (options.HEADER_INFO, "headers"),
        (options.FTRACE_EVENTS, "formats of ftrace's own events"),
        (options.EVENT_FORMATS, "event formats"),
        (options.CMDLINES, "command lines"),
    ):
        at = dat.options.parts.get(number)
        if at is None:
            continue
        try:
            _read_section(dat, number, Cursor(_section(dat, at, number)))
        except (CutShortError, DamagedPartError):
            dat.cut_short = dat.cut_short or f"the {name} are damaged"


def _read_section(dat: DatFile, number: int, cursor: Cursor) -> None:
    if number == options.HEADER_INFO:
        dat.formats.read_headers(cursor)
    elif number == options.FTRACE_EVENTS:
        dat.formats.read_ftrace(cursor)
    elif number == options.EVENT_FORMATS:
        dat.formats.read_events(cursor)
    else:
        dat.cmdlines = cursor.take(cursor.number(8)).decode("utf-8", "replace")


def kallsyms_of(dat: DatFile) -> bytes:
    """Return the text of /proc/kallsyms from the file; empty if it has none.

    The text has tens of MB: call this only to resolve an address.
    """
    at = dat.options.parts.get(options.KALLSYMS)
    if at is None:
        return b""
    try:
        is_part = dat.version == 6
        symbols = (
            Cursor(dat.file, at=at) if is_part else Cursor(_section(dat, at, options.KALLSYMS))
        )
        return part(symbols, symbols.number(4))
    except (CutShortError, DamagedPartError):
        return b""


def _section(dat: DatFile, at: int, number: int) -> bytes:
    """Read and unpack the section at offset ``at``, which must have this number.

    Raises:
        CutShortError: If the file ends within it.
        DamagedPartError: If it has another number, or does not unpack.
    """
    head = Cursor(dat.file, at=at)
    found, flags = head.number(2), head.number(2)
    head.skip(4)
    size = head.number(8)
    if found != number or size > MAX_PART_BYTES or dat.unpack is None:
        raise DamagedPartError
    if not flags & _COMPRESSED:
        return head.take(size)
    packed, unpacked = head.number(4), head.number(4)
    if not is_plausible(packed, unpacked):
        raise DamagedPartError
    return dat.unpack(head.take(min(packed, size)), unpacked)


def is_compressed(dat: DatFile, buffer: Buffer) -> bool:
    """Return whether a buffer's pages are compressed, according to its section's header."""
    if dat.version == 6:
        return False
    head = Cursor(dat.file, at=buffer.at)
    try:
        number, flags = head.number(2), head.number(2)
    except CutShortError:
        return False
    return number == _BUFFER_SECTION and bool(flags & _COMPRESSED)


_LINE: Final = rb"^(?P<address>[0-9a-f]{8,16}) [tTwW] (?P<name>%s)(?:\s|$)"
# A probe is at most this many bytes into its function: an entry probe after the
# prologue (endbr64 and the ftrace call: 9 bytes), a return probe at the start.
_MAX_PROBE_OFFSET: Final = 16


def symbol_finder(kallsyms: Callable[[], bytes]) -> Callable[[int], str | None]:
    """Return a function from an address to the SEAMCALL function there, or None.

    Args:
        kallsyms: Returns the text of /proc/kallsyms; called once, when first needed.
    """
    found: dict[int, str] | None = None

    def name(address: int) -> str | None:
        nonlocal found
        if found is None:
            found = _addresses(kallsyms())
        candidates = (found.get(address - step) for step in range(_MAX_PROBE_OFFSET + 1))
        return next((symbol for symbol in candidates if symbol is not None), None)

    return name


def _addresses(kallsyms: bytes) -> dict[int, str]:
    names = b"|".join(re.escape(name.encode()) for name in sorted(functions()))
    lines = re.finditer(_LINE % names, kallsyms, re.MULTILINE)
    symbols = {int(line["address"], 16): line["name"].decode() for line in lines}
    symbols.pop(0, None)
    return symbols
