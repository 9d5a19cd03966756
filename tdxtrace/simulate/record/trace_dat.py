"""A trace.dat file, version 6 or 7, as trace-cmd records it.

File layout: trace-cmd.dat.v6(5) and v7(5).  Pages of the ring buffer: Linux
kernel/trace/ring_buffer.c, struct buffer_data_page, rb_update_event, ring_buffer_read_page
(RB_MISSED_EVENTS, RB_MISSED_STORED): a timestamp, a commit count with flags for missed
events, then events of four-byte units with a 27-bit time delta.
"""

from __future__ import annotations

import struct
from typing import Final

from tdxtrace.simulate.record.event_formats import COMMON, EventFormats
from tdxtrace.simulate.record.recording import LostEvents, Recording, TraceEvent

_DATA_BYTES: Final = 4080
_HEAD_BYTES: Final = 16
_MAX_TYPE_LEN: Final = 28
_TIME_EXTEND: Final = 30
_DELTA_BITS: Final = 27
_MISSED_EVENTS: Final = 1 << 31
_MISSED_STORED: Final = 1 << 30


class _Page:
    """One page of a ring buffer while it is filled."""

    def __init__(self, ts_ns: int, lost: LostEvents | None) -> None:
        self.began_ns = self.last_ns = ts_ns
        self.lost = lost
        self.data = bytearray()

    def free_bytes(self) -> int:
        """Bytes left, without those for the number of lost events."""
        return _DATA_BYTES - len(self.data) - (8 if self.lost else 0)

    def add(self, ts_ns: int, record: bytes) -> None:
        """Append one event, preceded by a time extension if its delta does not fit."""
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
        """Return the page as stored in the file."""
        commit, tail = len(self.data), b""
        if self.lost is not None:
            commit |= _MISSED_EVENTS
            if self.lost.is_counted:
                commit |= _MISSED_STORED
                tail = struct.pack("<Q", self.lost.n_events)
        body = bytes(self.data) + tail
        head = struct.pack("<QQ", self.began_ns, commit)
        return head + body + b"\0" * (_DATA_BYTES - len(body))


def cpu_pages(recording: Recording, cpu: int, formats: EventFormats) -> bytes:
    """Return the pages of one CPU's buffer."""
    done: list[bytes] = []
    page: _Page | None = None
    lost: LostEvents | None = None
    for item in recording.items:
        if item.cpu != cpu:
            continue
        if isinstance(item, LostEvents):
            lost = item
            continue
        record = formats.layouts[item.spec].record(item)
        # Upper bound: time extension, length word, record.
        if page is None or lost is not None or page.free_bytes() < len(record) + _HEAD_BYTES:
            if page is not None:
                done.append(page.bytes())
            page, lost = _Page(item.ts_ns, lost), None
        page.add(item.ts_ns, record)
    if page is not None:
        done.append(page.bytes())
    return b"".join(done)


_MAGIC: Final = b"\x17\x08\x44tracing"
_PAGE: Final = 4096

# Option and section numbers: trace-cmd.dat.v7(5).
_DONE, _BUFFER, _TRACECLOCK, _UNAME, _CPUCOUNT, _VERSION = 0, 3, 4, 5, 8, 9
_STRINGS, _HEADERS, _FTRACE, _EVENTS, _KALLSYMS, _PRINTK, _CMDLINES = 15, 16, 17, 18, 19, 20, 21
_CLOCKS: Final = b"local global counter uptime perf [mono] mono_raw boot tai x86-tsc\n\0"
_TOOL: Final = b"3.1.6\0"


def render(recording: Recording, version: int) -> bytes:
    """Return the content of the file.

    Args:
        recording: The recording.
        version: 6, uncompressed, or 7, with compression "none".
    """
    formats = EventFormats.of(recording.events())
    data = [cpu_pages(recording, cpu, formats) for cpu in range(recording.n_cpus)]
    parts = _Parts(recording, formats)
    return _v6(parts, data) if version == 6 else _v7(parts, data)


class _Parts:
    """The sections common to both versions, without their headers."""

    def __init__(self, recording: Recording, formats: EventFormats) -> None:
        self.headers = b"".join(
            name + b"\0" + struct.pack("<Q", len(text)) + text
            for name, text in ((b"header_page", _HEADER_PAGE), (b"header_event", _HEADER_EVENT))
        )
        self.ftrace = struct.pack("<I", len(_FTRACE_FORMATS)) + b"".join(
            struct.pack("<Q", len(text)) + text for text in _FTRACE_FORMATS
        )
        systems = formats.systems()
        self.events = struct.pack("<I", len(systems))
        for system, texts in systems.items():
            self.events += system.encode() + b"\0" + struct.pack("<I", len(texts))
            for text in texts:
                self.events += struct.pack("<Q", len(text)) + text
        self.kallsyms = struct.pack("<I", 0)
        self.printk = struct.pack("<I", 0)
        lines = "".join(f"{tid} {comm}\n" for tid, comm in _tasks(recording.events()))
        self.cmdlines = struct.pack("<Q", len(lines)) + lines.encode()
        self.uname = f"Linux simulated {recording.kernel}.0 x86_64\0".encode()
        self.n_cpus = recording.n_cpus


