"""Make large recordings: real pages and records repeated with later timestamps.

The events are those of ``sample_traces/``; copy n happens n spans after the first.
To make a share of them foreign, records are given the number of another event
(kvm_msr, whose format is added): sizes, order and threads stay as they were.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
SAMPLES = ROOT / "sample_traces"
PAGE = 4096
FOREIGN_ID = 4000
FOREIGN_FORMAT = b"""name: kvm_msr
ID: 4000
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:u64 ip;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u64 data;\toffset:16;\tsize:8;\tsigned:0;

print fmt: "msr %llx = 0x%llx", REC->ip, REC->data
"""


@dataclass(frozen=True)
class Dat:
    """A trace.dat of version 6: its head, where its tables are, its pages by CPU."""

    head: bytes
    table_at: int
    pages: list[np.ndarray]


def read_dat() -> Dat:
    """Take the sample apart and add the foreign event's format."""
    data = lzma.decompress((SAMPLES / "tracecmd-v6.dat.xz").read_bytes())
    place = 18

    def number(size: int) -> int:
        nonlocal place
        value = int.from_bytes(data[place : place + size], "little")
        place += size
        return value

    def skip(size: int) -> None:
        nonlocal place
        place += size

    skip(12)
    skip(number(8))
    skip(13)
    skip(number(8))
    for _ in range(number(4)):
        skip(number(8))
    n_systems_at = place
    systems = number(4)
    added = b"bench\0" + struct.pack("<IQ", 1, len(FOREIGN_FORMAT)) + FOREIGN_FORMAT
    head = data[:n_systems_at] + struct.pack("<I", systems + 1) + added
    rest_at = place
    table = data.index(b"flyrecord\0", place) + 10
    entries = [struct.unpack_from("<QQ", data, table + 16 * cpu) for cpu in range(2)]
    first = min(at for at, size in entries if size)
    pages = [
        np.frombuffer(data[at : at + size], np.uint8).reshape(-1, PAGE).copy()
        for at, size in entries
    ]
    head += data[rest_at:first]
    return Dat(head, table + len(added), pages)


def events_of(page: np.ndarray) -> Iterator[int]:
    """The offsets of the records on a page (no long ones, no padding: sample pages)."""
    at, end = 16, 16 + (int(page[8:12].view("<u4")[0]) & 0xFFFFF)
    while at < end:
        kind = int(page[at]) & 31
        if kind < 29:
            yield at + 4
        at += 8 if kind > 29 else 4 + 4 * kind


def write_dat(path: Path, n_events: int, ours: float) -> int:
    """Write a trace.dat of at least ``n_events`` events, a share ``ours`` of which is ours."""
    dat = read_dat()
    records = [[list(events_of(page)) for page in cpu] for cpu in dat.pages]
    per_copy = sum(len(page) for cpu in records for page in cpu)
    starts = [cpu[:, :8].copy().view("<u8").ravel() for cpu in dat.pages]
    span = int(max(s.max() for s in starts) - min(s.min() for s in starts)) + 1_000_000
    copies = -(-n_events // per_copy)
    foreign = [foreign_copy(cpu, recs, ours) for cpu, recs in zip(dat.pages, records, strict=True)]
    pad = -len(dat.head) % PAGE
    with path.open("wb") as file:
        at = len(dat.head) + pad
        table = b""
        for cpu in dat.pages:
            table += struct.pack("<QQ", at, copies * cpu.size)
            at += copies * cpu.size
        head = bytearray(dat.head)
        head[dat.table_at : dat.table_at + len(table)] = table
        file.write(bytes(head) + b"\0" * pad)
        for variants, start in zip(foreign, starts, strict=True):
            for copy in range(copies):
                page = variants[copy % len(variants)]
                page[:, :8] = (start + np.uint64(copy * span)).view(np.uint8).reshape(-1, 8)
                file.write(page.tobytes())
    return copies * per_copy


def foreign_copy(pages: np.ndarray, records: list[list[int]], ours: float) -> list[np.ndarray]:
    """Twenty variants of a CPU's pages, each with another share of threads kept."""
    made = []
    for variant in range(20):
        copy = pages.copy()
        for page, places in zip(copy, records, strict=True):
            for place in places:
                tid = int(page[place + 4 : place + 8].view("<u4")[0])
                if (tid * 7 + variant) % 20 >= round(ours * 20):
                    page[place : place + 2] = np.frombuffer(struct.pack("<H", FOREIGN_ID), np.uint8)
        made.append(copy)
    return made


def records_of(body: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The samples, the marks of rounds, and all other records of perf data."""
    found: dict[int, list[bytes]] = {9: [], 68: [], 0: []}
    at = 0
    while at < len(body):
        kind, _, size = struct.unpack_from("<IHH", body, at)
        found[kind if kind in found else 0].append(body[at : at + size])
        at += size
    return found[9], found[68], found[0]


def with_foreign(data: bytearray, samples: list[bytes], ours: float) -> None:
    """Give a share of the samples, by their threads, the number of another event.

    The event is the last one in the file, whose format is then that of kvm_msr.
    """
    last = 0
    for place in range(len(data) - 8):
        if data[place : place + 4] == b"ID: ":
            last = place
    number = int(bytes(data[last + 4 : data.index(b"\n", last)]))
    name = data.rindex(b"name: ", 0, last)
    end = data.index(b"\n", name)
    data[name + 6 : end] = b"msr".ljust(end - name - 6, b"x")
    for index, sample in enumerate(samples):
        tid = struct.unpack_from("<I", sample, 20)[0]
        if (tid * 7 + index // 64) % 20 >= round(ours * 20):
            changed = bytearray(sample)
            # header, ip, tid, time, id, cpu, period, size of the record
            struct.pack_into("<H", changed, 8 + 6 * 8 + 4, number)
            samples[index] = bytes(changed)


def write_perf(path: Path, n_events: int, ours: float = 1.0) -> int:
    """Write a perf.data of at least ``n_events`` samples, a share ``ours`` of which is ours."""
    data = bytearray(lzma.decompress((SAMPLES / "qemu.perf.data.xz").read_bytes()))
    data_at, data_size = struct.unpack_from("<QQ", data, 40)
    body = bytes(data[data_at : data_at + data_size])
    samples, rounds, others = records_of(body)
    if ours < 1:
        with_foreign(data, samples, ours)
    lengths = [len(s) for s in samples]
    block = np.frombuffer(b"".join(samples), np.uint8).copy()
    # IDENTIFIER is not set: header, ip, tid, then the time.
    places = np.cumsum([0, *lengths[:-1]]) + 24
    times = np.array([block[p : p + 8].view("<u8")[0] for p in places], np.uint64)
    span = np.uint64(int(times.max() - times.min()) + 1_000_000)
    copies = -(-n_events // len(samples))
    tail = data[data_at + data_size :]
    new_size = sum(len(other) for other in others) + copies * (len(block) + 8)
    shift = new_size - data_size
    struct.pack_into("<Q", data, 48, new_size)
    flags = int.from_bytes(data[72:104], "little")
    for entry in range(flags.bit_count()):
        where = struct.unpack_from("<Q", tail, 16 * entry)[0]
        struct.pack_into("<Q", tail, 16 * entry, where + shift)
    index = places[:, None] + np.arange(8)
    with path.open("wb") as file:
        file.write(data[:data_at] + b"".join(others))
        for copy in range(copies):
            block[index] = (times + np.uint64(copy) * span).view(np.uint8).reshape(-1, 8)
            file.write(block.tobytes() + rounds[0])
        file.write(tail)
    return copies * len(samples)
