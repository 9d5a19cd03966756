"""Writer of small recordings, as the kernel and trace-cmd write them, in any byte order.

Nothing here is shared with the readers: the layouts are spelled out again, from
trace-cmd.dat.v6(5), trace-cmd.dat.v7(5) and Linux kernel/trace/ring_buffer.c.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import zstandard

ENTER, EXIT, FOREIGN = 301, 302, 303
COMMON = (
    "\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n"
    "\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;\n"
    "\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;\n"
    "\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n"
)


def format_file(name: str, number: int, *fields: str) -> bytes:
    """A format file; each field is ``declaration@offset+size`` with ``s`` if signed."""
    lines = ""
    for text in fields:
        declaration, _, place = text.partition("@")
        offset, _, size = place.partition("+")
        signed = int(size.endswith("s"))
        lines += f"\tfield:{declaration};\toffset:{offset};"
        lines += f"\tsize:{size.rstrip('s')};\tsigned:{signed};\n"
    return f'name: {name}\nID: {number}\nformat:\n{COMMON}{lines}\nprint fmt: ""\n'.encode()


FORMATS: dict[str, list[bytes]] = {
    "tdx": [
        format_file(
            "tdh_mem_page_aug_enter",
            ENTER,
            "unsigned long __probe_ip@8+8",
            "__data_loc char[] name@16+4",
            "u64 td@20+8",
            "u64 gpa@28+8",
            "s32 level@36+4s",
        ),
        format_file(
            "tdh_mem_page_aug_exit",
            EXIT,
            "unsigned long __probe_func@8+8",
            "unsigned long __probe_ret_ip@16+8",
            "u64 ret@24+8",
        ),
    ],
    "other": [format_file("noise", FOREIGN, "u32 x@8+4")],
}


@dataclass
class Machine:
    """Byte order and sizes of the machine that records."""

    big_endian: bool = False
    long_size: int = 8
    page_size: int = 4096

    @property
    def order(self) -> str:
        """As struct writes it."""
        return ">" if self.big_endian else "<"

    def pack(self, form: str, *values: int) -> bytes:
        """Pack numbers in the machine's byte order."""
        return struct.pack(self.order + form, *values)

    @property
    def header_page(self) -> bytes:
        """tracefs' events/header_page."""
        data = 8 + self.long_size
        return (
            "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
            f"\tfield: local_t commit;\toffset:8;\tsize:{self.long_size};\tsigned:1;\n"
            "\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n"
            f"\tfield: char data;\toffset:{data};\tsize:{self.page_size - data};\tsigned:0;\n"
        ).encode()

    def head(self, kind: int, delta: int) -> bytes:
        """The header of a record."""
        word = kind << 27 | delta if self.big_endian else delta << 5 | kind
        return self.pack("I", word)

    def event(self, delta: int, payload: bytes) -> bytes:
        """A record as short as the kernel makes it."""
        body = payload + b"\0" * (-len(payload) % 4)
        if len(body) <= 112:
            return self.head(len(body) // 4, delta) + body
        return self.head(0, delta) + self.pack("I", len(body) + 4) + body

    def long_event(self, delta: int, payload: bytes) -> bytes:
        """A record whose length is in front of it, whatever its length."""
        return self.head(0, delta) + self.pack("I", len(payload) + 4) + payload

    def extend(self, delta: int) -> bytes:
        """A step in time too long for a record."""
        return self.head(30, delta & (1 << 27) - 1) + self.pack("I", delta >> 27)

    def stamp(self, moment: int) -> bytes:
        """An absolute stamp; its five highest bits are not kept."""
        return self.head(31, moment & (1 << 27) - 1) + self.pack("I", moment >> 27 & 0xFFFFFFFF)

    def padding(self, n_bytes: int, delta: int = 1) -> bytes:
        """A discarded record of ``n_bytes`` bytes behind its header."""
        return self.head(29, delta) + self.pack("I", n_bytes) + b"\xee" * (n_bytes - 4)

    def page(self, start: int, records: bytes, lost: int | None = 0) -> bytes:
        """A page; ``lost`` events are marked before it, None an unknown number."""
        commit = len(records)
        room = self.page_size - 8 - self.long_size
        tail = b""
        if lost != 0:
            # The kernel adds the flag as a negative int (ring_buffer.c, RB_MISSED_EVENTS).
            commit |= (1 << 8 * self.long_size) - (1 << 31)
            if lost is not None:
                commit |= 1 << 30
                tail = self.pack("Q" if self.long_size == 8 else "I", lost)
        body = (records + tail).ljust(room, b"\0")
        assert len(body) == room
        return self.pack("Q", start) + self.pack("Q" if self.long_size == 8 else "I", commit) + body

    def enter(self, tid: int, gpa: int, td: int = 0xFF11, level: int = 0) -> bytes:
        """The record of an entry probe."""
        head = self.pack("HBBi", ENTER, 0xFF, 0xFF, tid)
        return head + self.pack("QI", 0x1000, 0) + self.pack("QQi", td, gpa, level)

    def leave(self, tid: int, ret: int) -> bytes:
        """The record of a return probe."""
        return self.pack("HBBi", EXIT, 0xFF, 0xFF, tid) + self.pack("QQQ", 0x1000, 0x2000, ret)

    def foreign(self, tid: int) -> bytes:
        """The record of an event that is not ours."""
        return self.pack("HBBi", FOREIGN, 0, 0, tid) + self.pack("I", 7)


@dataclass
class Recording:
    """A trace.dat in the making."""

    machine: Machine = field(default_factory=Machine)
    cpus: Sequence[bytes] = ()
    """The pages of each CPU of the top buffer."""
    buffers: dict[str, Sequence[bytes]] = field(default_factory=dict)
    options: list[tuple[int, bytes]] = field(default_factory=list)
    formats: dict[str, list[bytes]] = field(default_factory=lambda: FORMATS)
    cmdlines: bytes = b"7 vcpu 0\n8 vcpu 1\n"
    compression: str = "none"

    def _start(self, version: bytes) -> bytes:
        m = self.machine
        head = b"\x17\x08\x44tracing" + version + b"\0" + bytes([m.big_endian, m.long_size])
        return head + m.pack("I", m.page_size)

    def headers(self) -> bytes:
        """header_page and header_event, as both recorders keep them."""
        m = self.machine
        page = b"header_page\0" + m.pack("Q", len(m.header_page)) + m.header_page
        return page + b"header_event\0" + m.pack("Q", 0)

    def events(self) -> bytes:
        """The formats of events, as both recorders keep them."""
        m = self.machine
        made = m.pack("I", len(self.formats))
        for system, files in self.formats.items():
            made += system.encode() + b"\0" + m.pack("I", len(files))
            made += b"".join(m.pack("Q", len(file)) + file for file in files)
        return made

    def v6(self) -> bytes:
        """The file in version 6."""
        m = self.machine
        head = self._start(b"6") + self.headers() + m.pack("I", 0) + self.events()
        head += m.pack("I", 0) + m.pack("I", 0)
        head += m.pack("Q", len(self.cmdlines)) + self.cmdlines + m.pack("I", len(self.cpus))
        options = b"".join(m.pack("HI", number, len(d)) + d for number, d in self.options)
        extra = sum(6 + 8 + len(name) + 1 for name in self.buffers)
        head += b"options  \0" + options
        tables_at = len(head) + extra + 2 + 10
        has_clock = any(number == 4 for number, _ in self.options)
        clock = m.pack("Q", 12) + b"local [mono]" if has_clock else b""
        data_at = tables_at + 16 * len(self.cpus) + len(clock)
        data_at += sum(10 + 16 * len(cpus) for cpus in self.buffers.values())
        data_at += -data_at % m.page_size
        tables, body, places = b"", b"", b""
        for name, cpus in {"": self.cpus, **self.buffers}.items():
            if name:
                places += m.pack("HI", 3, 8 + len(name) + 1)
                places += m.pack("Q", tables_at + len(tables)) + name.encode() + b"\0"
                tables += b"flyrecord\0"
            for pages in cpus:
                tables += m.pack("QQ", data_at + len(body), len(pages))
                body += pages
            tables += b"" if name else clock
        whole = head + places + m.pack("H", 0) + b"flyrecord\0" + tables
        return whole.ljust(data_at, b"\0") + body

    def v7(self) -> bytes:
        """The file in version 7."""
        m = self.machine
        name = (
            self.compression.encode()
            + b"\0"
            + (b"" if self.compression == "none" else b"1")
            + b"\0"
        )
        out = bytearray(self._start(b"7") + name)
        options_at = len(out)
        out += b"\0" * 8
        options = list(self.options)
        for number, data in (
            (16, self.headers()),
            (17, m.pack("I", 0)),
            (18, self.events()),
            (21, m.pack("Q", len(self.cmdlines)) + self.cmdlines),
        ):
            options.append((number, m.pack("Q", len(out))))
            out += self._section(number, data)
        for buffer, cpus in {"": self.cpus, **self.buffers}.items():
            options.append((3, self._buffer(out, buffer, cpus)))
        struct.pack_into(m.order + "Q", out, options_at, len(out))
        options.append((0, m.pack("Q", 0)))
        data = b"".join(m.pack("HI", number, len(d)) + d for number, d in options)
        return bytes(out + m.pack("HHIQ", 0, 0, 0, len(data)) + data)

    def _section(self, number: int, data: bytes) -> bytes:
        m, packed = self.machine, self._pack(data)
        if packed is None:
            return m.pack("HHIQ", number, 0, 0, len(data)) + data
        body = m.pack("II", len(packed), len(data)) + packed
        return m.pack("HHIQ", number, 1, 0, len(body)) + body

    def _buffer(self, out: bytearray, name: str, cpus: Sequence[bytes]) -> bytes:
        m, begin = self.machine, len(out)
        packs = self.compression != "none"
        out += m.pack("HHIQ", 3, int(packs), 0, 0)
        option = m.pack("Q", begin) + name.encode() + b"\0mono\0"
        option += m.pack("II", m.page_size, len(cpus))
        for cpu, pages in enumerate(cpus):
            out += b"\0" * (-len(out) % m.page_size)
            at = len(out)
            if packs:
                step = 2 * m.page_size
                chunks = [pages[i : i + step] for i in range(0, len(pages), step)]
                out += m.pack("I", len(chunks))
                for chunk in chunks:
                    packed = self._pack(chunk) or b""
                    out += m.pack("II", len(packed), len(chunk)) + packed
            else:
                out += pages
            option += m.pack("IQQ", cpu, at, len(out) - at)
        struct.pack_into(m.order + "Q", out, begin + 8, len(out) - begin - 16)
        return option

    def _pack(self, data: bytes) -> bytes | None:
        if self.compression == "zlib":
            return zlib.compress(data)
        if self.compression == "zstd":
            return zstandard.ZstdCompressor().compress(data)
        return None
