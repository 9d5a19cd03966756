"""The loops over perf.data give equal results interpreted and compiled, also on damaged input."""

from __future__ import annotations

import lzma
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.effort import times
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
from support.recorder import ENTER, EXIT, FOREIGN
from support.recordings import SAMPLES, shared
from support.referee import referee

from tdxtrace.compiler import Runner, interpreted
from tdxtrace.errors import TdxtraceError
from tdxtrace.ingest.batch import SLOTS, RecordBatch
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.loops import perf_records
from tdxtrace.ingest.loops.pages import MAX_ROW_WORDS
from tdxtrace.ingest.perfdata import ordered_events, reader
from tdxtrace.ingest.perfdata.reader import PerfReader
from tdxtrace.ingest.records.datafile import open_file
from tdxtrace.ingest.records.layouts import PADDING
from tdxtrace.ingest.stats import SourceStats

pytest.importorskip("numba", reason="numba, which compiles loops, is not installed")

START = 10**9
CAPTURES = (
    "rig/perf/perf.data",
    "rig/qemu-names/perf.data",
    "public/perfdata-kdab-probe-uprobe.data",
    "public/perfdata-kdab-probe-uprobe-stream.data",
    "public/perfdata-mstange-sleep.compressed2.data",
    "public/perfdata-quipper-lost_samples-4.4.data",
)


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of threads from 64 on are unusual, so that there is little to compare."""
    monkeypatch.setattr(ordered_events, "USUAL_TIDS", 64)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and queues so small that all that grows has to grow, and batches come early."""
    monkeypatch.setattr(ordered_events, "_MIN_CAPACITY", 1)
    monkeypatch.setattr(ordered_events, "_MAX_SIDEBAND", 2)
    monkeypatch.setattr(ordered_events, "_MIN_QUEUED", 1)
    monkeypatch.setattr(reader, "_SMALL_BYTES", 96)
    monkeypatch.setattr(reader, "_BLOCK_BYTES", 3000)


def _outcome(path: Path, run: Runner[Any]) -> list[Any]:
    """All that reading a recording gives, up to the event that it fails at."""
    said: list[Any] = []
    stats, file = SourceStats(), open_file(str(path))
    try:
        reader = PerfReader(file, EventRegistry(), stats)
        said += [_rows(batch) for batch in reader.batches(run)]
        said += [reader.header(), reader.position]
    except TdxtraceError as error:
        said.append(str(error))
    finally:
        file.close()
    said += [stats.n_lines, stats.n_headers, dict(stats.events), stats.span(), stats.cpus()]
    return [*said, stats.losses(0).rows(), stats.thread_table(0).rows()]


def _rows(batch: RecordBatch) -> list[tuple[int, ...]]:
    """The heads of every event, and all its fields: whether it has each, and what it is."""
    heads = (batch.line, batch.ts_ns, batch.tid, batch.tgid, batch.cpu, batch.in_irq, batch.event)
    fields = [column for slot in SLOTS for column in batch.get(slot)]
    return list(zip(*(column.tolist() for column in (*heads, *fields)), strict=True))


@pytest.mark.parametrize("name", CAPTURES)
def test_captures_pass_the_referee(name: str) -> None:
    assert len(_outcome(shared(name), referee)) > 5


def test_the_sample_passes_the_referee(tmp_path: Path) -> None:
    path = tmp_path / "perf.data"
    path.write_bytes(lzma.decompress((SAMPLES / "qemu.perf.data.xz").read_bytes()))
    ours = _outcome(path, referee)
    assert len(ours[0]) == 1620
    assert ours == _outcome(path, interpreted)


def _rounds(made: PerfRecording, n_rounds: int, n_cpus: int) -> bytes:
    """Calls on several CPUs, whose buffers are drained in turn; now and then some are lost."""
    body = made.comm(0, 7, "vcpu")
    for turn in range(n_rounds):
        for cpu in range(n_cpus):
            for n in range(2 + (turn + cpu) % 3):
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
    made.body = _rounds(made, 9, 3)
    return made


def _of_layouts(kinds: Sequence[int], read_format: int = 0) -> PerfRecording:
    events = dict(zip((ENTER, EXIT, FOREIGN), kinds, strict=True))
    made = PerfRecording(sample_types=events, read_format=read_format)
    m = made.machine
    for n in range(20):
        time = START + 50 * n
        made.body += made.sample(ENTER, time, m.enter(7, n << 12), n % 3, [n] * (n % 5))
        made.body += made.sample(FOREIGN, time + 2, m.foreign(8), 8191 + n % 2, [1])
        made.body += made.sample(EXIT, time + 9, m.leave(7, n), n % 3, [4] * (n % 3))
        if n % 6 == 0:
            made.body += made.end_round()
    return made


