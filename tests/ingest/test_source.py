"""Input bytes: compressed, in chunks of any size, truncated, hostile."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import sys
import tempfile
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mutations import SEEDS
from support.texts import ONE_CALL, aug, aug_ret, is_accounted_for, line, lost, read_text

from tdxtrace.compiler import Runner, compiled, interpreted
from tdxtrace.errors import InputError, TdxtraceError
from tdxtrace.ingest import source as stream_room
from tdxtrace.ingest.read import ReadOptions, read, read_trace
from tdxtrace.ingest.source import KEPT_LINE_BYTES, Stream, open_stream

TEXT = "".join(
    aug(f"1.{2 * n:06}", f"gpa={n << 12:#x}") + aug_ret(f"1.{2 * n + 1:06}", f"ret={n:#x}")
    for n in range(300)
).encode()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def streamed_zstd(data: bytes) -> bytes:
    """As `zstd < FILE` writes it: the size is not in the header."""
    made = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return made.compress(data) + made.flush()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda data: data,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}
PACKED = [name for name in PACK if name != "none"]


def blocks_of(data: bytes, folder: Path) -> tuple[bytes, str]:
    """What the stream gives of a file, and why it ended early if it did."""
    path = folder / "x"
    path.write_bytes(data)
    stream = open_stream(str(path))
    return b"".join(block.tobytes() for block in stream.blocks()), stream.truncated


@pytest.mark.parametrize("kind", PACK)
def test_what_was_packed_is_read_and_named(kind: str) -> None:
    trace = read_text(PACK[kind](TEXT), name="misleading.pdf")
    source = trace.provenance.sources[0]
    assert source.compression == kind
    assert source.n_bytes == len(PACK[kind](TEXT))
    assert trace.seamcalls.equals(read_text(TEXT).seamcalls)
    assert lost(trace) == {}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("n", [2, 5])
def test_several_members_are_read_one_after_the_other(kind: str, n: int, tmp_path: Path) -> None:
    """cat a.gz b.gz > c.gz; a cut may be anywhere, also inside a line."""
    cuts = [len(TEXT) * k // n for k in range(n + 1)]
    data = b"".join(PACK[kind](TEXT[a:b]) for a, b in pairwise(cuts))
    assert blocks_of(data, tmp_path) == (TEXT, "")


@pytest.mark.parametrize("kind", PACKED)
def test_an_empty_member_or_zeros_at_the_end_change_nothing(kind: str, tmp_path: Path) -> None:
    pack = PACK[kind]
    assert blocks_of(pack(TEXT) + pack(b""), tmp_path) == (TEXT, "")
    assert blocks_of(pack(b"") + pack(TEXT), tmp_path) == (TEXT, "")
    assert blocks_of(pack(TEXT) + bytes(512), tmp_path) == (TEXT, "")


def test_a_stream_without_its_size_is_read(tmp_path: Path) -> None:
    assert blocks_of(streamed_zstd(TEXT), tmp_path) == (TEXT, "")


@pytest.mark.parametrize("kind", PACKED)
def test_of_a_truncated_file_the_beginning_is_kept_and_the_rest_said(kind: str) -> None:
    text = b"".join(aug(f"1.{n:06}", f"gpa={n * n << 12:#x}").encode() for n in range(10_000))
    data = PACK[kind](text)
    trace = read_text(data[: len(data) * 2 // 3])
    gap = trace.losses.filter(kind="truncated").row(0, named=True)
    assert f"{kind} data ends in the middle" in gap["detail"]
    assert gap["severity"] == "data_loss"
    assert 0 < trace.provenance.sources[0].n_lines < len(text.splitlines())
    assert is_accounted_for(trace)


@pytest.mark.parametrize("kind", PACKED)
def test_of_a_damaged_file_what_came_before_is_kept(kind: str) -> None:
    good = PACK[kind](TEXT)
    trace = read_text(good + good[:20] + b"\xff" * 200)
    assert trace.seamcalls.height == 300
    assert trace.losses.filter(kind="truncated").height == 1
    assert is_accounted_for(trace)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("n", [1, 4, 7, 12])
def test_a_file_cut_in_its_header_is_one_clear_line(kind: str, n: int) -> None:
    with pytest.raises(TdxtraceError) as error:
        read_text(PACK[kind](TEXT)[:n])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", PACKED)
def test_an_empty_compressed_file_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match="no text"):
        read_text(PACK[kind](b""))


@pytest.mark.parametrize("kind", PACKED)
def test_a_bomb_is_read_in_bounded_memory(kind: str, tmp_path: Path) -> None:
    """A line of 200 MB of one letter packs into some kilobytes."""
    letters = 200 << 20
    path = tmp_path / "bomb"
    path.write_bytes(_bomb(kind, letters))
    assert path.stat().st_size < letters // 500
    tracemalloc.start()
    try:
        trace = read_trace(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert trace.provenance.sources[0].n_lines == 3
    assert lost(trace) == {"unparsed": 1}
    assert peak < 170 << 20


def _bomb(kind: str, letters: int) -> bytes:
    chunk = b"a" * (1 << 20)
    head, tail = ONE_CALL.encode(), b"\n"
    if kind == "gzip":
        packer = zlib.compressobj(9, wbits=31)
        parts = [packer.compress(head)]
        parts += [packer.compress(chunk) for _ in range(letters >> 20)]
        return b"".join([*parts, packer.compress(tail), packer.flush()])
    if kind == "xz":
        xz = lzma.LZMACompressor(preset=0)
        parts = [xz.compress(head), *(xz.compress(chunk) for _ in range(letters >> 20))]
        return b"".join([*parts, xz.compress(tail), xz.flush()])
    made = zstandard.ZstdCompressor().compressobj()
    parts = [made.compress(head), *(made.compress(chunk) for _ in range(letters >> 20))]
    return b"".join([*parts, made.compress(tail), made.flush()])


# Lines.


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\nb\n", b"a\nb\n"),
        (b"a\nb", b"a\nb\n"),
        (b"a", b"a\n"),
        (b"\n", b"\n"),
        (b"a\n\n\nb", b"a\n\n\nb\n"),
        (b"a\r\nb\r\n", b"a\r\nb\r\n"),
    ],
)
def test_every_block_ends_with_a_line(data: bytes, expected: bytes, tmp_path: Path) -> None:
    assert blocks_of(data, tmp_path) == (expected, "")


@pytest.mark.parametrize("length", [KEPT_LINE_BYTES - 1, 3 * KEPT_LINE_BYTES, 10_000_000])
def test_a_long_line_is_one_line(length: int) -> None:
    trace = read_text(ONE_CALL + "x" * length + "\n" + ONE_CALL.replace("1.", "2."))
    assert trace.provenance.sources[0].n_lines == 5
    assert lost(trace) == {"unparsed": 1}
    assert trace.seamcalls.height == 2
    assert is_accounted_for(trace)


def test_a_long_line_at_the_end_and_at_the_start() -> None:
    for text in ("x" * 10_000_000 + "\n" + ONE_CALL, ONE_CALL + "x" * 10_000_000):
        trace = read_text(text)
        assert (trace.seamcalls.height, lost(trace)) == (1, {"unparsed": 1})
        assert is_accounted_for(trace)


def test_a_file_of_one_long_line_is_no_trace() -> None:
    with pytest.raises(TdxtraceError) as error:
        read_text("x" * 10_000_000)
    assert len(str(error.value)) < 400


class Pieces(io.RawIOBase):
    """A file that gives its bytes in pieces of any size, as a pipe does."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes, self._turn = data, sizes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        size = min(self._sizes[self._turn % len(self._sizes)], len(buffer), len(self._data))
        self._turn += 1
        buffer[:size], self._data = self._data[:size], self._data[size:]
        return size


