"""perf.data read by compiled loops: event by event what is read without them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support.mutations import mutate
from support.perf_recorder import (
    CALLCHAIN,
    CPU,
    ID,
    IDENTIFIER,
    RAW,
    READ,
    TID,
    TIME,
    USUAL,
    PerfRecording,
)
from support.recorder import ENTER, EXIT, FOREIGN, Machine
from support.recordings import SAMPLES, SHARED, shared

import tdxtrace
from tdxtrace.ingest import compiled
from tdxtrace.ingest.binary import opened
from tdxtrace.ingest.events.met import Vocabulary
from tdxtrace.ingest.perf import chain, order
from tdxtrace.ingest.raw import concatenate
from tdxtrace.ingest.recognise import recording
from tdxtrace.ingest.records.gather import block_of
from tdxtrace.ingest.stream import open_stream
from tdxtrace.ingest.tally import Tally

pytest.importorskip("numba", reason="numba, which compiles loops, is not installed")

START = 10**9
ONLY_NUMPY, EVEN_SMALL = 1 << 62, 0
CAPTURES = (
    "rig/perf/perf.data",
    "rig/qemu-names/perf.data",
    "public/perfdata-kdab-probe-uprobe.data",
    "public/perfdata-kdab-probe-uprobe-stream.data",
    "public/perfdata-mstange-sleep.compressed2.data",
    "public/perfdata-quipper-lost_samples-4.4.data",
)


def _outcome(path: Path, large: int) -> list[Any]:
    """All that reading a recording gives, up to the event that it fails at."""
    said: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiled, "LARGE_BYTES", large)
        patched.setattr(order, "LEAST_READY", 0)
        stream, tally, batches = open_stream(str(path)), Tally(), []
        try:
            assert recording(stream.peek()) == "perf.data"
            with opened("perf.data", stream, None, Vocabulary(), tally) as reader:
                # A batch is what others follow: it has to be taken before they are read.
                batches = [batch.settled() for batch in reader.batches()]
                said += [reader.header(), reader.position]
        except tdxtrace.TdxtraceError as error:
            said.append(str(error))
        finally:
            stream.close()
    if batches:
        rows = concatenate(batches)
        heads = rows.line, rows.ts_ns, rows.tid, rows.tgid, rows.cpu, rows.in_irq, rows.event
        said += [list(map(len, batches)), *(column.tolist() for column in heads)]
        for name in sorted(rows.values):
            there = rows.has(name)
            said.append((name, there.tolist(), (rows.value(name) * there).tolist()))
    said += [tally.n_lines, tally.n_headers, dict(tally.events), tally.span(), tally.cpus()]
    return [*said, tally.losses(0).rows(), tally.thread_table(0).rows()]


def _assert_same(path: Path) -> list[Any]:
    """Read a recording with compiled loops and without; return what both give."""
    plain, swift = _outcome(path, ONLY_NUMPY), _outcome(path, EVEN_SMALL)
    assert len(plain) == len(swift)
    for one, other in zip(plain, swift, strict=True):
        assert one == other
    return plain


def _tables(path: Path, large: int) -> tdxtrace.Trace:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiled, "LARGE_BYTES", large)
        return tdxtrace.read_trace(path)


@pytest.mark.parametrize(
    "path",
    [SAMPLES / "qemu.perf.data.xz", *(SHARED / name for name in CAPTURES[:2])],
    ids=lambda path: "/".join(path.parts[-2:]),
)
def test_captures_give_the_same_tables(path: Path) -> None:
    if not path.is_relative_to(SAMPLES):
        shared(str(path.relative_to(SHARED)))
    plain, swift = _tables(path, ONLY_NUMPY), _tables(path, EVEN_SMALL)
    swift.check()
    assert swift.seamcalls.height > 100
    for name, frame in plain.tables().items():
        assert_frame_equal(swift.tables()[name], frame)
    assert swift.provenance == plain.provenance


@pytest.mark.parametrize("name", CAPTURES)
def test_captures_give_the_same_events_and_losses(name: str) -> None:
    _assert_same(shared(name))


def _rounds(made: PerfRecording, n_rounds: int, n_cpus: int) -> bytes:
    """Calls on several CPUs, whose buffers are drained in turn; now and then some are lost."""
    body = made.comm(0, 7, "vcpu")
    for turn in range(n_rounds):
        for cpu in range(n_cpus):
            for n in range(4):
                time = START + 1000 * turn + 200 * n + 77 * cpu
                body += made.call(time, 7 + cpu, n << 12, turn, cpu)
            body += made.sample(FOREIGN, START + 1000 * turn + 3, made.machine.foreign(7), cpu)
        if turn % 5 == 4:
            body += made.lost(START + 1000 * turn + 900, turn % n_cpus, 1 + turn)
        if turn % 7 == 3:
            body += made.fork(START + 1000 * turn, 7, 9) + made.comm(START + 1000 * turn, 9, "x")
        body += made.end_round()
    return body


def _usual() -> PerfRecording:
    made = PerfRecording()
    made.body = _rounds(made, 40, 3)
    return made


def _of_layouts(kinds: Sequence[int], read_format: int = 0) -> PerfRecording:
    events = dict(zip((ENTER, EXIT, FOREIGN), kinds, strict=True))
    made = PerfRecording(sample_types=events, read_format=read_format)
    m = made.machine
    for n in range(60):
        time = START + 50 * n
        made.body += made.sample(ENTER, time, m.enter(7, n << 12), n % 3, [n] * (n % 5))
        made.body += made.sample(FOREIGN, time + 2, m.foreign(8), 8191 + n % 2, [1])
        made.body += made.sample(EXIT, time + 9, m.leave(7, n), n % 3, [4] * (n % 3))
        if n % 9 == 0:
            made.body += made.end_round()
    return made


def _damaged_samples() -> PerfRecording:
    """Samples that lack what they promise: records, room for fields, their fixed part."""
    made = PerfRecording()
    m = made.machine
    for n in range(30):
        made.body += made.call(START + 100 * n, 7, n << 12, n)
        short = (m.enter(7, 1), m.leave(7, 1))[n % 2][: 4 + 4 * (n % 6)]
        made.body += made.sample((ENTER, EXIT)[n % 2], START + 100 * n + 40, short.ljust(8, b"\0"))
        made.body += made.record(9, bytes(range(8 * (n % 8))))
        made.body += made.record(9, m.pack("QiiQQIIQI", 5, 1, 7, START, 71, 0, 0, 1, 1 << n))
        made.body += made.end_round() if n % 7 == 0 else b""
    return made


IDENTIFIED = IDENTIFIER | TID | TIME | CPU | RAW
RECORDINGS: dict[str, Callable[[], bytes]] = {
    "usual": lambda: _usual().file(),
    "pipe": lambda: _usual().pipe(),
    "big-endian": lambda: _big().file(),
    "zstd": lambda: _packed(81),
    "zstd 2": lambda: _packed(83),
    "few parts": lambda: _of_layouts([TIME | RAW] * 3).file(),
    "no time": lambda: _of_layouts([TID | CPU | RAW] * 3).file(),
    "callchains": lambda: _of_layouts([USUAL | CALLCHAIN] * 3).file(),
    "groups": lambda: _of_layouts([USUAL | READ | CALLCHAIN] * 3, 4 | 8).file(),
    "read": lambda: _of_layouts([USUAL | READ] * 3, 1 | 2 | 4 | 16).file(),
    "layouts": lambda: _of_layouts([IDENTIFIED, IDENTIFIED | CALLCHAIN, IDENTIFIED & ~CPU]).file(),
    "layouts by id": lambda: _of_layouts([USUAL, USUAL | CALLCHAIN, USUAL & ~RAW]).file(),
    "layouts untold": lambda: _of_layouts([USUAL, USUAL & ~ID, USUAL]).file(),
    "silent": lambda: _of_layouts([USUAL, USUAL, USUAL & ~RAW]).file(),
    "silent in all": lambda: _of_layouts([USUAL & ~RAW] * 3).file(),
    "damaged samples": lambda: _damaged_samples().file(),
}


def _big() -> PerfRecording:
    made = PerfRecording(Machine(big_endian=True))
    made.body = _rounds(made, 12, 3)
    return made


def _packed(kind: int) -> bytes:
    made, plain = PerfRecording(), _usual()
    made.body = made.compressed(plain.body, [100, 2000, 7777], kind) + made.end_round()
    return made.file()


@pytest.mark.parametrize("kind", RECORDINGS)
def test_recordings_give_the_same(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "perf.data"
    path.write_bytes(RECORDINGS[kind]())
    assert len(_assert_same(path)) > 5


def _mutants(n: int, path: Path, look: Callable[[Path], object]) -> int:
    """Damage each of the recordings ``n`` times; return how many were still read."""
    n_read = 0
    for kind, make in RECORDINGS.items():
        data, chance = make(), random.Random(kind)
        head = data.index(b"PERFILE2"[::-1] if kind == "big-endian" else b"PERFILE2")
        for _ in range(n):
            made = mutate(data, chance)
            if made[head : head + 8] == data[head : head + 8]:
                path.write_bytes(made)
                look(path)
                n_read += 1
    return n_read


def test_damaged_recordings_give_the_same(tmp_path: Path) -> None:
    assert _mutants(100, tmp_path / "perf.data", _assert_same) > 1200


def test_no_loop_leaves_its_arrays(tmp_path: Path) -> None:
    """All that is read here is read again by loops that check every index."""
    checks = "damaged_recordings or recordings_give or times_are or chains_are"
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", checks, __file__],
        env=os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-4000:]
    assert list(tmp_path.rglob("*.nbc")), "nothing was compiled"


TIMES = st.lists(st.integers(0, 40), max_size=60)


@given(TIMES, st.integers(-1, 45))
def test_times_are_ordered_as_numpy_orders_them(times: list[int], limit: int) -> None:
    from tdxtrace.ingest.perf.pool import loops

    ts_ns = np.array(times, np.int64)
    time, places = np.empty((2, len(times)), np.int64)
    spare, bounds = np.empty(2 * len(times), np.int64), np.empty(len(times) + 1, np.int64)
    names = np.arange(len(times)) * 3
    n = loops.sort(ts_ns, names, len(ts_ns), limit, time, places, spare, bounds)
    expected = np.argsort(ts_ns, kind="stable")
    expected = expected[ts_ns[expected] <= limit]
    assert places[:n].tolist() == names[expected].tolist()
    assert time[:n].tolist() == ts_ns[expected].tolist()


@pytest.mark.parametrize("seed", range(40))
def test_chains_are_followed_as_numpy_follows_them(seed: int) -> None:
    from tdxtrace.ingest.perf import loops

    chance = random.Random(seed)
    words = [9 | chance.choice((1, 2, 3, 500)) * 8 << 48 for _ in range(3000)]
    for _ in range(seed % 4):
        odd = chance.choice((0, 7 << 48, 12 << 48 | 9, 81 | 8 << 48, 66 | 16 << 48, 68 | 8 << 48))
        words[chance.randrange(len(words))] = odd
    data = np.array(words, np.uint64).view(np.uint8).tobytes()[: chance.randrange(24_000)]
    block = block_of(data)
    start, others = np.full((2, len(data) // 8), -1, np.int64)
    n, n_others, end, is_damaged = loops.follow(block.view(np.int64), len(data), start, others)
    expected = chain.follow(block, len(data), False)
    assert start[:n].tolist() == expected.start.tolist()
    assert (end, bool(is_damaged)) == (expected.end, expected.is_damaged)
    kinds = block.view(np.uint32)[expected.start >> 2]
    assert others[:n_others].tolist() == np.flatnonzero(kinds != 9).tolist()


def test_a_store_that_is_too_short_is_not_used_again() -> None:
    from tdxtrace.ingest.perf.pool.pool import store_of

    long, short = np.zeros(9, np.int64), np.zeros(3, np.int64)
    free = [short, long, short]
    assert store_of(5, free) is long
    assert len(store_of(5, free)) == 5
    assert free == []
