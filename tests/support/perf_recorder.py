"""Writer of small perf.data files, as perf record writes to files and pipes.

Nothing here is shared with the readers: the layouts are spelled out again, from
tools/perf/Documentation/perf.data-file-format.txt and include/uapi/linux/perf_event.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import zstandard
from support.recorder import ENTER, EXIT, FOREIGN, FORMATS, Machine, Recording

IP, TID, TIME, READ, CALLCHAIN = 1, 2, 4, 16, 32
ID, CPU, PERIOD, RAW, IDENTIFIER = 64, 128, 256, 1024, 1 << 16
USUAL = IP | TID | TIME | ID | CPU | PERIOD | RAW
SAMPLE_ID_ALL = 1 << 18
IDS = {ENTER: 71, EXIT: 72, FOREIGN: 73}


@dataclass
class PerfRecording:
    """Builder of a perf.data file: records are in the order of the file."""

    machine: Machine = field(default_factory=Machine)
    sample_types: dict[int, int] = field(default_factory=lambda: dict.fromkeys(IDS, USUAL))
    """sample_type by event."""
    flags: int = SAMPLE_ID_ALL
    period: int = 1
    read_format: int = 0
    body: bytes = b""

    def record(self, kind: int, data: bytes, misc: int = 0) -> bytes:
        """A record of any kind."""
        data += b"\0" * (-len(data) % 8)
        return self.machine.pack("IHH", kind, misc, 8 + len(data)) + data

    def trailer(self, time: int, cpu: int, tid: int = 7) -> bytes:
        """What follows other records: when and where they were made."""
        m = self.machine
        return m.pack("iiQQII", 1, tid, time, 0, cpu, 0)

    def sample(
        self, event: int, time: int, payload: bytes, cpu: int = 0, chain: Sequence[int] = ()
    ) -> bytes:
        """A sample that holds a tracepoint's record."""
        m, kind = self.machine, self.sample_types[event]
        tid = int.from_bytes(payload[4:8], "little")
        parts = {
            IDENTIFIER: m.pack("Q", IDS[event]),
            IP: m.pack("Q", 0xFFFF),
            TID: m.pack("ii", 1, tid),
            TIME: m.pack("Q", time),
            ID: m.pack("Q", IDS[event]),
            CPU: m.pack("II", cpu, 0),
            PERIOD: m.pack("Q", 1),
            READ: m.pack("Q", 2) + m.pack("QQ", 5, IDS[event]) * 2,
            CALLCHAIN: m.pack("Q", len(chain)) + b"".join(m.pack("Q", ip) for ip in chain),
        }
        data = b"".join(part for bit, part in parts.items() if kind & bit)
        if kind & RAW:
            data += m.pack("I", len(payload) + (-len(payload) - 4) % 8) + payload
        return self.record(9, data)

    def call(self, time: int, tid: int, gpa: int, ret: int, cpu: int = 0) -> bytes:
        """The samples of an entry and, ten ns later, of its return."""
        m = self.machine
        entry = self.sample(ENTER, time, m.enter(tid, gpa), cpu)
        return entry + self.sample(EXIT, time + 10, m.leave(tid, ret), cpu)

    def comm(self, time: int, tid: int, name: str) -> bytes:
        """A thread's new name."""
        text = name.encode() + b"\0"
        text += b"\0" * (-len(text) % 8)
        return self.record(3, self.machine.pack("ii", 1, tid) + text + self.trailer(time, 0, tid))

    def fork(self, time: int, tid: int, parent: int) -> bytes:
        """A new thread."""
        data = self.machine.pack("iiiiQ", 1, 1, tid, parent, time)
        return self.record(7, data + self.trailer(time, 0, tid))

    def lost(self, time: int, cpu: int, n_events: int) -> bytes:
        """Samples that were dropped."""
        return self.record(2, self.machine.pack("QQ", 71, n_events) + self.trailer(time, cpu))

    def end_round(self) -> bytes:
        """All buffers were drained once."""
        return self.record(68, b"")

    def compressed(self, records: bytes, sizes: Sequence[int], kind: int = 81) -> bytes:
        """Records packed as one stream, in parts of these sizes and a rest."""
        m, made, at = self.machine, b"", 0
        packer = zstandard.ZstdCompressor().compressobj()
        for size in (*sizes, len(records)):
            part = packer.compress(records[at : at + size])
            part += packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
            at += size
            if kind == 81:
                made += m.pack("IHH", 81, 0, 8 + len(part)) + part
            else:
                made += self.record(83, m.pack("Q", len(part)) + part)
        return made

    def _attr(self, event: int) -> bytes:
        m = self.machine
        kinds = self.sample_types[event], self.read_format, self.flags
        made = m.pack("IIQQQQQ", 2, 96, event, self.period, *kinds)
        return made.ljust(96, b"\0")

    def _tracing_data(self) -> bytes:
        made = Recording(self.machine, formats=FORMATS)
        head = b"\x17\x08\x44tracing0.6\0" + bytes(
            [self.machine.big_endian, self.machine.long_size]
        )
        head += self.machine.pack("I", 4096) + made.headers()
        return head + self.machine.pack("I", 0) + made.events()

    def _string(self, text: str) -> bytes:
        data = text.encode() + b"\0"
        return self.machine.pack("I", len(data)) + data

    def file(self) -> bytes:
        """The recording as a file."""
        m = self.machine
        magic = b"2ELIFREP" if m.big_endian else b"PERFILE2"
        ids_at = 104
        ids = b"".join(m.pack("Q", IDS[event]) for event in self.sample_types)
        attrs_at = ids_at + len(ids)
        attrs = b"".join(
            self._attr(event) + m.pack("QQ", ids_at + 8 * n, 8)
            for n, event in enumerate(self.sample_types)
        )
        data_at = attrs_at + len(attrs)
        features = {
            1: self._tracing_data(),
            4: self._string("6.18.0-test"),
            5: self._string("6.1.1"),
        }
        flags = sum(1 << number for number in features)
        made = magic + m.pack("QQQQ", 104, 112, attrs_at, len(attrs))
        made += m.pack("QQQQ", data_at, len(self.body), 0, 0) + m.pack("QQQQ", flags, 0, 0, 0)
        made += ids + attrs + self.body
        at = len(made) + 16 * len(features)
        for data in features.values():
            made += m.pack("QQ", at, len(data))
            at += len(data)
        return made + b"".join(features.values())

    def pipe(self) -> bytes:
        """The recording as perf record writes it to a pipe."""
        m = self.machine
        made = (b"2ELIFREP" if m.big_endian else b"PERFILE2") + m.pack("Q", 16)
        for event in self.sample_types:
            made += self.record(64, self._attr(event) + m.pack("Q", IDS[event]))
        data = self._tracing_data()
        made += self.record(66, m.pack("I", len(data))) + data + b"\0" * (-len(data) % 8)
        made += self.record(80, m.pack("Q", 4) + self._string("6.18.0-test"))
        return made + self.body
