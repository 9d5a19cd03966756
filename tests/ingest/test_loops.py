"""Compiled loops give what the loops in numpy give, and are loaded for large inputs only."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support.mutations import SEEDS, mutate
from support.recorder import Machine, Recording

import tdxtrace
from tdxtrace import compiler
from tdxtrace.ingest import compiled
from tdxtrace.ingest import raw as raw_events
from tdxtrace.ingest.compiled import pays
from tdxtrace.ingest.decoding import calls, decoder, frames, rowloops
from tdxtrace.ingest.decoding.calls import Calls
from tdxtrace.ingest.decoding.kinds import Kinds
from tdxtrace.ingest.decoding.loops import look
from tdxtrace.ingest.events.vocabulary import Event
from tdxtrace.ingest.raw import RawEvents
from tdxtrace.ingest.records.formats import Field
from tdxtrace.ingest.records.gather import Block, block_of
from tdxtrace.ingest.records.layouts import Layout
from tdxtrace.ingest.records.loops import RecordFields, table_of
from tdxtrace.ingest.tally import Tally
from tdxtrace.ingest.tracedat import merge
from tdxtrace.tables.events import SEAMCALLS

ROOT = Path(__file__).parent.parent.parent
SAMPLES = ROOT / "sample_traces"
RECORDINGS = sorted(SAMPLES.glob("*.dat*"))
DAMAGED = [kind for kind in SEEDS if kind.startswith("trace.dat")]
EVERY = 0
NEVER = 1 << 60


def _read(path: Path, least: int) -> tdxtrace.Trace | str:
    """Read with compiled loops if the input has at least so many bytes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiled, "LARGE_BYTES", least)
        patched.setattr(compiler, "COMPILE_BYTES", least)
        for module in (decoder, raw_events):
            patched.setattr(module, "MANY_EVENTS", 1)
        try:
            return tdxtrace.read_trace(path)
        except tdxtrace.TdxtraceError as error:
            return str(error)


def _same(one: tdxtrace.Trace | str, other: tdxtrace.Trace | str) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert one.provenance == other.provenance
    for name, rows in other.tables().items():
        assert_frame_equal(one.tables()[name], rows)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda p: p.name)
def test_compiled_loops_read_the_same_tables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n_bytes, n_rows in ((4096, 100), (1 << 18, 1 << 17)):
        monkeypatch.setattr(merge, "_CPU_BYTES", n_bytes)
        monkeypatch.setattr(merge, "BATCH_ROWS", n_rows)
        _same(_read(path, EVERY), _read(path, NEVER))


@pytest.mark.parametrize("scenario", ["balloon"])
def test_compiled_loops_read_kvms_own_events(scenario: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.dat"
    words = ["simulate", scenario, "--format", "trace.dat", "-o", str(path), "--fault", "lost=0.02"]
    subprocess.run([sys.executable, "-m", "tdxtrace", *words, "--seed", "3"], check=True)
    read = _read(path, EVERY)
    assert isinstance(read, tdxtrace.Trace)
    assert read.vm_entries.height > 100
    assert read.seamcalls.height > 100
    _same(read, _read(path, NEVER))


def test_threads_of_a_round_with_a_record_too_short_are_named(tmp_path: Path) -> None:
    m, path = Machine(), tmp_path / "trace.dat"
    records = m.event(1, m.enter(7, 1 << 12)) + m.event(1, m.leave(7, 0))
    records += m.event(1, m.enter(8, 1 << 12)) + m.event(1, m.leave(8, 0)[:16])
    path.write_bytes(Recording(m, (m.page(1000, records),)).v6())
    read = _read(path, EVERY)
    assert isinstance(read, tdxtrace.Trace)
    assert read.threads["tid"].to_list() == [7, 8]
    assert "undecoded" in read.losses["kind"]
    _same(read, _read(path, NEVER))


@pytest.mark.parametrize("kind", DAMAGED)
def test_compiled_loops_read_the_same_of_damaged_recordings(kind: str, tmp_path: Path) -> None:
    data, chance, path = SEEDS[kind](), random.Random(kind), tmp_path / "recording"
    for _ in range(150):
        path.write_bytes(mutate(data, chance))
        _same(_read(path, EVERY), _read(path, NEVER))


CHECKED = """
import random, sys
from pathlib import Path
import pytest
from ingest import test_loops
from support.mutations import SEEDS, mutate
path = Path(sys.argv[1])
for kind in test_loops.DAMAGED:
    data, chance = SEEDS[kind](), random.Random(kind + " checked")
    for _ in range(150):
        path.write_bytes(mutate(data, chance))
        test_loops._read(path, test_loops.EVERY)
import numba
print(numba.config.BOUNDSCHECK)
"""


def test_no_loop_reaches_beyond_its_arrays(tmp_path: Path) -> None:
    checks = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    command = [sys.executable, "-c", CHECKED, str(tmp_path / "recording")]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | checks | paths
    )
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


