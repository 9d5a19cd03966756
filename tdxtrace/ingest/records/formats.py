"""Formats of pages and events of one kernel, parsed from a recording or tracefs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tdxtrace.errors import FormatError
from tdxtrace.ingest.records.datafile import MAX_PART_BYTES, Cursor, CutShortError

# One field as the kernel prints it: Linux kernel/trace/trace_events.c, f_show().
# "signed" came with 2.6.30; a declaration holds any text but a semicolon.
_FIELD: Final = re.compile(
    r"field:(?P<declaration>[^;\n]{1,400});\s*offset:(?P<offset>\d{1,9});\s*size:(?P<size>\d{1,9});"
    r"(?:\s*signed:(?P<signed>[01]);)?"
)
_NAME: Final = re.compile(r"^name: (?P<name>\S{1,200})\s*$", re.MULTILINE)
_ID: Final = re.compile(r"^ID: (?P<id>\d{1,9})\s*$", re.MULTILINE)
_WORD: Final = re.compile(r"\b[^\WA-Za-z_]*+(?P<name>[A-Za-z_]\w*+)\s*+(?P<array>\[[^\[\]]*+\])?$")
_NUMBER_SIZES: Final = (1, 2, 4, 8)
# A sub-buffer has at most 2^7 pages: Linux kernel/trace/ring_buffer.c, RB_SUBBUF_ORDER_MAX
# and buffer_subbuf_size_kb; pages of 64 KiB are the largest in use.
MAX_PAGE_BYTES: Final = 8 << 20
# struct trace_entry's type has 16 bits: Linux include/linux/trace_events.h.
_MAX_EVENTS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Field:
    """Position and type of one field of an event; offsets and sizes in bytes."""

    name: str
    offset: int
    size: int
    signed: bool
    is_number: bool
    """False for arrays, strings and ``__data_loc``/``__rel_loc`` references to them."""

    @property
    def end(self) -> int:
        """The first byte after the field."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class EventFormat:
    """One event as described by its ``format`` file."""

    number: int
    """Event ID: the value of ``common_type`` in its records."""
    system: str
    name: str
    fields: Mapping[str, Field]
    """By name, in file order; every event has the ``common_*`` fields."""


def parse_format(text: str, system: str) -> EventFormat | None:
    r"""Parse the text of ``events/SYSTEM/EVENT/format``; None if it has no name or ID.

    Example:
        >>> made = parse_format("name: kvm_fpu\nID: 41\nformat:\n"
        ...     "\tfield:u32 load;\toffset:8;\tsize:4;\tsigned:0;\n", "kvm")
        >>> made.number, made.fields["load"].end
        (41, 12)
    """
    head = text.partition("\nprint fmt:")[0]
    name, number = _NAME.search(head), _ID.search(head)
    if name is None or number is None:
        return None
    return EventFormat(int(number["id"]), system, name["name"], fields_of(head))


def fields_of(text: str) -> dict[str, Field]:
    """Parse every ``field:`` line of a format, or of ``events/header_page``.

    Of two fields with the same name the first is kept, as in libtraceevent.
    """
    fields: dict[str, Field] = {}
    for found in _FIELD.finditer(text):
        declaration = found["declaration"].strip()
        word = _WORD.search(declaration)
        if word is None:
            continue
        size = int(found["size"])
        located = "__data_loc" in declaration or "__rel_loc" in declaration
        is_number = size in _NUMBER_SIZES and not located and not word["array"]
        name, signed = word["name"], found["signed"] == "1"
        fields.setdefault(name, Field(name, int(found["offset"]), size, signed, is_number))
    return fields


def foreign_machine(shown: str, is_big_endian: bool, advice: str) -> FormatError:
    """Return the error for a recording from a machine on which TDX does not exist.

    Args:
        shown: The recording's name, safe to print.
        is_big_endian: Whether the machine is big-endian; otherwise it is a 32-bit one.
        advice: What the user can do instead.
    """
    kind = "big-endian" if is_big_endian else "32-bit"
    return FormatError(
        f"{shown} was recorded on a {kind} machine; only recordings of 64-bit little-endian "
        f"machines, such as TDX hosts, can be read; {advice}"
    )


@dataclass(frozen=True, slots=True)
class Common:
    """The fields with ID, thread and context that every event has."""

    type: Field
    pid: Field | None
    flags: Field | None
    preempt_count: Field | None


# struct trace_entry, Linux include/linux/trace_events.h: the default if no format
# has the field.
_TYPE: Final = Field("common_type", 0, 2, False, True)
# Kernels with the real-time patches had four bytes more than the eight of others.
_MAX_COMMON_BYTES: Final = 16


