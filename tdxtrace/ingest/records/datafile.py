"""Random access to a recording's bytes; parsing of numbers and strings; decompression of parts."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.errors import FormatError, InputError
from tdxtrace.tables.text import one_line

Bytes = NDArray[np.uint8]


@dataclass(slots=True)
class DataFile:
    """A recording that can be read at any offset."""

    descriptor: int
    size: int
    shown: str
    """Its name, safe to print."""

    def read(self, at: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from offset ``at``; fewer if the file ends before.

        Raises:
            InputError: If the system cannot read it.
        """
        return self.array(at, n_bytes).tobytes()

    def array(self, at: int, n_bytes: int) -> Bytes:
        """Do the same as ``read``, but return a writable array."""
        n_wanted = max(0, min(n_bytes, self.size - at)) if at >= 0 else 0
        output = np.empty(n_wanted, np.uint8)
        return output[: self.fill(at, output)]

    def fill(self, at: int, into: Bytes) -> int:
        """Read bytes from offset ``at`` into an array; return their number, fewer at file end.

        Raises:
            InputError: If the system cannot read it.
        """
        done = 0
        n_wanted = max(0, min(len(into), self.size - at)) if at >= 0 else 0
        while done < n_wanted:
            try:
                n = os.preadv(self.descriptor, [into.data[done:n_wanted]], at + done)
            except OSError as error:
                raise InputError(f"cannot read {self.shown}: {error.strerror}") from None
            if not n:
                break
            done += n
        return done

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


def open_file(path: str) -> DataFile:
    """Open a plain file.

    Raises:
        InputError: If it cannot be opened.
    """
    shown = one_line(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from None
    return DataFile(descriptor, os.fstat(descriptor).st_size, shown)


def spool(chunks: Iterator[bytes], path: str) -> DataFile:
    """Write the output of a pipe or a decompressor to an unnamed temporary file.

    Args:
        chunks: The bytes, in order.
        path: Path of their source, for messages.

    Raises:
        InputError: If they unpack to implausibly many (``source.Stream``), or the disk is full.
    """
    shown = one_line(path)
    size = 0
    with tempfile.TemporaryFile(prefix="tdxtrace-") as file:
        try:
            for chunk in chunks:
                size += len(chunk)
                file.write(chunk)
            file.flush()
        except OSError as error:
            raise InputError(f"cannot unpack {shown}: {error.strerror}") from None
        return DataFile(os.dup(file.fileno()), size, shown)


class CutShortError(Exception):
    """The data end before the length that a header states."""


@dataclass(slots=True)
class Cursor:
    """Reads forward through bytes or a file; reading past the end raises CutShortError."""

    source: bytes | DataFile
    at: int = 0

    def take(self, n_bytes: int) -> bytes:
        """Return the next ``n_bytes`` bytes.

        Raises:
            CutShortError: If there are fewer.
        """
        if not 0 <= n_bytes <= self.left:
            raise CutShortError
        output = self._peek(n_bytes)
        if len(output) < n_bytes:
            raise CutShortError
        self.at += n_bytes
        return output

    def number(self, n_bytes: int) -> int:
        """Return the next unsigned number of ``n_bytes`` bytes."""
        return int.from_bytes(self.take(n_bytes), "little")

    def text(self, max_bytes: int = 4096) -> str:
        """Return the next zero-terminated string of at most ``max_bytes`` bytes.

        Raises:
            CutShortError: If it is not terminated within them.
        """
        text, end, _ = self._peek(max_bytes + 1).partition(b"\0")
        if not end:
            raise CutShortError
        self.at += len(text) + 1
        return text.decode("utf-8", "replace")

    def skip(self, n_bytes: int) -> None:
        """Skip ``n_bytes`` bytes.

        Raises:
            CutShortError: If there are fewer.
        """
        if n_bytes > self.left:
            raise CutShortError
        self.at += n_bytes

    @property
    def left(self) -> int:
        """Number of bytes left."""
        size = len(self.source) if isinstance(self.source, bytes) else self.source.size
        return size - self.at

    def _peek(self, n_bytes: int) -> bytes:
        if isinstance(self.source, bytes):
            return self.source[self.at : self.at + n_bytes]
        return self.source.read(self.at, n_bytes)


Unpack = Callable[[bytes, int], bytes]
# A part is unpacked in memory.  trace-cmd compresses trace data in chunks of ten pages
# (lib/trace-cmd/trace-compress.c); its largest part is kallsyms with some 10 MB, followed by
# the formats of 3,000 events with 5 MB.
MAX_PART_BYTES: Final = 64 << 20
# Compression ratios of text parts are 5 (kallsyms) to 30 (formats): higher ones than this are
# refused.
_MAX_PART_RATIO: Final = 100
_FREE_PART_BYTES: Final = 1 << 20


def is_plausible(packed: int, unpacked: int) -> bool:
    """Return whether a part of ``packed`` bytes may unpack to ``unpacked`` bytes."""
    return unpacked <= min(MAX_PART_BYTES, _FREE_PART_BYTES + _MAX_PART_RATIO * packed)


# zstd's own limit for a decoder without --long: 2^27 (RFC 8878, 3.1.1.1.2, and zstd(1)).
_MAX_WINDOW: Final = 1 << 27


class DamagedPartError(Exception):
    """A compressed part does not unpack to what it declares."""


def unpacker(name: str, shown: str) -> Unpack:
    """Return a function that unpacks compressed bytes of a declared unpacked size.

    It raises DamagedPartError if the bytes do not unpack to that size.

    Args:
        name: Compression method as in the recording's header.
        shown: Name of the recording, for messages.

    Raises:
        FormatError: If the method is unknown.
    """
    known: dict[str, Unpack] = {"zstd": _zstd, "zlib": _zlib}
    known |= dict.fromkeys(("none", ""), lambda data, _: data)
    if name not in known:
        raise FormatError(
            f"{shown} is compressed with {one_line(name, 20)!r}; only zstd and zlib can be read; "
            "convert it: trace-cmd convert --compression none"
        )
    method = known[name]

    def unpack(data: bytes, size: int) -> bytes:
        output = method(data, size) if size <= MAX_PART_BYTES else b""
        if len(output) != size:
            raise DamagedPartError
        return output

    return unpack


def _zlib(data: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, max(size, 1))
    except zlib.error:
        raise DamagedPartError from None


def _zstd(data: bytes, size: int) -> bytes:
    import zstandard  # noqa: PLC0415 - slow to import, seldom needed

    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(data)
        output: bytes = reader.read(size)
    except (zstandard.ZstdError, MemoryError):
        raise DamagedPartError from None
    return output
