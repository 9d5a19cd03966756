"""Which bytes a path gives: opened, decompressed, cut into blocks of whole lines."""

from __future__ import annotations

import itertools
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Protocol

from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line

# Large enough to hide the cost of a call, small enough for a block's columns to
# stay in a core's L2 cache.
CHUNK_BYTES: Final = 1 << 20
# A line of this length is no event: the kernel formats one into a page
# (TRACE_SEQ_SIZE, Linux include/linux/trace_seq.h, 8 KiB).
MAX_LINE_BYTES: Final = 1 << 16

# Compressed bytes decoded at a time.  A hostile file may grow by 1,032 (deflate) to
# 32,768 (a zstd block of 128 KiB from 4 bytes, RFC 8878 3.1.1.2.2): at most 128 MiB.
_SLICE_BYTES: Final = 4096


class _Decompressor(Protocol):
    def decompress(self, data: bytes, /) -> bytes:
        """Return what ``data`` gives."""

    @property
    def eof(self) -> bool:
        """Whether the compressed stream has ended."""

    @property
    def unused_data(self) -> bytes:
        """What was given after its end."""


@dataclass(slots=True)
class Stream:
    """The decompressed bytes of one input, and how it ended."""

    path: str
    compression: str
    chunks: Iterator[bytes]
    n_bytes: int = 0
    """Bytes taken from the input so far, as stored."""
    size: int | None = None
    """Bytes of the input as stored, where it can be known."""
    close: Callable[[], None] = lambda: None
    """Closes the file, for one that is then opened in another way."""
    truncated: str = ""
    """Why the input ended early; empty if it did not."""

    def peek(self) -> bytes:
        """Return the first bytes without taking them; empty if there are none."""
        for chunk in self.chunks:
            self.chunks = itertools.chain([chunk], self.chunks)
            if chunk:
                return chunk
        return b""

    def blocks(self) -> Iterator[bytes]:
        """Yield blocks of whole lines, each ended by a newline; overlong lines are cut to one."""
        rest = b""
        for chunk in self.chunks:
            end = chunk.rfind(b"\n")
            if end < 0:
                rest += chunk
                if len(rest) > 2 * MAX_LINE_BYTES:
                    rest = rest[: MAX_LINE_BYTES + 1]
                continue
            yield rest + chunk[: end + 1]
            rest = chunk[end + 1 :]
        if rest:
            yield rest + b"\n"


def open_stream(path: str) -> Stream:
    """Open ``path`` (``-`` is standard input) and see how it is compressed.

    Raises:
        InputError: If there is no such file, it is a directory, empty or unreadable.
    """
    shown = one_line(path)
    try:
        file, size = _open(path)
    except FileNotFoundError:
        raise InputError(f"no such trace: {shown}") from None
    except IsADirectoryError:
        raise InputError(f"{shown} is a directory; name the trace file in it") from None
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from None
    close = file.close if path != "-" else lambda: None
    stream = Stream(path, "none", iter(()), size=size, close=close)
    head = _read(file, stream, shown)
    if not head:
        stream.close()
        raise InputError(f"{shown} is empty; was tracing on while the TD ran?")
    raw = _chunks(file, head, stream, shown)
    stream.compression, new = _codec(head)
    stream.chunks = raw if new is None else _decompress(raw, new, stream)
    return stream


def _open(path: str) -> tuple[IO[bytes], int | None]:
    if path == "-":
        return sys.stdin.buffer, None
    where = Path(path)
    if where.is_dir():
        raise IsADirectoryError
    file = where.open("rb", buffering=0)
    return file, where.stat().st_size if where.is_file() else None


def _read(file: IO[bytes], stream: Stream, shown: str) -> bytes:
    try:
        data = file.read(CHUNK_BYTES) or b""
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from None
    stream.n_bytes += len(data)
    return data


def _chunks(file: IO[bytes], head: bytes, stream: Stream, shown: str) -> Iterator[bytes]:
    try:
        while head:
            yield head
            head = _read(file, stream, shown)
    finally:
        if stream.path != "-":
            file.close()


def _codec(head: bytes) -> tuple[str, Callable[[], _Decompressor] | None]:
    if head.startswith(b"\x1f\x8b"):
        return "gzip", lambda: zlib.decompressobj(wbits=31)
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd", _zstd
    return "none", None


def _zstd() -> _Decompressor:
    import zstandard  # noqa: PLC0415 - slow to import, seldom needed

    return zstandard.ZstdDecompressor().decompressobj()


def _decompress(
    raw: Iterator[bytes], new: Callable[[], _Decompressor], stream: Stream
) -> Iterator[bytes]:
    """Decompress member after member; what could be read before damage is kept."""
    codec, fresh, made = new(), True, bytearray()
    try:
        for part in _slices(raw):
            data = part
            while data:
                made += codec.decompress(data)
                fresh, data = False, b""
                if codec.eof:
                    data, codec, fresh = codec.unused_data.lstrip(b"\0"), new(), True
            if len(made) >= CHUNK_BYTES:
                yield bytes(made)
                made.clear()
    except Exception as error:  # zlib.error, LZMAError, ZstdError: no common base
        stream.truncated = f"{stream.compression} data is damaged: {one_line(str(error), 60)}"
    else:
        if not fresh:
            stream.truncated = f"{stream.compression} data ends in the middle"
    yield bytes(made)


def _slices(raw: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in raw:
        for start in range(0, len(chunk), _SLICE_BYTES):
            yield chunk[start : start + _SLICE_BYTES]