@settings(max_examples=15)
@given(
    st.sampled_from(sorted(PACK)),
    st.lists(st.sampled_from([1, 2, 3, 10, 100, 5000, 1 << 20]), min_size=1, max_size=5),
    st.integers(1, 3),
)
def test_pieces_of_any_size_make_the_same_text(kind: str, sizes: list[int], members: int) -> None:
    text = b"".join(TEXT.splitlines(keepends=True)[:50])
    data = PACK[kind](text) * members
    pipe = io.BufferedReader(Pieces(data, sizes))  # type: ignore[type-var]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        stream = open_stream("-")
        assert b"".join(block.tobytes() for block in stream.blocks()) == text * members
        assert (stream.truncated, stream.n_bytes) == ("", len(data))


@settings(max_examples=30)
@given(
    st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), min_size=1),
    st.booleans(),
    st.sampled_from([1, 7, 64, 1 << 20]),
    st.sampled_from([0, 5, 100]),
)
def test_a_large_file_is_read_to_where_it_stays(
    lines: list[bytes], is_whole: bool, chunk: int, long_line: int
) -> None:
    """Not copied between, it gives the same whole lines, with room behind each block."""
    text = b"# head of a trace\n" + b"\n".join([*lines, b"x" * long_line])
    text += b"\n" if is_whole else b""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_room, "_LARGE_BYTES", 1)
        patch.setattr(stream_room, "_READ_BYTES", 16)
        patch.setattr(stream_room, "CHUNK_BYTES", chunk)
        path = Path(folder) / "trace.txt"
        path.write_bytes(text)
        stream = open_stream(str(path))
        assert stream.fill is not None
        assert stream.peek() == text[:16]
        blocks = list(stream.blocks())
        stream.close()
    ended = text if text.endswith(b"\n") else text + b"\n"
    assert b"".join(block.tobytes() for block in blocks) == ended
    assert all(block[-1] == ord("\n") for block in blocks)
    for block in blocks:
        behind = np.ndarray(len(block) + stream_room.BLOCK_PADDING, np.uint8, block.base)
        assert not behind[len(block) :].any()
    assert stream.n_bytes == len(text)