def test_small_inputs_do_not_load_the_compiler() -> None:
    read = "import sys, tdxtrace; tdxtrace.read_trace(sys.argv[1]); print('numba' in sys.modules)"
    command = [sys.executable, "-c", read, str(SAMPLES / "tracecmd-v7.dat")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_without_the_compiler_large_inputs_are_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    path = SAMPLES / "tracecmd-v7.dat"
    expected = _read(path, EVERY)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not pays(NEVER)
    _same(_read(path, EVERY), expected)


def test_loops_pay_for_large_inputs_of_known_size() -> None:
    sizes = (None, 0, compiled.LARGE_BYTES - 1, compiled.LARGE_BYTES)
    assert [pays(size) for size in sizes] == [False, False, False, True]


def test_where_nothing_can_be_kept_loops_are_compiled_in_every_run(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("no folder")
    run = (
        "import numpy as np, tdxtrace.ingest.compiled as c\n"
        "def double(a):\n    a[0] *= 2\n"
        "a = np.array([21])\nc.compiled(double)(a)\nprint(a[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", run],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"NUMBA_CACHE_DIR": str(taken)},
    )
    assert done.stdout == "42\n"


def _layout(event: int, **places: tuple[int, int, bool]) -> Layout:
    reads = {name: Field(name, *place, True) for name, place in places.items()}
    return Layout(event, "call", f"event{event}", reads, max(f.end for f in reads.values()))


LAYOUTS = (
    _layout(0, gpa=(16, 8, False), level=(24, 4, True), td_id=(8, 8, False)),
    _layout(1, status=(24, 8, False), out_rcx=(3, 8, False)),
    _layout(2, gpa=(9, 4, True), page=(13, 8, False), vp_id=(21, 2, True)),
    _layout(3, status=(20, 4, True), gpa=(8, 8, False), ext_err1=(12, 8, False)),
    _layout(4, level=(26, 1, False), status=(27, 1, True)),
    _layout(5, ext_err2=(8, 8, False), out_rdx=(16, 8, False), out_rcx=(8, 2, False)),
    # What says more of a call than the loop reads: the number of a page.
    _layout(4, gfn=(8, 4, False)),
)
EVENTS = [
    Event("a", "call", "entry", "tdh_a", 6),
    Event("b", "call", "return", "tdh_a", 6),
    Event("c", "call", "entry", "tdh_b", 0),
    Event("d", "call", "return", "tdh_b", 0),
    Event("e", "call", "entry", "tdh_c", 12, "vcpu_run"),
    Event("f", "call", "return", "tdh_c", 12, "vcpu_run"),
]
RECORD = 48
REST = (
    st.integers(-1, 1),  # context
    st.sampled_from((0, 1, 3, 0xFFFF, -1, 0x10000)),  # CPU
    st.integers(0, 9),  # time
    st.integers(-1, 1),  # process
)
CALL = st.tuples(st.integers(0, 5), st.integers(-2, 3), *REST)  # layout and event, thread
USUAL = st.tuples(
    st.integers(-1, 1),
    st.sampled_from((*range(16), 0x10000)),
    st.integers(0, 9),
    st.integers(-1, 1),
)
ENDS = {0: 1, 2: 3, 4: 5, 6: 5}
PAIR = st.tuples(st.sampled_from(tuple(ENDS)), st.integers(0, 3), USUAL, USUAL).map(
    lambda x: ((x[0], x[1], *x[2]), (ENDS[x[0]], x[1], *x[3]))
)
WHOLE = st.lists(PAIR, min_size=1, max_size=20).map(
    lambda x: [event for both in x for event in both]
)
BATCH = st.one_of(WHOLE, WHOLE, st.lists(CALL, min_size=1, max_size=12))


TABLE = table_of(LAYOUTS)


