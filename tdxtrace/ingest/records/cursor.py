"""Parts of a recording: numbers and texts one after the other, and what is compressed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tdxtrace.errors import FormatError
from tdxtrace.ingest.records.datafile import DataFile
from tdxtrace.tables.text import one_line


class CutShortError(Exception):
    """A header says that more follows than there is."""


@dataclass(slots=True)
class Cursor:
    """Reads forward through bytes, or a file; what is not there raises CutShortError."""

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
# (lib/trace-cmd/trace-compress.c); its largest part is kallsyms with some 10 MB.
MAX_PART_BYTES: Final = 256 << 20
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
    known = {"zstd": _zstd, "zlib": _zlib, "none": _none, "": _none}
    if name not in known:
        raise FormatError(
            f"{shown} is compressed with {one_line(name, 20)!r}; only zstd and zlib can be read; "
            "convert it: trace-cmd convert --compression none"
        )
    return known[name]


def _checked(size: int) -> None:
    if size > MAX_PART_BYTES:
        raise DamagedPartError


def _zlib(data: bytes, size: int) -> bytes:
    _checked(size)
    try:
        made = zlib.decompressobj().decompress(data, max(size, 1))
    except zlib.error:
        raise DamagedPartError from None
    if len(made) != size:
        raise DamagedPartError
    return made


def _zstd(data: bytes, size: int) -> bytes:
    import zstandard  # noqa: PLC0415 - slow to import, seldom needed

    _checked(size)
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(data)
        made = reader.read(size)
    except (zstandard.ZstdError, MemoryError):
        raise DamagedPartError from None
    if len(made) != size:
        raise DamagedPartError
    return made


def _none(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise DamagedPartError
    return data
