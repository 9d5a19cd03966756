"""Mutations of recordings, and checks of reading them."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.perf_recorder import PerfRecording
from support.recorder import FOREIGN, Machine, Recording

import tdxtrace
from tdxtrace.compiler import interpreted
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.formats import open_input
from tdxtrace.ingest.stats import SourceStats

START = 10**9
# Words that lengths, counts and offsets go wrong with.
_ABSURD = (0, 1, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
# Of the processor: far more than any of these small files takes, far less than a hang.
MAX_SECONDS = 5.0


def _pages(m: Machine, cpu: int) -> bytes:
    made = b""
    for n in range(3):
        records = m.event(5, m.enter(7 + cpu, n << 12)) + m.extend(1 << 30)
        records += m.event(5, m.leave(7 + cpu, n)) + m.padding(12) + m.event(1, m.foreign(7))
        made += m.page(START + (n << 34) + cpu, records + m.stamp(START + (n << 34) + (1 << 31)), n)
    return made


def _dat(**options: object) -> Recording:
    m = Machine(page_size=512)
    stat = b"CPU: 0\nentries: 0\noverrun: 5\n\0"
    made = Recording(m, (_pages(m, 0), _pages(m, 1)), **options)  # type: ignore[arg-type]
    made.options = [(2, stat), (4, b"[mono]\0"), (7, b"12\0"), (14, m.pack("IIQ", 1, 0, 0))]
    return made


def _perf() -> PerfRecording:
    made = PerfRecording()
    made.body = made.comm(0, 7, "vcpu") + made.fork(START, 8, 7)
    for n in range(6):
        made.body += made.call(START + 100 * n, 7 + n % 2, n << 12, n, cpu=n % 2)
        made.body += made.sample(FOREIGN, START + 100 * n + 3, made.machine.foreign(7))
    made.body += made.end_round() + made.lost(START + 700, 0, 3) + made.end_round()
    return made


def _packed_perf(kind: int) -> bytes:
    made, plain = PerfRecording(), _perf()
    made.body = made.compressed(plain.body, [100, 200], kind) + made.end_round()
    return made.file()


SEEDS: dict[str, Callable[[], bytes]] = {
    "trace.dat 6": lambda: _dat(buffers={"rig": (_pages(Machine(page_size=512), 0), b"")}).v6(),
    "trace.dat 7": lambda: _dat().v7(),
    "trace.dat 7 zstd": lambda: _dat(compression="zstd").v7(),
    "trace.dat 7 zlib": lambda: _dat(compression="zlib").v7(),
    "perf.data": lambda: _perf().file(),
    "perf.data pipe": lambda: _perf().pipe(),
    "perf.data zstd": lambda: _packed_perf(81),
    "perf.data zstd 2": lambda: _packed_perf(83),
}


@contextmanager
def in_memory() -> Iterator[Callable[[bytes], Path]]:
    """Give what makes a file of bytes that is on no disk, always the same one."""
    descriptor = os.memfd_create("recording")

    def write(data: bytes) -> Path:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        return Path(f"/proc/self/fd/{descriptor}")

    try:
        yield write
    finally:
        os.close(descriptor)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Damage a recording in one to four ways."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(made)) if made else 0
        way = chance.randrange(6)
        if way == 0:
            made[at : at + 1] = bytes([chance.randrange(256)])
        elif way == 1:
            form = chance.choice("HIQ")
            size = struct.calcsize(form)
            word = chance.choice(_ABSURD) & (1 << 8 * size) - 1
            aligned = at // size * size
            made[aligned : aligned + size] = struct.pack("<" + form, word)
        elif way == 2:
            del made[at : at + chance.choice((1, 8, 100, 5000))]
        elif way == 3:
            made[at:at] = made[: chance.choice((1, 8, 100))]
        elif way == 4:
            made[at : at + 1] = bytes([made[at] ^ 1 << chance.randrange(8)]) if made else b""
        else:
            del made[at:]
    return bytes(made)


def survive(path: Path, whole: bool) -> str:
    """Read a damaged recording; return how it ended.

    It must end in time, in an answer or in an error that is the user's to mend.

    Args:
        path: The recording.
        whole: Make the tables too, and check them.
    """
    begin = time.process_time()
    try:
        if whole:
            tdxtrace.read_trace(path).check()
        else:
            _events(path)
        ended = "read"
    except tdxtrace.TdxtraceError as error:
        ended = "refused" if "\n" not in str(error) else "refused in several lines"
    assert time.process_time() - begin < MAX_SECONDS
    return ended


def _events(path: Path) -> None:
    stats = SourceStats()
    with open_input(str(path)) as given:
        if given.format.unit == "record":
            reader = given.reader(EventRegistry(), stats)
            n_events = sum(len(batch) for batch in reader.batches(interpreted))
            reader.header()
            assert n_events <= stats.n_lines
            stats.losses(0)
