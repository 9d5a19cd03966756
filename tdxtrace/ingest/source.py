"""The bytes of an input: opened, decompressed, cut into blocks of whole lines."""

from __future__ import annotations

import codecs
import itertools
import lzma
import os
import re
import signal
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line

# Bytes of a block: with 8, 16 and 24 MB 12 million lines took 2.2, 2.0 and 2.1 s.
CHUNK_BYTES: Final = 8 << 20
# The longest line that is matched.  The kernel formats an event into 8 KiB (TRACE_SEQ_SIZE, Linux
# include/linux/trace_seq.h) and a message into 2 (PRINTK_MESSAGE_MAX, kernel/printk/internal.h):
# one on a longer line is `overlong`.
MAX_LINE_BYTES: Final = 8192
# Bytes kept of a line that does not end.  A line of a journal has more than its message.
KEPT_LINE_BYTES: Final = 1 << 16
# A line of more bytes never ends.
_ENDLESS_BYTES: Final = 256 << 20

# Bytes read at a time.
_READ_BYTES: Final = 1 << 20
# Files from this size on are read straight into blocks.  Those of tracefs, which wait for
# events as a pipe does, have size 0.
_LARGE_BYTES: Final = 2 * _READ_BYTES
# Bytes after the end of a block that may be read: words are loaded across its end.
BLOCK_PADDING: Final = 512
# Compressed bytes decoded at a time.  A hostile file may grow by 1,032 (deflate) to
# 32,768 (a zstd block of 128 KiB from 4 bytes, RFC 8878 3.1.1.2.2): at most 16 MiB.
_SLICE_BYTES: Final = 512
# Traces pack 10 (gzip) to 60 times (xz): beyond this ratio and size it is no recording but a bomb.
_MAX_RATIO: Final = 200
_FREE_BYTES: Final = 256 << 20
# A byte order mark and a character of ASCII: damage does not look like that.
_UTF_16: Final = re.compile(rb"\xff\xfe[^\0]\0|\xfe\xff\0[^\0]")
# Length of the longest magic number, that of trace.dat.
_MAGIC_BYTES: Final = 10


Bytes = NDArray[np.uint8]
Block = NDArray[np.uint8]
"""Bytes of whole lines; SPARE_BYTES zeros follow them in memory."""


class _Decompressor(Protocol):
    def decompress(self, data: bytes, /) -> bytes:
        """Return the bytes that ``data`` unpacks to."""

    @property
    def eof(self) -> bool:
        """Whether the compressed stream has ended."""

    @property
    def unused_data(self) -> bytes:
        """Data after the end of the compressed stream."""