def _damaged_samples() -> PerfRecording:
    """Samples that lack what they promise: records, room for fields, their fixed part."""
    made = PerfRecording()
    m = made.machine
    for n in range(16):
        made.body += made.call(START + 100 * n, 7, n << 12, n)
        short = (m.enter(7, 1), m.leave(7, 1))[n % 2][: 4 + 4 * (n % 6)]
        made.body += made.sample((ENTER, EXIT)[n % 2], START + 100 * n + 40, short.ljust(8, b"\0"))
        made.body += made.record(9, bytes(range(8 * (n % 8))))
        made.body += made.record(9, m.pack("QiiQQIIQI", 5, 1, 7, START, 71, 0, 0, 1, 1 << n))
        made.body += made.end_round() if n % 5 == 0 else b""
    return made


def _packed(kind: int) -> bytes:
    made, plain = PerfRecording(), _usual()
    made.body = made.compressed(plain.body, [100, 2000, 7777], kind) + made.end_round()
    return made.file()


IDENTIFIED = IDENTIFIER | TID | TIME | CPU | RAW
RECORDINGS: dict[str, Callable[[], bytes]] = {
    "usual": lambda: _usual().file(),
    "pipe": lambda: _usual().pipe(),
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


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("kind", RECORDINGS)
def test_recordings_pass_the_referee(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "perf.data"
    path.write_bytes(RECORDINGS[kind]())
    assert len(_outcome(path, referee)) > 7


@pytest.mark.parametrize("kind", RECORDINGS)
def test_damaged_recordings_pass_the_referee(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Most of the time would go into comparing room that is not used.
    monkeypatch.setattr(ordered_events, "_MIN_CAPACITY", MAX_ROW_WORDS)
    monkeypatch.setattr(ordered_events, "_MAX_SIDEBAND", 8)
    monkeypatch.setattr(ordered_events, "_MIN_QUEUED", 5)
    monkeypatch.setattr(reader, "_SMALL_BYTES", 1000)
    data, chance, path = RECORDINGS[kind](), random.Random(kind), tmp_path / "perf.data"
    n_read, n_cases = 0, times(400)
    for _ in range(n_cases):
        made = mutate(data, chance)
        if made.startswith(b"PERFILE2"):
            path.write_bytes(made)
            _outcome(path, referee)
            n_read += 1
    assert n_read > 0.75 * n_cases


@pytest.mark.parametrize("kind", sorted(RECORDINGS.keys() - {"damaged samples"}))
def test_rows_do_not_depend_on_batches(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "perf.data"
    path.write_bytes(RECORDINGS[kind]())
    whole = _rows_of(path)
    request.getfixturevalue("little_room")
    assert _rows_of(path) == whole


def _rows_of(path: Path) -> list[tuple[int, ...]]:
    file = open_file(str(path))
    batches = list(PerfReader(file, EventRegistry(), SourceStats()).batches(interpreted))
    file.close()
    return [row for batch in batches for row in _rows(batch)]


TIMES = st.lists(st.integers(0, 40) | st.integers(-(1 << 63), (1 << 63) - 1), max_size=60)


@given(TIMES)
def test_samples_are_ordered_by_time_and_then_as_they_came(times: list[int]) -> None:
    order = ordered_events.in_time_order(np.array(times, np.int64))
    assert order.tolist() == sorted(range(len(times)), key=lambda place: times[place])


def _followed(data: bytes) -> tuple[list[int], int]:
    """Where records begin that are no samples, and where the first stands that is not followed."""
    others, at = [], 0
    while at + 8 <= len(data):
        kind = int.from_bytes(data[at : at + 4], "little")
        size = int.from_bytes(data[at + 6 : at + 8], "little")
        if size < 8 or at + size > len(data) or kind in (66, 71, 81, 83):
            break
        others += [at] * (kind != 9)
        at += size
    return others, at


@pytest.mark.parametrize("seed", range(40))
def test_records_are_followed_by_their_lengths(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    # Bodies hold what looks like the header of another record.
    sizes = (1, 2, 3) * 20 + (500,)
    words = [chance.choice((9, 2, 68)) | chance.choice(sizes) << 51 for _ in range(3000)]
    for _ in range(seed % 8):
        odd = chance.choice((0, 7 << 48, 12 << 48 | 9, 81 | 8 << 48, 66 | 16 << 48, 68 | 8 << 48))
        words[chance.randrange(len(words))] = odd
    data = np.array(words, np.uint64).tobytes()[: chance.randrange(24_000)]
    path = tmp_path / "perf.data"
    path.write_bytes(_of_layouts([USUAL] * 3).file())
    reader = PerfReader(open_file(str(path)), EventRegistry(), SourceStats())
    list(reader.batches(referee))
    block = np.frombuffer(data + bytes(PADDING), np.uint8).copy()
    found: list[int] = []
    at, why = 0, perf_records.FULL
    while why != perf_records.END:
        why, at, others = reader.ordered.queue(block, at, len(data))
        found += [place for place, _ in others]
    assert (found, at) == _followed(data)