def _batch(rows: Sequence[tuple[int, ...]], data: bytes, first: int) -> RawEvents:
    layout, tid, in_irq, cpu, ts_ns, tgid = (np.array(x, np.int64) for x in zip(*rows, strict=True))
    event = np.array([of.event for of in LAYOUTS])[layout]
    block = Block(block_of(data), "<")
    base = RECORD * np.arange(len(rows), dtype=np.intp)
    return RawEvents(
        first + np.arange(len(rows)),
        ts_ns,
        tid.astype(np.int32),
        tgid.astype(np.int32),
        cpu.astype(np.int32),
        in_irq.astype(np.int8),
        event.astype(np.int32),
        kept=RecordFields(block, block, base, layout.astype(np.intp), TABLE),
    )


@given(st.lists(BATCH, min_size=1, max_size=4), st.data())
def test_rows_of_whole_calls_are_those_made_one_column_after_the_other(
    batches: list[list[tuple[int, ...]]], data: st.DataObject
) -> None:
    kinds = Kinds.of(EVENTS)
    room = data.draw(st.sampled_from((frames.Room(), frames.Room(is_kept=False))))
    quick, slow = Calls(0, Tally(), room), Calls(0, Tally())
    made: list[pl.DataFrame] = []
    wanted: list[pl.DataFrame] = []
    first = 1
    for rows in batches:
        size = RECORD * len(rows)
        # Levels are small, as a rule: the highest bytes of a word seldom are anything else.
        held = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
        for at in range(0, size if data.draw(st.booleans()) else 0, RECORD):
            held[at + 25 : at + 28] = bytes(3)
        raw = _batch(rows, bytes(held), first)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(raw_events, "MANY_EVENTS", 1)
            patched.setattr(frames, "_PASSING_BYTES", 1)
            patched.setattr(rowloops, "_ROWS", 8)
            made += quick.feed([raw], kinds)
        wanted += slow.feed([raw.settled()], kinds)
        first += len(rows)
    made += quick.finish(kinds)
    wanted += slow.finish(kinds)
    assert_frame_equal(pl.concat(made, rechunk=True), pl.concat(wanted, rechunk=True))


def test_rows_of_whole_calls_are_made_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(raw_events, "MANY_EVENTS", 1)
    monkeypatch.setattr(calls, "Attempts", refuse)
    data = bytearray(4 * RECORD)
    data[16:24], data[24:28] = (0x1000).to_bytes(8, "little"), (255).to_bytes(4, "little")
    data[RECORD + 24 : RECORD + 32] = bytes([1] * 8)
    data[2 * RECORD + 9 : 2 * RECORD + 13] = bytes([0xFF] * 4)
    data[3 * RECORD + 8 : 3 * RECORD + 16] = bytes([7] * 8)
    rows = [(0, 7, 0, 1, 1, -1), (1, 7, -1, 0, 2, -1), (2, 8, -1, 3, 2, 5), (3, 8, -1, 3, 1, 5)]
    maker = Calls(0, Tally())
    assert maker.feed([_batch(rows, bytes(data), 1)], Kinds.of(EVENTS)) == []
    (made,) = maker.rest()
    assert made["leaf"].to_list() == [6, 0]
    assert made["gpa"].to_list() == [0x1000, (1 << 64) - 1]
    assert made["level"].to_list() == [255, None]
    assert made["status"].to_list() == [0x0101010101010101, 0]
    assert made["start_ns"].to_list() == [1, None]
    assert made["start_cpu"].to_list() == [1, 3]
    assert made["in_irq"].to_list() == [False, None]
    assert made["tgid"].to_list() == [None, 5]


def _pairs_of(n: int, tgid: int = -1, layout: int = 0) -> list[tuple[int, ...]]:
    return [(layout + at % 2, 7, 0, 1, at, tgid) for at in range(2 * n)]


