"""The loop over lines gives the events of the line reader, interpreted and compiled."""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import ODD_BYTES, damaged, partly_damaged
from support.effort import times
from support.recordings import SAMPLES, SHARED
from support.texts import read_text
from support.ways import blocks_of, same

import tdxtrace
from tdxtrace import compiler
from tdxtrace.compiler import compiled, interpreted
from tdxtrace.ingest import source
from tdxtrace.ingest.batch import MAX_CPUS, U64Array
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.loops import lines as loops
from tdxtrace.ingest.loops.lines import Columns, LinePatterns
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.text.reader import LineReader, TextReader

# Real text of every shape; what is beside the checkout is read where it is there.
FILES = [*sorted(SAMPLES.glob("*.txt*"))]
NO_TRACES = ("commands", "buffer_stats", "uprobe_events", "trace_options", "README")
FILES += [path for path in sorted(SHARED.rglob("*.txt")) if path.stem not in NO_TRACES]
N_LINES = 400
U = np.uint64
RUNNERS: list[Callable[[Any], Any]] = [interpreted, compiled]


def form_of(path: Path) -> str:
    return "perf-script" if "perf" in path.name or "perf" in path.parent.name else "ftrace"


def text_of(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


@cache
def lines_of(path: Path) -> list[bytes]:
    """Lines from the begin and from the middle of a file."""
    lines = text_of(path).split(b"\n")
    half = len(lines) // 2
    return lines if len(lines) < N_LINES else lines[: N_LINES // 2] + lines[half:][: N_LINES // 2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_damaged_lines_are_read_as_one_at_a_time(path: Path) -> None:
    for seed in range(2):
        same(partly_damaged(lines_of(path), seed, 60), form_of(path), (300, 64, 1))


# The interpreted run is the referee: whatever the text, it uses no place outside of its arrays.


@cache
def patterns_of(path: Path) -> tuple[LinePatterns, int]:
    """What the lines of a file look like, and how many events they are of."""
    reader = TextReader(LineReader(form_of(path), EventRegistry(), SourceStats()))
    for _ in reader.batches(blocks_of(lines_of(path), (100,)), compiled):
        pass
    return reader.patterns.packed(), len(reader.lines.registry.events)


def room_for(n_lines: int, n_words: int, n_left: int, n_events: int, n_prefixes: int) -> Columns:
    return Columns(
        line=np.zeros(n_lines, np.int64),
        ts_ns=np.zeros(n_lines, np.int64),
        tid=np.zeros(n_lines, np.int32),
        tgid=np.zeros(n_lines, np.int32),
        cpu=np.zeros(n_lines, np.int32),
        in_irq=np.zeros(n_lines, np.int8),
        event=np.zeros(n_lines, np.int32),
        layout=np.zeros(n_lines, np.int32),
        first_word=np.zeros(n_lines, np.int64),
        words=np.zeros(n_words, U),
        left=np.zeros((n_left, 3), np.int64),
        threads=np.zeros((4, loops.THREAD_COLUMNS), U),
        thread_table=np.zeros(8, np.int32),
        events=np.zeros((n_events, 2), np.int64),
        cpus=np.zeros((MAX_CPUS + 2, 3), np.int64),
        used=np.zeros(n_prefixes, np.int8),
        numbers=np.zeros(loops.N_NUMBERS, U),
    )


def both_ways(
    text: bytes, patterns: LinePatterns, n_events: int, n_lines: int, n_words: int, n_left: int
) -> tuple[int, ...]:
    """Run the loop both ways over a text; what they return and fill must be the same."""
    data = np.frombuffer(text + bytes(64), np.uint8)
    words = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))
    made: list[dict[str, Any]] = []
    sizes: list[tuple[int, ...]] = []
    for run in RUNNERS:
        into = room_for(n_lines, n_words, n_left, n_events, len(patterns.prefixes))
        read = run(loops.read_lines)(words, U(0), U(len(text)), U(400), patterns, into)
        sizes.append(tuple(map(int, read)))
        n = {"words": sizes[-1][4], "left": sizes[-1][5], "threads": sizes[-1][6], "numbers": 0}
        made.append(
            {
                name: column[: n.get(name, sizes[-1][2] if len(column) == n_lines else None)]
                for name, column in into._asdict().items()
            }
        )
    assert sizes[0] == sizes[1]
    for name, column in made[0].items():
        assert (column == made[1][name]).all(), name
    return sizes[0]


