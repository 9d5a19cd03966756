"""Pages of the kernel's ring buffer, as trace-cmd splices them into its file.

Linux kernel/trace/ring_buffer.c: struct buffer_data_page, rb_update_event,
ring_buffer_read_page (RB_MISSED_EVENTS, RB_MISSED_STORED).
"""

from __future__ import annotations

import struct
from typing import Final

from tdxtrace.simulate.recording import Lost, Recording
from tdxtrace.simulate.render.formats import Formats

_DATA_BYTES: Final = 4080
_HEAD_BYTES: Final = 16
_MAX_TYPE_LEN: Final = 28
_TIME_EXTEND: Final = 30
_DELTA_BITS: Final = 27
_MISSED_EVENTS: Final = 1 << 31
_MISSED_STORED: Final = 1 << 30


class _Page:
    """One page being filled."""

    def __init__(self, ts_ns: int, missed: Lost | None) -> None:
        self.began_ns = self.last_ns = ts_ns
        self.missed = missed
        self.data = bytearray()

    def room(self) -> int:
        """Bytes left, room for the count of missed events kept."""
        return _DATA_BYTES - len(self.data) - (8 if self.missed else 0)

    def add(self, ts_ns: int, record: bytes) -> None:
        """Append one event, with an extension where its delta does not fit."""
        delta = ts_ns - self.last_ns
        if delta >> _DELTA_BITS:
            low = delta & ((1 << _DELTA_BITS) - 1)
            self.data += struct.pack("<II", _TIME_EXTEND | low << 5, delta >> _DELTA_BITS)
            delta = 0
        units = len(record) // 4
        if units <= _MAX_TYPE_LEN:
            self.data += struct.pack("<I", units | delta << 5)
        else:
            self.data += struct.pack("<II", delta << 5, len(record) + 4)
        self.data += record
        self.last_ns = ts_ns

    def bytes(self) -> bytes:
        """The page as it lies in the file."""
        commit, tail = len(self.data), b""
        if self.missed is not None:
            commit |= _MISSED_EVENTS
            if self.missed.is_counted:
                commit |= _MISSED_STORED
                tail = struct.pack("<Q", self.missed.n_events)
        body = bytes(self.data) + tail
        head = struct.pack("<QQ", self.began_ns, commit)
        return head + body + b"\0" * (_DATA_BYTES - len(body))


def cpu_pages(recording: Recording, cpu: int, kinds: Formats) -> bytes:
    """Return the pages of one CPU's buffer, whole."""
    done: list[bytes] = []
    page: _Page | None = None
    missed: Lost | None = None
    for item in recording.items:
        if item.cpu != cpu:
            continue
        if isinstance(item, Lost):
            missed = item
            continue
        record = kinds.layouts[item.spec].record(item)
        # At most: extension, length word, record.
        if page is None or missed is not None or page.room() < len(record) + _HEAD_BYTES:
            if page is not None:
                done.append(page.bytes())
            page, missed = _Page(item.ts_ns, missed), None
        page.add(item.ts_ns, record)
    if page is not None:
        done.append(page.bytes())
    return b"".join(done)