def common_of(formats: Iterable[EventFormat]) -> Common:
    """Return the common fields from the first format that has them.

    They are the same for every event of a kernel: the event ID must be read before
    the event is known.
    """
    for event in formats:
        fields = event.fields
        place = fields.get("common_type")
        if place is not None and place.is_number and place.end <= 8:
            names = ("common_pid", "common_flags", "common_preempt_count")
            others = (fields.get(name) for name in names)
            return Common(place, *(x if x and x.end <= _MAX_COMMON_BYTES else None for x in others))
    return Common(_TYPE, None, None, None)


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Layout of a ring-buffer page; sizes and offsets in bytes."""

    size: int
    """Size of the whole page (sub-buffer)."""
    data: int
    """Offset of its first event."""
    commit: int
    """Offset of the length of its events, a number of eight bytes."""


def page_layout(header_page: str, size: int) -> PageLayout | None:
    """Parse ``events/header_page``; None if it cannot describe a page of ``size`` bytes.

    Args:
        header_page: Its text; empty if the recording has none, which gives the layout of
            every kernel since 2.6.30 (Linux kernel/trace/ring_buffer.c,
            ring_buffer_print_page_header).
        size: Size of a page in bytes.
    """
    fields = fields_of(header_page)
    commit = fields.get("commit") or Field("commit", 8, 8, True, True)
    first = fields.get("data")
    data = commit.end if first is None else first.offset
    timestamp = fields.get("timestamp")
    is_valid = (
        size <= MAX_PAGE_BYTES
        and commit.size == 8
        and commit.end <= data < size
        and data % 4 == 0
        and size % 4 == 0
        and (timestamp is None or (timestamp.offset, timestamp.size) == (0, 8))
    )
    return PageLayout(size, data, commit.offset) if is_valid else None


def page_size_of(header_page: str) -> int | None:
    """Return the page size in bytes from ``events/header_page``; None if absent or implausible.

    ``data`` extends to the end of the page, even if pages are larger than the machine's
    (sub-buffers, Linux 6.8): kernel/trace/ring_buffer.c, ring_buffer_print_page_header.
    """
    data = fields_of(header_page).get("data")
    is_valid = data is not None and 64 <= data.end <= MAX_PAGE_BYTES and data.end % 4 == 0
    return data.end if data is not None and is_valid else None


@dataclass(slots=True)
class Formats:
    """The page header and event formats of one kernel, read part by part."""

    header_page: str = ""
    events: dict[int, EventFormat] = field(default_factory=dict)
    _n_events: int = 0

    def add(self, text: bytes, system: str) -> None:
        """Add the text of an event's format; of two with the same ID the first is kept."""
        made = parse_format(text.decode("utf-8", "replace"), system)
        if made is not None:
            self.events.setdefault(made.number, made)

    def read_headers(self, cursor: Cursor) -> None:
        """Read ``header_page`` and skip ``header_event``.

        Raises:
            CutShortError: If one of them is missing.
        """
        if cursor.take(12) != b"header_page\0":
            raise CutShortError
        self.header_page = part(cursor, cursor.number(8)).decode("utf-8", "replace")
        if cursor.take(13) != b"header_event\0":
            raise CutShortError
        part(cursor, cursor.number(8))

    def read_ftrace(self, cursor: Cursor) -> None:
        """Read the formats of ftrace's own events.

        Raises:
            CutShortError: If there are fewer than declared, or more than there are event IDs.
        """
        for _ in range(cursor.number(4)):
            self._count_event()
            self.add(part(cursor, cursor.number(8)), "ftrace")

    def read_events(self, cursor: Cursor) -> None:
        """Read the formats of all other events, system by system.

        Raises:
            CutShortError: If there are fewer than declared, or more than there are event IDs.
        """
        for _ in range(cursor.number(4)):
            system = cursor.text()
            self._count_event()
            for _ in range(cursor.number(4)):
                self._count_event()
                self.add(part(cursor, cursor.number(8)), system)

    def _count_event(self) -> None:
        """Count a system or event; raise CutShortError beyond the number of event IDs."""
        self._n_events += 1
        if self._n_events > _MAX_EVENTS:
            raise CutShortError


def part(cursor: Cursor, size: int) -> bytes:
    """Return the next ``size`` bytes, to be kept in memory.

    Raises:
        CutShortError: If there are fewer, or ``size`` is more than MAX_PART_BYTES.
    """
    if size > MAX_PART_BYTES:
        raise CutShortError
    return cursor.take(size)
