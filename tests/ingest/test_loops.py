"""Compiled loops give the rows of interpreted ones, and are loaded for large inputs only."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from support.effort import times
from support.mutations import SEEDS, in_memory, mutate
from support.recorder import Machine, Recording

import tdxtrace
from tdxtrace import compiler
from tdxtrace.ingest.tracedat import merge

ROOT = Path(__file__).parent.parent.parent
SAMPLES = ROOT / "sample_traces"
RECORDINGS = sorted(SAMPLES.glob("*.dat*"))
DAMAGED = [kind for kind in SEEDS if kind.startswith("trace.dat")]
EVERY = 0
NEVER = 1 << 60


def _read(path: Path, least: int) -> tdxtrace.Trace | str:
    """Read with compiled loops if the input has at least so many bytes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiler, "COMPILE_BYTES", least)
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
def test_compiled_loops_read_the_same_of_damaged_recordings(kind: str) -> None:
    data, chance = SEEDS[kind](), random.Random(kind)
    with in_memory() as written:
        for _ in range(times(60)):
            path = written(mutate(data, chance))
            _same(_read(path, EVERY), _read(path, NEVER))


CHECKED = """
import random
from ingest import test_loops
from support.mutations import SEEDS, in_memory, mutate
with in_memory() as written:
    for kind in test_loops.DAMAGED:
        data, chance = SEEDS[kind](), random.Random(kind + " checked")
        for _ in range(80):
            test_loops._read(written(mutate(data, chance)), test_loops.EVERY)
import numba
print(numba.config.BOUNDSCHECK)
"""


def test_no_loop_reaches_beyond_its_arrays(tmp_path: Path) -> None:
    checks = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    command = [sys.executable, "-c", CHECKED]
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
    _same(_read(path, EVERY), expected)