@pytest.mark.parametrize("path", FILES[:6], ids=lambda path: path.name)
def test_the_interpreted_run_agrees_on_damaged_text(path: Path) -> None:
    """Damaged lines, in texts of three, and little room."""
    patterns, n_events = patterns_of(path)
    luck = random.Random(path.name)
    lines = [line for line in lines_of(path) if line]
    n_read = n_left = 0
    for _ in range(times(450)):
        some = [damaged(luck.choice(lines), luck) for _ in range(3)]
        text = b"".join(line + b"\n" for line in [*some, luck.choice(lines)])
        room = luck.choice((1, 3, 9)), luck.choice((2, 64, 67, 300)), luck.choice((1, 3, 9))
        sizes = both_ways(text, patterns, n_events, *room)
        assert (sizes[0] == 0) == (room[1] < loops.MAX_FIELDS)
        assert sizes[0] == 0 or text[: sizes[0]].endswith(b"\n")
        assert sizes[1] == sizes[2] + sizes[5]
        n_read, n_left = n_read + sizes[2], n_left + sizes[5]
    assert n_read > 12
    assert n_left > 12


@settings(max_examples=150)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=90), st.text(alphabet=ODD_BYTES.decode("latin-1")).map(str.encode)
        ).map(lambda line: line.replace(b"\n", b"") + b"\n"),
        max_size=5,
    ),
    st.sampled_from(FILES[:3]),
)
def test_the_interpreted_run_agrees_on_any_text(odd: list[bytes], path: Path) -> None:
    patterns, n_events = patterns_of(path)
    real = lines_of(path)[40:43]
    for text in (b"".join(odd), b"".join([*(line + b"\n" for line in real), *odd])):
        both_ways(text, patterns, n_events, 9, 300, 9)


def test_the_first_line_fits_no_pattern() -> None:
    patterns = TextReader(LineReader("ftrace", EventRegistry(), SourceStats())).patterns.packed()
    assert both_ways(b"\n" * 5, patterns, 0, 9, 300, 9)[:3] == (5, 5, 0)
    assert both_ways(b"a-1 [000] 1.000001: x: y\n", patterns, 0, 9, 300, 9)[5] == 1


def test_a_name_that_only_has_the_hash_of_a_known_one_is_not_taken_for_it() -> None:
    real = [line for line in lines_of(SAMPLES / "contended.txt") if b": tdh_mem_" in line]
    at = real[0].index(b": tdh_mem_") + 2
    mix, mask = int(loops.MIX), (1 << 64) - 1
    luck = random.Random(1)
    first, second = (int.from_bytes(real[0][at + k : at + k + 8], "little") for k in (0, 8))

    def mixed(word: int) -> int:
        key = word * mix & mask
        return key ^ (key >> 29)

    made: list[bytes] = []
    while len(made) < 8:
        word = luck.randrange(1 << 64)
        other = second ^ mixed(first) ^ mixed(word)
        pair = word.to_bytes(8, "little") + other.to_bytes(8, "little")
        if min(pair) > 0x20:
            made.append(real[0][:at] + pair + real[0][at + 16 :])
    same([*real[:100], *made, *real[:100], *made], "ftrace", (100,))


# Words and numbers of eight bytes at a time, held against Python's own.

# Every byte, and more of those next to digits and letters.
NEAR = b"/:0189@AFGafg`\x2f\x3a\x60\x67 \x1f\x21\0\x7f\x80\xb0\xb9\xe1\xff"
byte = st.one_of(st.sampled_from(NEAR), st.integers(0, 255)).filter(lambda b: b != 10)
texts = st.lists(byte, min_size=24, max_size=24).map(bytes)
decimals = st.text("0123456789", min_size=24, max_size=24).map(str.encode)
hexadecimals = st.text("0123456789abcdef", min_size=24, max_size=24).map(str.encode)


@st.composite
def nearly(draw: st.DrawFn) -> bytes:
    """Digits of which one is another byte."""
    text = bytearray(draw(st.one_of(decimals, hexadecimals)))
    text[draw(st.integers(0, 23))] = draw(byte)
    return bytes(text)


some = st.one_of(texts, decimals, hexadecimals, nearly())


def words_of(text: bytes) -> U64Array:
    data = np.frombuffer(text + b"\n" + bytes(64), np.uint8)
    return np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))


