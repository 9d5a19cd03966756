"""Events of all CPUs are merged by time, with their common fields."""

from __future__ import annotations

import lzma
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.effort import times
from support.mutations import SEEDS, mutate
from support.recorder import ENTER, EXIT, FOREIGN, FORMATS, Machine
from support.recordings import SAMPLES, SHARED
from support.referee import referee

from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import UNKNOWN, RecordBatch, concatenate
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.records.datafile import open_file
from tdxtrace.ingest.records.formats import Formats, page_layout
from tdxtrace.ingest.records.layouts import EventCatalog
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.tracedat import merge, reader
from tdxtrace.ingest.tracedat.merge import CpuPages, RingReader

M = Machine(page_size=512)
START = 10**9
LEAST = {ENTER: 40, EXIT: 32}
EVENT = st.tuples(
    st.integers(0, 3),  # time since the one before
    st.sampled_from((ENTER, EXIT, FOREIGN)),
    st.sampled_from((0, 1, 7, 90, -3)),  # thread
    st.sampled_from((0, 0x08, 0x40, 0x01)),  # flags
    st.sampled_from((0, 1, 0xFF)),  # preempt count
    st.integers(-2, 2),  # bytes, more or fewer than its fields need, in words
)
CPU = st.tuples(st.integers(0, 9), st.lists(st.lists(EVENT, max_size=5), max_size=4))
Event = tuple[int, int, int, int, int, int]


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of threads from 64 on are unusual, so that there is little to compare."""
    monkeypatch.setattr(merge, "USUAL_TIDS", 64)


def _record(event: Event) -> bytes:
    _, number, tid, flags, count, more = event
    head = M.pack("HBBi", number, flags, count, tid)
    return (head + bytes(range(80)))[: LEAST.get(number, 16) + 4 * more]


def _pages(start: int, pages: list[list[Event]]) -> tuple[bytes, list[tuple[int, Event]]]:
    """The pages of a CPU, and the time of each event."""
    made, now, result = b"", START + start, []
    for events in pages:
        begin, records = now, b""
        for event in events:
            now += event[0]
            records += M.event(event[0], _record(event))
            result.append((now, event))
        made += M.page(begin, records)
    return made, result


def _reader(cpus: list[bytes]) -> RingReader:
    formats = Formats()
    for system, texts in FORMATS.items():
        for text in texts:
            formats.add(text, system)
    stats = SourceStats()
    catalog = EventCatalog(formats.events, EventRegistry(), stats, lambda made: made.name)
    layout = page_layout(M.header_page.decode(), M.page_size)
    assert layout is not None
    sources = [CpuPages(10 + n, _source(pages)) for n, pages in enumerate(cpus)]
    return RingReader(sources, layout, catalog, stats, run=referee)


def _source(data: bytes) -> Callable[[NDArray[np.uint8]], int]:
    left = memoryview(data)

    def read(into: NDArray[np.uint8]) -> int:
        nonlocal left
        part, left = left[: len(into)], left[len(into) :]
        into[: len(part)] = np.frombuffer(part, np.uint8)
        return len(part)

    return read


def _loss(event: Event) -> tuple[str, str]:
    """What a record is counted as that becomes no row."""
    if event[1] == FOREIGN:
        return "noise", "noise"
    return "undecoded", f"tdh_mem_page_aug_{'enter' if event[1] == ENTER else 'exit'}"


def _joined(batches: Iterator[RecordBatch]) -> RecordBatch:
    return concatenate(list(batches))


def _in_irq(flags: int, count: int) -> int:
    return UNKNOWN if count == 0xFF else int(flags & 0x48 != 0)


@given(st.lists(CPU, min_size=1, max_size=6), st.sampled_from((1, 3, 1 << 10)))
def test_events_of_all_cpus_come_in_their_order(
    cpus: list[tuple[int, list[list[Event]]]], n_rows: int
) -> None:
    made = [_pages(*cpu) for cpu in cpus]
    ring = _reader([pages for pages, _ in made])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merge, "BATCH_ROWS", n_rows)
        batch = _joined(ring.batches())
    every = [(time, 10 + cpu, e) for cpu, (_, result) in enumerate(made) for time, e in result]
    every.sort(key=lambda x: x[:2])
    ours = [
        (line, *event)
        for line, event in enumerate(every, 1)
        if event[2][1] in LEAST and event[2][5] >= 0
    ]
    assert batch.line.tolist() == [line for line, *_ in ours]
    assert batch.ts_ns.tolist() == [time for _, time, *_ in ours]
    assert batch.cpu.tolist() == [cpu for _, _, cpu, _ in ours]
    assert batch.tid.tolist() == [event[2] for *_, event in ours]
    assert batch.in_irq.tolist() == [_in_irq(*event[3:5]) for *_, event in ours]
    names = [ring.catalog.registry.events[n].name for n in batch.event]
    assert names == [
        "tdh_mem_page_aug_enter" if event[1] == ENTER else "tdh_mem_page_aug_exit"
        for *_, event in ours
    ]
    for slot, number, offset, size in (
        ("gpa", ENTER, 28, 8),
        ("level", ENTER, 36, 4),
        ("status", EXIT, 24, 8),
    ):
        value, there = batch.get(slot)
        assert there.tolist() == [event[1] == number for *_, event in ours]
        words = [_record(event)[offset : offset + size] for *_, event in ours if event[1] == number]
        assert value[there].tolist() == [int.from_bytes(word, "little") for word in words]
    assert set(ring.stats.threads) == {
        (t, "<idle>" if t == 0 else "<...>") for t in batch.tid.tolist()
    }
    assert {name: n for name, n in ring.stats.events.items() if n} == dict(Counter(names))
    lost = [event for *_, event in every if event[1] == FOREIGN or event[5] < 0]
    entries = ring.stats.entries.values()
    assert {(e.kind, e.detail): e.n_lines for e in entries} == dict(Counter(map(_loss, lost)))
    for entry in entries:
        mine = (entry.kind, entry.detail)
        first = next(
            line
            for line, (*_, event) in enumerate(every, 1)
            if (event[1] == FOREIGN or event[5] < 0) and _loss(event) == mine
        )
        assert entry.line_no == first
    assert ring.n_events() == [len(result) for _, result in made]


def test_a_cpu_whose_time_goes_back_keeps_its_order() -> None:
    """Only a damaged page does; nobody knows which of the times are wrong."""
    first = M.page(START + 50, M.event(0, M.enter(7, 0)) + M.event(9, M.leave(7, 0)))
    other = [M.page(START + n, M.event(0, M.enter(8, 0))) for n in (40, 55)]
    second = M.page(START + 20, M.event(0, M.enter(9, 0)))
    batch = _joined(_reader([first + second, b"".join(other)]).batches())
    moments = zip(batch.tid.tolist(), (batch.ts_ns - START).tolist(), strict=True)
    assert list(moments) == [(8, 40), (7, 50), (8, 55), (7, 59), (9, 20)]


def _account(stats: SourceStats) -> tuple[object, ...]:
    entries = [(e.kind, e.detail, e.line_no, e.n_lines) for e in stats.entries.values()]
    gaps = [(g.kind, g.cpu, g.line_no, g.start_ns, g.end_ns, g.n_events) for g in stats.gaps]
    return dict(stats.events), entries, gaps, stats.threads, stats.n_lines, stats.span()


def _read(path: Path) -> object:
    """Read a trace.dat whose loops run both ways; what it gives, or the error."""
    file, stats = open_file(str(path)), SourceStats()
    try:
        dat = reader.DatReader(file, EventRegistry(), stats)
        n_rows = sum(len(batch) for batch in dat.batches(referee))
    except FormatError as error:
        return str(error)
    finally:
        file.close()
    return n_rows, _account(stats)


RECORDINGS = sorted(
    path
    for folder in (SAMPLES, *SHARED.glob("rig/*"), SHARED / "public")
    for path in (*folder.glob("*.dat"), *folder.glob("*.dat.xz"))
)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_captures_are_read_the_same_either_way(path: Path, tmp_path: Path) -> None:
    if path.suffix == ".xz":
        data = lzma.decompress(path.read_bytes())
        path = tmp_path / "trace.dat"
        path.write_bytes(data)
    assert isinstance(_read(path), tuple)


@pytest.mark.parametrize("kind", [kind for kind in SEEDS if kind.startswith("trace.dat")])
def test_damaged_recordings_are_read_the_same_either_way(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_CPU_BYTES", 1)
    monkeypatch.setattr(merge, "BATCH_ROWS", 5)
    data, chance, path = SEEDS[kind](), random.Random(kind), tmp_path / "trace.dat"
    n_read, n_cases = 0, times(1500)
    for _ in range(n_cases):
        path.write_bytes(mutate(data, chance))
        n_read += isinstance(_read(path), tuple)
    assert n_read > n_cases / 3