def test_a_line_longer_than_any_event_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_bytes(TEXT + b"x" * 40_000_000 + b"\n" + TEXT)
    stream = open_stream(str(path))
    sizes = [len(block) for block in stream.blocks()]
    stream.close()
    assert max(sizes) < 2 * stream_room.CHUNK_BYTES
    assert read_trace(path).seamcalls.height == 600


@pytest.mark.parametrize("kind", [kind for kind in PACK if kind != "none"])
def test_what_unpacks_to_far_more_than_traces_do_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.txt"
    path.write_bytes(PACK[kind](TEXT + b"\n" * (1 << 17)))
    monkeypatch.setattr(stream_room, "_FREE_BYTES", 1 << 10)
    monkeypatch.setattr(stream_room, "_MAX_RATIO", 10)
    with pytest.raises(InputError, match=r"KiB to 0 MiB and more; .* --max-unpacked 100G"):
        read_trace(path)
    assert read([path], ReadOptions(unpacked=1 << 20)).seamcalls.height == 300
    with pytest.raises(InputError, match="to allow this"):
        read([path], ReadOptions(unpacked=1 << 17))


@pytest.mark.parametrize("kind", PACK)
def test_standard_input_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PACK[kind](TEXT))))
    trace = read_trace("-")
    source = trace.provenance.sources[0]
    assert (source.path, source.compression) == ("-", kind)
    assert trace.seamcalls.height == 300


def test_standard_input_without_anything_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match="empty"):
        read_trace("-")


GRAPH = "".join(
    [
        "# tracer: function_graph\n#\n# CPU  DURATION                  FUNCTION CALLS\n",
        "   50.000010 |   1)  CPU 0/KVM-7    |   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n",
    ]
).encode()


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Callable[[bytes, int], Path]]:
    """Makes a named pipe into which somebody writes slowly, so many bytes at a time."""
    writers = []

    def make(data: bytes, size: int) -> Path:
        path = tmp_path / "pipe"
        os.mkfifo(path)

        def write() -> None:
            with path.open("wb", buffering=0) as pipe:
                for at in range(0, len(data), size):
                    pipe.write(data[at : at + size])

        writers.append(threading.Thread(target=write, daemon=True))
        writers[-1].start()
        return path

    yield make
    for writer in writers:
        writer.join(10)