def _tasks(events: list[TraceEvent]) -> list[tuple[int, str]]:
    """Return threads and their names, as in saved_cmdlines, without idle threads."""
    return list({event.tid: event.comm[:15] for event in events if event.tid}.items())


def _option(number: int, data: bytes) -> bytes:
    return struct.pack("<HI", number, len(data)) + data


def _padded(at: int) -> int:
    return (at + _PAGE - 1) & -_PAGE


def _v6(parts: _Parts, data: list[bytes]) -> bytes:
    out = bytearray(_MAGIC + b"6\0" + b"\0\x08" + struct.pack("<I", _PAGE))
    out += parts.headers + parts.ftrace + parts.events
    out += parts.kallsyms + parts.printk + parts.cmdlines
    out += struct.pack("<I", parts.n_cpus) + b"options  \0"
    for number, body in ((_TRACECLOCK, _CLOCKS), (_UNAME, parts.uname), (_VERSION, _TOOL)):
        out += _option(number, body)
    out += struct.pack("<H", 0) + b"flyrecord\0"
    at = _padded(len(out) + 16 * parts.n_cpus)
    for cpu_data in data:
        out += struct.pack("<QQ", at, len(cpu_data))
        at += _padded(len(cpu_data))
    for cpu_data in data:
        out += b"\0" * (_padded(len(out)) - len(out)) + cpu_data
    return bytes(out)


def _v7(parts: _Parts, data: list[bytes]) -> bytes:
    out = bytearray(_MAGIC + b"7\0" + b"\0\x08" + struct.pack("<I", _PAGE) + b"none\0\0")
    offset_of_options = len(out)
    out += struct.pack("<Q", 0)
    strings = bytearray()
    options = bytearray()
    sections = (
        (_HEADERS, b"headers", parts.headers),
        (_FTRACE, b"ftrace events", parts.ftrace),
        (_EVENTS, b"events format", parts.events),
        (_KALLSYMS, b"kallsyms", parts.kallsyms),
        (_PRINTK, b"printk", parts.printk),
        (_CMDLINES, b"cmdlines", parts.cmdlines),
    )
    for number, name, body in sections:
        options += _option(number, struct.pack("<Q", len(out)))
        out += _section(number, strings, name, body)
    # The pages of each CPU begin at a page-aligned offset within the section.
    begin = len(out)
    first = _padded(begin + 16)
    data_body = bytearray(b"\0" * (first - begin - 16))
    table = bytearray()
    for cpu, cpu_data in enumerate(data):
        if cpu_data:
            table += struct.pack("<IQQ", cpu, begin + 16 + len(data_body), len(cpu_data))
            data_body += cpu_data + b"\0" * (_padded(len(cpu_data)) - len(cpu_data))
    out += _section(_BUFFER, strings, b"flyrecord", bytes(data_body))
    n_with_data = len(table) // 20
    buffer = struct.pack("<Q", begin) + b"\0" + b"mono\0"
    buffer += struct.pack("<II", _PAGE, n_with_data) + bytes(table)
    options += _option(_TRACECLOCK, _CLOCKS) + _option(_UNAME, parts.uname)
    options += _option(_VERSION, _TOOL) + _option(_CPUCOUNT, struct.pack("<I", parts.n_cpus))
    options += _option(_BUFFER, buffer) + _option(_DONE, struct.pack("<Q", 0))
    struct.pack_into("<Q", out, offset_of_options, len(out))
    out += _section(0, strings, b"options", bytes(options))
    strings_name = bytes(strings) + b"strings\0"
    out += struct.pack("<HHIQ", _STRINGS, 0, len(strings), len(strings_name)) + strings_name
    return bytes(out)


def _section(number: int, strings: bytearray, name: bytes, body: bytes) -> bytes:
    head = struct.pack("<HHIQ", number, 0, len(strings), len(body))
    strings += name + b"\0"
    return head + body


_HEADER_PAGE: Final = (
    b"\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
    b"\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n"
    b"\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n"
    b"\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;\n"
)
_HEADER_EVENT: Final = (
    b"# compressed entry header\n\ttype_len    :    5 bits\n\ttime_delta  :   27 bits\n"
    b"\tarray       :   32 bits\n\n\tpadding     : type == 29\n\ttime_extend : type == 30\n"
    b"\ttime_stamp : type == 31\n\tdata max type_len  == 28\n"
)
_FTRACE_FORMATS: Final = (
    b"name: print\nID: 5\nformat:\n" + COMMON.encode() + b"\n"
    b"\tfield:unsigned long ip;\toffset:8;\tsize:8;\tsigned:0;\n"
    b"\tfield:char buf[];\toffset:16;\tsize:0;\tsigned:0;\n\n"
    b'print fmt: "%ps: %s", (void *)REC->ip, REC->buf\n',
)
