"""Compiled loops read what numpy reads, byte by byte, and touch nothing else."""

from __future__ import annotations

import lzma
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recordings import SAMPLES, SHARED
from support.texts import read_text
from support.ways import both_fast, by_block

import tdxtrace
from tdxtrace.ingest import compiled, source
from tdxtrace.ingest.source import block_of
from tdxtrace.ingest.text.knowledge import Knowledge

pytest.importorskip("numba", reason="numba has no release for this Python yet")

# Real text of every shape; what is beside the checkout is read where it is there.
FILES = [*sorted(SAMPLES.glob("*.txt*"))]
NO_TRACES = ("commands", "buffer_stats", "uprobe_events", "trace_options", "README")
FILES += [path for path in sorted(SHARED.rglob("*.txt")) if path.stem not in NO_TRACES]
N_LINES = 400
# What stands in traces, and what never does.
ODD = b"\0\r\t\x0b\x7f\x80\xff -.:[]()<>=/x0189afAFg`@\xc3"


def text_of(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def form_of(path: Path) -> str:
    return "perf-script" if "perf" in path.name or "perf" in path.parent.name else "ftrace"


@cache
def lines_of(path: Path) -> list[bytes]:
    """Lines from the begin and from the middle of a file."""
    lines = text_of(path).split(b"\n")
    half = len(lines) // 2
    return lines if len(lines) < N_LINES else lines[: N_LINES // 2] + lines[half:][: N_LINES // 2]


def mutated(lines: Sequence[bytes], seed: int, n: int) -> list[bytes]:
    """The lines twice, some of them damaged: what is learned from the first is met again."""
    luck = random.Random(seed)
    made = [bytearray(line) for line in [*lines, *lines]]
    for _ in range(n):
        line = made[luck.randrange(len(made))]
        at = luck.randrange(len(line) + 1)
        kind = luck.randrange(8)
        if kind < 3:
            line[at : at + 1] = bytes([luck.choice(ODD)])
        elif kind == 3:
            del line[at:]
        elif kind == 4:
            del line[at : at + luck.randrange(1, 4)]
        elif kind == 5:
            line[at:at] = bytes(luck.choice(ODD) for _ in range(luck.randrange(1, 5)))
        elif kind == 6:
            line[at:at] = luck.choice((b"0", b"9", b"f", b" ", b"x")) * luck.choice((1, 9, 17, 600))
        else:
            line += b"\r"
    return [bytes(line).replace(b"\n", b"") for line in made]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_real_lines_damaged_at_random(path: Path) -> None:
    lines = lines_of(path)
    for seed in range(2):
        both_fast(mutated(lines, seed, 60), form_of(path), (300, 64, 1))


@settings(max_examples=20)
@given(
    st.sampled_from([path for path in FILES if path.parent == SAMPLES]),
    st.integers(0, 10**9),
    st.integers(0, 400),
    st.lists(st.sampled_from([1, 3, 90, 400]), min_size=1, max_size=3),
)
def test_any_damage(path: Path, seed: int, n: int, sizes: list[int]) -> None:
    both_fast(mutated(lines_of(path)[:200], seed, n), form_of(path), sizes)


@settings(max_examples=25)
@given(st.lists(st.binary(max_size=90).map(lambda line: line.replace(b"\n", b"")), max_size=60))
def test_any_bytes_between_real_lines(odd: list[bytes]) -> None:
    real = lines_of(SAMPLES / "contended.txt")[:100]
    both_fast([*real, *odd, *real], "ftrace", (100, 40))


def tables_of(path: Path) -> tuple[dict[str, list[tuple[object, ...]]], object]:
    trace = tdxtrace.read_trace(path)
    return {name: frame.rows() for name, frame in trace.tables().items()}, trace.provenance


@pytest.mark.parametrize("chunk", [1 << 14, source.CHUNK_BYTES])
@pytest.mark.parametrize("ending", ["", "no newline", "CRLF", "cut"])
@pytest.mark.parametrize("name", ["contended.txt", "lost.txt.xz", "qemu.perf.txt.xz"])
def test_a_whole_file_gives_the_same_trace(
    name: str, ending: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(SAMPLES / name)
    text = {
        "": text,
        "no newline": text.rstrip(b"\n"),
        "CRLF": text.replace(b"\n", b"\r\n"),
        "cut": text[: len(text) * 2 // 3 + 7],
    }[ending]
    path = tmp_path / "trace.txt"
    path.write_bytes(text)
    for constant in ("CHUNK_BYTES", "_READ_BYTES"):
        monkeypatch.setattr(source, constant, chunk)
    monkeypatch.setattr(source, "_LARGE_BYTES", 2 * chunk)
    monkeypatch.setattr(compiled, "LARGE_BYTES", 1 << 60)
    quick = tables_of(path)
    monkeypatch.setattr(compiled, "LARGE_BYTES", 0)
    assert tables_of(path) == quick


def test_loops_are_switched_on_in_the_middle_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is not known: what has come counts."""
    lines = lines_of(SAMPLES / "zerostep.txt")
    whole = by_block(lines, "ftrace", (50,))
    sizes: list[int | None] = []

    def pays(n_bytes: int | None) -> bool:
        sizes.append(n_bytes)
        return n_bytes is not None and n_bytes > 10_000

    monkeypatch.setattr("tdxtrace.ingest.text.reader.pays", pays)
    assert by_block(lines, "ftrace", (50,)) == whole
    assert sizes[0] == 0
    assert sizes[-1] is not None
    assert sizes[-1] > 10_000


def test_without_numba_large_text_is_read_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"\n".join(lines_of(SAMPLES / "contended.txt"))
    whole = read_text(text)
    monkeypatch.setattr(compiled, "LARGE_BYTES", 0)
    monkeypatch.setattr("tdxtrace.ingest.compiled._is_there", lambda: False)
    made = read_text(text)
    assert {n: f.rows() for n, f in made.tables().items()} == {
        n: f.rows() for n, f in whole.tables().items()
    }


def test_small_inputs_do_not_load_numba() -> None:
    program = (
        "import sys, tdxtrace; tdxtrace.read_trace(sys.argv[1]);"
        "found = [m for m in sys.modules if m.split('.')[0] in ('numba', 'llvmlite')"
        "]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program, SAMPLES / "contended.txt"], check=True)


def test_very_short_lines_are_left_to_numpy() -> None:
    """Room is made for lines of a usual length."""
    from tdxtrace.ingest.text import looped

    packed = looped.packed(Knowledge(), np.zeros(1, np.bool_))
    desks: list[looped.Desk] = []
    for n, is_read in ((1, True), (2, False), (5000, False)):
        made = looped.parse(block_of([b"\n" * n]), packed, desks, may_end_in_cr=True)
        assert (made is not None) is is_read
    assert looped.parse(block_of([b"\n"])[:0], packed, desks, may_end_in_cr=True) is None
    lines = [b"" if k % 3 else line for k, line in enumerate(lines_of(SAMPLES / "contended.txt"))]
    both_fast([*lines, *[b""] * 3000, *lines], "ftrace", (400, 3000))


def test_a_line_that_only_hashes_like_a_known_one() -> None:
    """Its event is taken to be one whose arguments would begin behind the line's end."""
    real = [line for line in lines_of(SAMPLES / "contended.txt") if b": tdh_mem_" in line]
    at = real[0].index(b": tdh_mem_") + 2
    mix, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    luck = random.Random(1)
    first, second = (int.from_bytes(real[0][at + k : at + k + 8], "little") for k in (0, 8))

    def mixed(word: int) -> int:
        key = word * mix & mask
        return key ^ (key >> 29)

    made: list[bytes] = []
    while len(made) < 8:
        word = luck.randrange(1 << 64)
        other = (second + mixed(first) - mixed(word)) & mask
        pair = word.to_bytes(8, "little") + other.to_bytes(8, "little")
        if b"\n" not in pair[:8] and b"\n" in pair:
            made.append(real[0][:at] + pair + real[0][at + 16 :])
    odd = b"\n".join(made).split(b"\n")
    both_fast([*real[:100], *odd, *real[:100], *odd], "ftrace", (100,))


def test_memory_is_used_again_for_blocks_of_other_sizes() -> None:
    lines = lines_of(SAMPLES / "contended.txt")
    both_fast([*lines, *lines[:3], *lines, b"", *lines], "ftrace", (390, 3, 1, 200))


CHECKED = """
import sys
sys.path[:0] = sys.argv[1:3]
import numpy as np
import test_looped as t
from support.ways import both_fast

for path in t.FILES[:5]:
    lines = t.lines_of(path)[:150]
    for seed in range(5):
        both_fast(t.mutated(lines, seed, 100), t.form_of(path), (140, 40, 1))
t.test_a_line_that_only_hashes_like_a_known_one()
t.test_very_short_lines_are_left_to_numpy()

# The checks are there: without its newline a block has no end.
from tdxtrace.ingest.text import loops, looped
known = looped.packed(t.Knowledge(), np.zeros(1, np.bool_))
desk, sums = looped.Desk(9, 1), np.zeros((loops.N_SUMS, 1024), np.uint64)
words = np.ndarray((793,), "<u8", np.zeros(800, np.uint8), strides=(1,))
try:
    desk.parse(words, 9, known, sums, may_end_in_cr=True)
except IndexError:
    print("checked")
"""


def test_no_access_is_out_of_bounds(tmp_path: Path) -> None:
    """The same code with numba's checks: whatever the lines hold, none of them strikes."""
    here = Path(__file__).parent
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CHECKED, str(here.parent), str(here)]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "checked\n"
