"""The bytes of a recording at any place, and its parts: numbers, texts, what is compressed."""

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
    """A recording that can be read from at any place."""

    descriptor: int
    size: int
    shown: str
    """Its name, safe to show."""

    def read(self, at: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``at``: fewer where the file ends before.

        Raises:
            InputError: If the system cannot read it.
        """
        return self.array(at, n_bytes).tobytes()

    def array(self, at: int, n_bytes: int) -> Bytes:
        """The same as an array of bytes that may be written."""
        wanted = max(0, min(n_bytes, self.size - at)) if at >= 0 else 0
        made = np.empty(wanted, np.uint8)
        return made[: self.fill(at, made)]

    def fill(self, at: int, into: Bytes) -> int:
        """Read bytes from ``at`` into an array; return how many: fewer where the file ends.

        Raises:
            InputError: If the system cannot read it.
        """
        done = 0
        wanted = max(0, min(len(into), self.size - at)) if at >= 0 else 0
        while done < wanted:
            try:
                n = os.preadv(self.descriptor, [into.data[done:wanted]], at + done)
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
    """Keep what a pipe or a codec gives in a temporary file without a name.

    Args:
        chunks: The bytes, in order.
        path: Where they come from.

    Raises:
        InputError: If they unpack to absurdly many (``source.Stream``), or there is no room.
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
    """Reads forward through bytes, or a file; reading past the end raises CutShortError."""

    source: bytes | DataFile
    at: int = 0

    def take(self, n_bytes: int) -> bytes:
        """Return the next ``n_bytes`` bytes.

        Raises:
            CutShortError: If there are fewer.
        """
        if not 0 <= n_bytes <= self.left:
            raise CutShortError
        made = self._ahead(n_bytes)
        if len(made) < n_bytes:
            raise CutShortError
        self.at += n_bytes
        return made

    def number(self, n_bytes: int) -> int:
        """Return the next unsigned number of ``n_bytes`` bytes."""
        return int.from_bytes(self.take(n_bytes), "little")

    def text(self, most: int = 4096) -> str:
        """Return the next text, which a zero byte ends, of at most ``most`` bytes."""
        text, end, _ = self._ahead(most + 1).partition(b"\0")
        if not end:
            raise CutShortError
        self.at += len(text) + 1
        return text.decode("utf-8", "replace")

    def skip(self, n_bytes: int) -> None:
        """Pass over ``n_bytes`` bytes.

        Raises:
            CutShortError: If there are fewer.
        """
        if n_bytes > self.left:
            raise CutShortError
        self.at += n_bytes

    @property
    def left(self) -> int:
        """Bytes that are left."""
        size = len(self.source) if isinstance(self.source, bytes) else self.source.size
        return size - self.at

    def _ahead(self, n_bytes: int) -> bytes:
        if isinstance(self.source, bytes):
            return self.source[self.at : self.at + n_bytes]
        return self.source.read(self.at, n_bytes)


Unpack = Callable[[bytes, int], bytes]
# A part is unpacked in memory.  trace-cmd compresses trace data by ten pages
# (lib/trace-cmd/trace-compress.c); its largest part is kallsyms with some 10 MB, the next are
# the formats of 3,000 events with 5 MB.
MAX_PART_BYTES: Final = 64 << 20
# A part of text packs 5 (kallsyms) to 30 times (formats): beyond this it is no recording.
_MAX_PART_RATIO: Final = 100
_FREE_PART_BYTES: Final = 1 << 20


def is_plausible(packed: int, unpacked: int) -> bool:
    """Whether a part of so many bytes may unpack to so many."""
    return unpacked <= min(MAX_PART_BYTES, _FREE_PART_BYTES + _MAX_PART_RATIO * packed)


# zstd's own limit for a decoder without --long: 2^27 (RFC 8878, 3.1.1.1.2, and zstd(1)).
_MAX_WINDOW: Final = 1 << 27


class DamagedPartError(Exception):
    """A compressed part does not unpack to what it declares."""


def unpacker(name: str, shown: str) -> Unpack:
    """Return a function of compressed bytes and declared size that unpacks them.

    It raises DamagedPartError where the bytes are not what they declare.

    Raises:
        FormatError: If the method is not known.
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
        made = method(data, size) if size <= MAX_PART_BYTES else b""
        if len(made) != size:
            raise DamagedPartError
        return made

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
        made: bytes = reader.read(size)
    except (zstandard.ZstdError, MemoryError):
        raise DamagedPartError from None
    return made