@pytest.mark.parametrize("size", [1, 2, 5, 30, 4096])
@pytest.mark.parametrize(
    ("data", "form", "compression"),
    [
        (ONE_CALL.encode(), "ftrace", "none"),
        (gzip.compress(ONE_CALL.encode()), "ftrace", "gzip"),
        (lzma.compress(ONE_CALL.encode()), "ftrace", "xz"),
        (zstd(ONE_CALL.encode()), "ftrace", "zstd"),
        (GRAPH, "function-graph", "none"),
    ],
    ids=["text", "gzip", "xz", "zstd", "graph"],
)
def test_a_pipe_reads_like_a_file_however_it_is_written(
    data: bytes, form: str, compression: str, size: int, fifo: Callable[[bytes, int], Path]
) -> None:
    trace = read_trace(fifo(data, size))
    source = trace.provenance.sources[0]
    assert (source.format, source.compression) == (form, compression)
    assert trace.seamcalls.height == 1


# What cannot be opened.


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such trace: .*nothing"):
        read_trace(tmp_path / "nothing")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        read_trace(tmp_path)


def test_an_empty_file() -> None:
    with pytest.raises(InputError, match="is empty"):
        read_text("")


@pytest.mark.parametrize("blank", ["\n", "  \n\t\n", "\r\n"])
def test_a_file_of_blanks(blank: str) -> None:
    with pytest.raises(InputError, match="no text"):
        read_text(blank)