@dataclass(slots=True)
class Stream:
    """The decompressed bytes of one input, and whether it ended early."""

    path: str
    compression: str
    chunks: Iterator[bytes]
    n_bytes: int = 0
    """Stored (compressed) bytes read so far."""
    size: int | None = None
    """Stored (compressed) size in bytes; None for a pipe."""
    close: Callable[[], None] = lambda: None
    """Closes the file; leaves standard input open."""
    max_bytes: int | None = None
    """Bytes that it may unpack to; None: _MAX_RATIO times as many as were read, and some."""
    truncated: str = ""
    """Why the input ended early; empty: it did not."""
    opened: os.stat_result | None = None
    """os.stat_result of the file when it was opened; None: not a regular file."""
    fill: Callable[[memoryview], int] | None = None
    """Of a large plain file: reads its next bytes into a buffer; returns how many, 0 at its end."""

    def losses(self) -> Iterator[tuple[str, str]]:
        """Yield kind and detail of each loss of bytes; call it after the input was read."""
        if self.truncated:
            yield "truncated", self.truncated
        if changed := self._change_of_size():
            yield "changed_while_read", changed

    def _change_of_size(self) -> str:
        """Describe how the size of the file changed since it was opened; empty: unchanged.

        Empty also if the name now refers to another file, as after the rotation of a log.
        """
        try:
            now = Path(self.path).stat()
        except OSError:
            return ""
        before = self.opened
        if before is None or not os.path.samestat(now, before) or now.st_size == before.st_size:
            return ""
        return f"{before.st_size:,} bytes when it was opened, {now.st_size:,} when it was read"

    def peek(self) -> bytes:
        """Return the first bytes without consuming them; empty if there are none."""
        for chunk in self.chunks:
            self.chunks = itertools.chain([chunk], self.chunks)
            if chunk:
                return chunk
        return b""

    def size_up_to(self, n_bytes: int) -> int:
        """Return the decompressed size; of more than ``n_bytes`` any number that large.

        Reads ahead up to that size if the file system does not give it. Call it before ``blocks``.
        """
        if self.compression == "none" and self.size is not None:
            return self.size
        size, taken = 0, []
        for chunk in self.chunks:
            taken.append(chunk)
            size += len(chunk)
            if size >= n_bytes:
                break
        self.chunks = itertools.chain(taken, self.chunks)
        return size

    def blocks(self) -> Iterator[Block]:
        """Yield blocks of whole lines, each ended by a newline; overlong lines are cut.

        Raises:
            InputError: If a line does not end, as those of /dev/zero.
        """
        if self.fill is not None:
            yield from self._blocks_of_file(next(self.chunks), self.fill)
            return
        pieces: list[bytes | memoryview] = []
        size, partial_line, n_partial = 0, b"", 0
        for chunk in self.chunks:
            end = chunk.rfind(b"\n") + 1
            if not end:
                partial_line += chunk
                n_partial += len(chunk)
                if n_partial > _ENDLESS_BYTES:
                    raise InputError(f"{one_line(self.path)} has a line that does not end")
                if len(partial_line) > 2 * KEPT_LINE_BYTES:
                    partial_line = partial_line[: KEPT_LINE_BYTES + 1]
                continue
            n_partial = 0
            pieces += [partial_line, memoryview(chunk)[:end]]
            size += len(partial_line) + end
            partial_line = chunk[end:]
            # A short read from a pipe is yielded at once, without waiting for more.
            if size >= CHUNK_BYTES or len(chunk) < _READ_BYTES:
                yield block_of(pieces)
                pieces, size = [], 0
        if pieces or partial_line:
            yield block_of([*pieces, partial_line, b"\n" if partial_line else b""])

    def _blocks_of_file(
        self, partial_line: bytes, fill: Callable[[memoryview], int]
    ) -> Iterator[Block]:
        """Yield the blocks of a plain file, each read into its own memory."""
        while True:
            buffer = np.empty(len(partial_line) + CHUNK_BYTES + BLOCK_PADDING, np.uint8)
            buffer[: len(partial_line)] = np.frombuffer(partial_line, np.uint8)
            size, limit = len(partial_line), len(buffer) - BLOCK_PADDING
            while size < limit and (n := fill(buffer.data[size:limit])):
                size += n
            if size == len(partial_line):
                break
            end = _last_newline(buffer[:size]) + 1
            partial_line = buffer[end:size].tobytes()
            if len(partial_line) > 2 * KEPT_LINE_BYTES:
                partial_line = partial_line[: KEPT_LINE_BYTES + 1]
            if end:
                buffer[end : end + BLOCK_PADDING] = 0
                yield buffer[:end]
        if partial_line:
            yield block_of([partial_line, b"" if partial_line.endswith(b"\n") else b"\n"])


def _last_newline(data: Bytes) -> int:
    """Return the index of the last newline, or -1."""
    end = len(data)
    while end > 0:
        start = max(0, end - KEPT_LINE_BYTES)
        found = data[start:end].tobytes().rfind(b"\n")
        if found >= 0:
            return start + found
        end = start
    return -1


