"""Descriptions of pages and events that trace.dat and perf.data both hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from tdxtrace.ingest.records.cursor import Cursor, CutShortError
from tdxtrace.ingest.records.formats import EventFormat, parse_format
from tdxtrace.ingest.records.unpack import MAX_PART_BYTES


@dataclass(slots=True)
class Formats:
    """How pages and events of one kernel look, as it described them itself."""

    header_page: str = ""
    events: dict[int, EventFormat] = field(default_factory=dict)

    def add(self, text: bytes, system: str) -> None:
        """Take an event's format; of two with one number the first holds."""
        made = parse_format(text.decode("utf-8", "replace"), system)
        if made is not None:
            self.events.setdefault(made.number, made)

    def read_headers(self, cursor: Cursor) -> None:
        """Read ``header_page`` and pass over ``header_event``.

        Raises:
            CutShortError: If they are not there.
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
            CutShortError: If fewer are there than it says.
        """
        for _ in range(cursor.number(4)):
            self.add(part(cursor, cursor.number(8)), "ftrace")

    def read_events(self, cursor: Cursor) -> None:
        """Read the formats of all other events, system by system.

        Raises:
            CutShortError: If fewer are there than it says.
        """
        for _ in range(cursor.number(4)):
            system = cursor.text()
            for _ in range(cursor.number(4)):
                self.add(part(cursor, cursor.number(8)), system)


def part(cursor: Cursor, size: int) -> bytes:
    """Take ``size`` bytes that are held in memory.

    Raises:
        CutShortError: If there are fewer, or absurdly many.
    """
    if size > MAX_PART_BYTES:
        raise CutShortError
    return cursor.take(size)