def _records(n: int) -> bytearray:
    """Records of so many pairs whose words are all 1, and fit into any column."""
    word = (1).to_bytes(8, "little")
    return bytearray(word * (2 * n * RECORD // 8))


def _frames(monkeypatch: pytest.MonkeyPatch, batches: list[RawEvents]) -> list[pl.DataFrame]:
    """What is given for each batch, and in the end, where columns have eight rows at most."""
    monkeypatch.setattr(raw_events, "MANY_EVENTS", 1)
    monkeypatch.setattr(frames, "_PASSING_BYTES", 1)
    monkeypatch.setattr(rowloops, "_ROWS", 8)
    maker, kinds = Calls(0, Tally()), Kinds.of(EVENTS)
    made = [pl.concat([SEAMCALLS.empty(), *maker.feed([b], kinds)]) for b in batches]
    return [*made, pl.concat([SEAMCALLS.empty(), *maker.finish(kinds)])]


def test_of_a_batch_with_a_level_that_is_none_no_row_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is found in the second columns that the batch's rows are put in."""
    held = _records(9)
    held[-2 * RECORD + 24 : -2 * RECORD + 28] = (256).to_bytes(4, "little")
    first = _batch(_pairs_of(3), bytes(_records(3)), 1)
    made = _frames(monkeypatch, [first, _batch(_pairs_of(9), bytes(held), 7)])
    assert [rows.height for rows in made] == [0, 12, 0]
    assert made[1]["seq"].to_list() == list(range(2, 26, 2))
    assert made[1]["level"].null_count() == 1


def test_rows_have_what_only_some_batches_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [(-1, 0), (5, 0), (-1, 2), (5, 4)]
    batches = [
        _batch(_pairs_of(2, tgid, layout), bytes(_records(2)), 1 + 4 * n)
        for n, (tgid, layout) in enumerate(told)
    ]
    made = pl.concat(_frames(monkeypatch, batches))
    assert made["seq"].to_list() == list(range(2, 18, 2))
    assert made["tgid"].to_list() == [None, None, 5, 5, None, None, 5, 5]
    assert made["probe"].to_list() == 6 * ["wrapper"] + 2 * ["vcpu_run"]
    slow = Calls(0, Tally())
    rows = [row for raw in batches for row in slow.feed([raw.settled()], Kinds.of(EVENTS))]
    assert_frame_equal(made, pl.concat(rows))


SEEN = st.tuples(st.integers(-3, 3), st.integers(0, 1), st.sampled_from((6, 0, 12)), st.booleans())


@given(st.lists(SEEN, min_size=1, max_size=20))
def test_what_calls_tell_of_their_threads(told: list[tuple[int, int, int, bool]]) -> None:
    tid, later, leaf, fails = (np.array(x) for x in zip(*told, strict=True))
    ends, asked = np.cumsum(later), np.arange(1 << 16) == 6
    status = np.where(fails, np.uint64(1 << 63), np.uint64(5))
    columns = tid.astype(np.int32), ends, leaf.astype(np.uint16), status
    seen = look(*columns, 0, asked)
    assert seen is not None
    assert seen.tid.tolist() == sorted(set(tid.tolist()))
    assert seen.leaves.tolist() == sorted(set(leaf.tolist()))
    assert seen.done.tolist() == [i for i, x in enumerate(told) if x[2] == 6 and not x[3]]
    for thread, enters, first, last in zip(
        seen.tid.tolist(), seen.enters.tolist(), seen.first, seen.last, strict=True
    ):
        mine = np.flatnonzero(tid == thread)
        assert (first, last) == (mine[0], mine[-1])
        assert enters == bool((leaf[mine] == 0).any())
    backward = columns[0], ends[::-1].copy(), *columns[2:]
    assert (look(*backward, 0, asked) is None) == bool(later[1:].any())
    many = np.arange(1 << 13, dtype=np.int32)
    every = many * 0
    assert (
        look(
            many, every.astype(np.int64), every.astype(np.uint16), every.astype(np.uint64), 0, asked
        )
        is None
    )


def test_numba_still_multiplies_matrices() -> None:
    """Loops are loaded without scipy.linalg; who asks numba for it gets it."""
    program = (
        "import sys; from tdxtrace.ingest import compiled; assert compiled.pays(1 << 40);"
        "compiled._load_arrays(); assert 'scipy.linalg' not in sys.modules;"
        "import numba, numpy as np;"
        "f = numba.njit(lambda a: a @ a); assert (f(2 * np.eye(3)) == 4 * np.eye(3)).all();"
        "numba.njit(lambda a: np.corrcoef(a))(np.eye(3))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


LOADED = """
import sys
from pathlib import Path
import pytest
from ingest import test_loops
for path in sys.argv[1:]:
    assert not isinstance(test_loops._read(Path(path), test_loops.EVERY), str)
print(sorted({"numba.np.arrayobj", "scipy.linalg"} & sys.modules.keys()))
import numba
assert numba.njit(lambda x: [x])(2) == [2]
"""


def test_machine_code_that_was_kept_is_loaded_without_the_compiler(tmp_path: Path) -> None:
    """Also that of every other loop runs where nothing else was loaded; numba then compiles."""
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    recordings = ("qemu.perf.data.xz", "contended.txt")
    command = [sys.executable, "-c", LOADED, *(str(SAMPLES / name) for name in recordings)]
    for _ in range(2):
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=os.environ | paths | kept
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