def block_of(pieces: Sequence[bytes | memoryview]) -> Block:
    """Join bytes to a block."""
    size = sum(map(len, pieces))
    # numpy asks the kernel for huge pages where bytes() does not: far fewer page faults.
    buffer = np.empty(size + BLOCK_PADDING, np.uint8)
    buffer[size:] = 0
    at = 0
    for piece in pieces:
        buffer[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    return buffer[:size]


def matched_part(line: bytes) -> bytes:
    """The line; of an overlong one MAX_LINE_BYTES, and a byte that keeps it from seeming whole."""
    return line if len(line) <= MAX_LINE_BYTES else line[:MAX_LINE_BYTES] + b"\0"


def open_stream(path: str, max_bytes: int | None = None) -> Stream:
    """Open ``path`` (``-`` is standard input) and detect its compression by its magic number.

    Args:
        path: The input.
        max_bytes: Bytes that it may unpack to; None: see ``Stream``.

    Raises:
        InputError: If there is no such file, it is a directory, empty or unreadable.
    """
    shown = one_line(path)
    try:
        file, status = _open(path)
    except FileNotFoundError:
        raise InputError(f"no such trace: {shown}") from None
    except IsADirectoryError:
        raise InputError(f"{shown} is a directory; name the trace file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise InputError(f"cannot read {shown}: {_reason(error)}") from None
    close = file.close if path != "-" else lambda: None
    size = None if status is None else status.st_size
    stream = Stream(path, "none", iter(()), 0, size, close, max_bytes, opened=status)
    head = _read_magic(file, stream, shown)
    if not head:
        stream.close()
        raise InputError(f"{shown} is empty; check that tracing was on while the TD ran")
    raw = _chunks(file, head, stream, shown)
    stream.compression, new = _codec(head)
    stream.chunks = raw if new is None else _bounded(_decompress(raw, new, stream), stream)
    if _UTF_16.match(stream.peek()):
        stream.chunks = _utf_8(stream.chunks)
    elif new is None and size is not None and size >= _LARGE_BYTES:
        stream.fill = partial(_fill, file, stream, shown)
    return stream


def _open(path: str) -> tuple[IO[bytes], os.stat_result | None]:
    """Open a file; return it and its os.stat_result, which is None for a pipe."""
    # The handler of SIGINT that polars sets lets a read that waits for a pipe go on (SA_RESTART).
    signal.siginterrupt(signal.SIGINT, True)
    if path == "-":
        return sys.stdin.buffer, None
    file_path = Path(path)
    if file_path.is_dir():
        raise IsADirectoryError
    file = file_path.open("rb", buffering=0)
    status = os.fstat(file.fileno())
    return file, status if stat.S_ISREG(status.st_mode) else None


def _read(file: IO[bytes], stream: Stream, shown: str) -> bytes:
    try:
        data = file.read(_READ_BYTES) or b""
    except OSError as error:
        stream.close()
        raise InputError(f"cannot read {shown}: {_reason(error)}") from None
    stream.n_bytes += len(data)
    return data


def _fill(file: IO[bytes], stream: Stream, shown: str, into: memoryview) -> int:
    try:
        n: int = file.readinto(into)  # type: ignore[attr-defined]
    except OSError as error:
        stream.close()
        raise InputError(f"cannot read {shown}: {_reason(error)}") from None
    stream.n_bytes += n
    return n


def _read_magic(file: IO[bytes], stream: Stream, shown: str) -> bytes:
    """Read as much as a magic number has; a pipe may give a byte at a time."""
    head = b""
    while len(head) < _MAGIC_BYTES and (more := _read(file, stream, shown)):
        head += more
    return head


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _chunks(file: IO[bytes], head: bytes, stream: Stream, shown: str) -> Iterator[bytes]:
    while head:
        yield head
        head = _read(file, stream, shown)
    stream.close()


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
    """Decompress member after member; keep what was decompressed before damage."""
    codec, is_member_start, output = new(), True, bytearray()
    try:
        for part in _slices(raw):
            data = part.lstrip(b"\0") if is_member_start else part
            while data:
                output += codec.decompress(data)
                is_member_start, data = False, b""
                if codec.eof:  # what follows is another member or padding
                    data, codec, is_member_start = codec.unused_data.lstrip(b"\0"), new(), True
            if len(output) >= CHUNK_BYTES:
                yield bytes(output)
                output.clear()
    except Exception as error:  # zlib.error, LZMAError, ZstdError: no common base
        stream.truncated = f"{stream.compression} data is damaged: {one_line(str(error), 60)}"
    else:
        if not is_member_start:
            stream.truncated = f"{stream.compression} data ends in the middle"
    yield bytes(output)


def _bounded(chunks: Iterator[bytes], stream: Stream) -> Iterator[bytes]:
    """Yield unpacked bytes as long as they are not more than the input may unpack to.

    Raises:
        InputError: Where they are.
    """
    n_bytes = 0
    for chunk in chunks:
        n_bytes += len(chunk)
        limit = stream.max_bytes
        if n_bytes > (_FREE_BYTES + _MAX_RATIO * stream.n_bytes if limit is None else limit):
            stream.close()
            raise InputError(
                f"{one_line(stream.path)} unpacks from {stream.n_bytes >> 10} KiB to "
                f"{n_bytes >> 20} MiB and more; to allow this, use --max-unpacked 100G"
            )
        yield chunk


def _utf_8(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Convert UTF-16, which PowerShell writes, to UTF-8; invalid characters become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-16")("replace")
    for chunk in chunks:
        yield decoder.decode(chunk).encode()
    yield decoder.decode(b"", final=True).encode()


def _slices(raw: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in raw:
        for start in range(0, len(chunk), _SLICE_BYTES):
            yield chunk[start : start + _SLICE_BYTES]