@pytest.mark.parametrize("run", RUNNERS)
@given(text=some, at=st.integers(0, 8))
def test_numbers_in_arguments(run: Callable[[Any], Any], text: bytes, at: int) -> None:
    words = words_of(text)
    n, value = map(int, run(loops.decimal)(words, U(at)))
    digits = re.compile(rb"[0-9]*").match(text, at)[0]  # type: ignore[index]
    assert n == (len(digits) if len(digits) < 16 else 0)
    assert not n or value == int(digits)
    digits = re.compile(rb"[0-9a-f]{0,16}").match(text, at)[0]  # type: ignore[index]
    n, value = map(int, run(loops.hexadecimal)(words, U(at)))
    assert n == len(digits) == int(run(loops.hexadecimal_digits)(words, U(at)))
    assert not n or value == int(digits, 16)


@pytest.mark.parametrize("run", RUNNERS)
@given(text=some, at=st.integers(0, 8), n=st.integers(1, 16))
def test_numbers_of_known_length(run: Callable[[Any], Any], text: bytes, at: int, n: int) -> None:
    digits = text[at : at + n]
    value = int(run(loops.digits)(words_of(text), U(at), U(n)))
    is_number = re.fullmatch(rb"[0-9]+", digits) is not None
    assert value == (int(digits) if is_number else 2**64 - 1)


padded = st.text(" 07", min_size=8, max_size=8).map(str.encode)


@pytest.mark.parametrize("run", RUNNERS)
@given(text=st.one_of(padded, texts, nearly()), width=st.integers(1, 8))
def test_numbers_with_blanks_around(run: Callable[[Any], Any], text: bytes, width: int) -> None:
    cell = text[:width]
    for blanks, pattern in (
        (loops.NO_BLANKS, rb"([0-9]+)"),
        (loops.BLANKS_BEFORE, rb" *([0-9]+)"),
        (loops.BLANKS_AFTER, rb"([0-9]+) *"),
    ):
        row = np.zeros((1, loops.PREFIX_COLUMNS), U)
        row[0, loops.TID : loops.TID + 3] = 0, width, blanks
        found = re.fullmatch(pattern, cell)
        value = int(run(loops.number)(words_of(text), U(0), row, U(0), loops.TID))
        assert value == (2**64 - 1 if found is None else int(found[1]))


@given(st.lists(texts.map(lambda text: text[:9]), min_size=1, max_size=6))
def test_the_end_of_a_line(lines: list[bytes]) -> None:
    text = b"\n".join(lines)
    for at in range(len(text)):
        end = int(interpreted(loops.line_end)(words_of(text), U(at)))
        assert end == (text + b"\n").index(b"\n", at)


# When the loop is used.


def tables_of(path: Path) -> tuple[dict[str, list[tuple[object, ...]]], object]:
    trace = tdxtrace.read_trace(path)
    return {name: frame.rows() for name, frame in trace.tables().items()}, trace.provenance


@pytest.mark.parametrize(
    ("ending", "chunk"),
    [
        ("", source.CHUNK_BYTES),
        *((ending, 1 << 14) for ending in ("", "no newline", "CRLF", "cut")),
    ],
)
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
    one_at_a_time = tables_of(path)
    monkeypatch.setattr(compiler, "COMPILE_BYTES", 0)
    assert tables_of(path) == one_at_a_time


def test_without_numba_large_text_is_read_one_line_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = b"\n".join(lines_of(SAMPLES / "contended.txt"))
    whole = read_text(text)
    monkeypatch.setattr(compiler, "COMPILE_BYTES", 0)
    monkeypatch.setattr(compiler, "_has_numba", lambda: False)
    made = read_text(text)
    assert {n: f.rows() for n, f in made.tables().items()} == {
        n: f.rows() for n, f in whole.tables().items()
    }


def test_lines_without_new_patterns_take_few_passes_of_the_loop() -> None:
    """Each pass takes room for all lines that are left: one for 256 of them took 20 GB."""
    passes = 0

    def counted(loop: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: object) -> object:
            nonlocal passes
            passes += 1
            return compiled(loop)(*args)

        return run

    reader = TextReader(LineReader("ftrace", EventRegistry(), SourceStats()))
    lines = [b"what?"] * 60_000
    assert [len(batch) for batch in reader.batches(blocks_of(lines, [len(lines)]), counted)] == [0]
    assert reader.lines.stats.n_lines == len(lines)
    assert passes < 12