def test_a_path_in_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot read"):
        read_trace(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(ONE_CALL)
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        read_trace(path)


def test_hostile_names_of_files_are_shown_as_text(tmp_path: Path) -> None:
    name = "a\x1b[31m\nb"
    with pytest.raises(InputError) as error:
        read_trace(tmp_path / name)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_with_a_zero_byte_is_one_clear_line() -> None:
    with pytest.raises(InputError):
        read_trace("a\0b")


def test_the_file_is_closed_after_reading(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(ONE_CALL)
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("no /proc/self/fd here")
    before = len([*folder.iterdir()])
    for _ in range(5):
        read_trace(path)
    assert len([*folder.iterdir()]) <= before


def test_progress_reports_bytes_read_and_the_size(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_bytes(TEXT)
    result: list[tuple[str, int, int | None]] = []
    read_trace(path, progress=lambda *args: result.append(args))
    assert result[-1] == (str(path), len(TEXT), len(TEXT))
    assert [done for _, done, _ in result] == sorted(done for _, done, _ in result)


def test_noise_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """What ingest holds does not grow with lines that become no rows."""

    def peak(n: int) -> int:
        path = tmp_path / "noise.txt"
        noise = line("1.000002", "sched_switch: prev_comm=swapper/1 prev_pid=0 ==> next_pid=7")
        path.write_text(ONE_CALL + noise * n)
        tracemalloc.start()
        try:
            read_trace(path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1000)
    # Three times the lines; how many blocks are at hand at once depends on the threads, and the
    # shorter text may fit into fewer than are read ahead.
    assert peak(750_000) < 2.5 * peak(250_000)


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("n_bytes", [1, len(TEXT), len(TEXT) + 1])
def test_the_size_is_known_before_the_blocks_are_read(
    pack: str, n_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_bytes(PACK[pack](TEXT))
    stream = open_stream(str(path))
    size = stream.size_up_to(n_bytes)
    assert size == len(TEXT) if n_bytes > len(TEXT) else size >= n_bytes
    assert b"".join(block.tobytes() for block in stream.blocks()) == TEXT


def test_no_more_of_a_pipe_is_awaited_than_is_asked_for() -> None:
    taken: list[int] = []

    def chunks() -> Iterator[bytes]:
        for n in range(5):
            taken.append(n)
            yield TEXT

    stream = Stream("-", "none", chunks())
    assert stream.size_up_to(2 * len(TEXT)) == 2 * len(TEXT)
    assert taken == [0, 1]
    assert b"".join(block.tobytes() for block in stream.blocks()) == 5 * TEXT


_SHRINKING = {
    "text": ONE_CALL.encode() * 9_000,
    "packed text": gzip.compress(ONE_CALL.encode() * 200),
    "trace.dat": SEEDS["trace.dat 6"](),
    "perf.data": SEEDS["perf.data"](),
}


# A perf.data ends with the names of its events, a trace.dat with the events.
_NOTHING_LEFT = {("perf.data", 0.3), ("perf.data", 0.99), ("trace.dat", 0.3)}


@pytest.mark.parametrize("kept", [0.3, 0.99, 1.01])
@pytest.mark.parametrize("kind", _SHRINKING)
def test_a_file_whose_size_changes_while_it_is_read_is_a_loss(
    kind: str, kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes after it was opened, and before more than its beginning was read."""
    data = _SHRINKING[kind]
    path = tmp_path / "trace"
    path.write_bytes(data)

    def first(*given: Any) -> bytes:  # noqa: ANN401
        head = read_first(*given)
        os.truncate(path, int(len(data) * kept))
        return head

    read_first = stream_room._read_magic
    monkeypatch.setattr(stream_room, "_read_magic", first)
    if (kind, kept) in _NOTHING_LEFT:
        with pytest.raises(TdxtraceError, match=f"has no event formats|{len(data):,} bytes when"):
            read_trace(path)
        return
    trace = read_trace(path)
    assert is_accounted_for(trace)
    row = trace.losses.filter(kind="changed_while_read").row(0, named=True)
    assert row["severity"] == "data_loss"
    assert row["detail"].startswith(f"{len(data):,} bytes when it was opened")


def test_a_log_that_is_rotated_while_it_is_read_has_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace"
    path.write_text(ONE_CALL)

    def first(*given: Any) -> bytes:  # noqa: ANN401
        path.rename(tmp_path / "trace.1")
        path.write_text("")
        return read_first(*given)

    read_first = stream_room._read_magic
    monkeypatch.setattr(stream_room, "_read_magic", first)
    assert read_trace(path).losses.filter(kind="changed_while_read").is_empty()


def test_a_line_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_room, "_ENDLESS_BYTES", 4 << 20)
    with pytest.raises(InputError, match="/dev/zero has a line that does not end"):
        read_trace("/dev/zero")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_text_that_windows_wrote_is_the_same_text(
    encoding: str, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PowerShell's > writes it, in pieces that cut characters."""
    monkeypatch.setattr(stream_room, "_READ_BYTES", 4097)
    mark = "\ufeff" if encoding.endswith("be") else ""
    trace = read_text(pack((mark + TEXT.decode().replace("\n", "\r\n")).encode(encoding)))
    assert is_accounted_for(trace)
    assert trace.seamcalls.drop("source").equals(read_text(TEXT).seamcalls.drop("source"))


@pytest.mark.parametrize("run", [interpreted, compiled])
@pytest.mark.parametrize(
    "name", ["Schl\xfcssel".encode("latin-1"), b"\xc3\x28\xff", b"\xed\xa0\x80"]
)
def test_a_name_that_is_no_utf_8_changes_no_other_column(
    name: bytes, run: Runner[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdxtrace.ingest.read.choose", lambda _: run)
    one, other = read_text(TEXT), read_text(TEXT.replace(b"CPU 0/KVM", name.rjust(9)))
    assert is_accounted_for(other)
    assert one.seamcalls.equals(other.seamcalls)
    (comm,) = other.threads["comm"]
    assert comm.strip() == name.decode("utf-8", "replace")
