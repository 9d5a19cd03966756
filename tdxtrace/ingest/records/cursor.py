"""Numbers and texts of a binary header, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from tdxtrace.ingest.records.datafile import DataFile


class CutShortError(Exception):
    """A header says that more follows than there is."""


@dataclass(slots=True)
class Cursor:
    """Reads forward through bytes; what is not there raises CutShortError."""

    data: bytes
    big_endian: bool = False
    at: int = 0

    def take(self, n_bytes: int) -> bytes:
        """Return the next ``n_bytes`` bytes.

        Raises:
            CutShortError: If there are fewer.
        """
        made = self.data[self.at : self.at + n_bytes]
        if n_bytes < 0 or len(made) < n_bytes:
            raise CutShortError
        self.at += n_bytes
        return made

    def number(self, n_bytes: int) -> int:
        """Return the next unsigned number of ``n_bytes`` bytes."""
        return int.from_bytes(self.take(n_bytes), "big" if self.big_endian else "little")

    def text(self) -> str:
        """Return the next text, which a zero byte ends."""
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise CutShortError
        made = self.data[self.at : end].decode("utf-8", "replace")
        self.at = end + 1
        return made

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return len(self.data) - self.at


@dataclass(slots=True)
class FileCursor:
    """The same for a file, without reading it whole."""

    file: DataFile
    big_endian: bool = False
    at: int = 0

    def take(self, n_bytes: int) -> bytes:
        """Return the next ``n_bytes`` bytes.

        Raises:
            CutShortError: If there are fewer.
        """
        if n_bytes > self.file.size - self.at:
            raise CutShortError
        made = self.file.read(self.at, n_bytes)
        if len(made) < n_bytes:
            raise CutShortError
        self.at += n_bytes
        return made

    def number(self, n_bytes: int) -> int:
        """Return the next unsigned number of ``n_bytes`` bytes."""
        return int.from_bytes(self.take(n_bytes), "big" if self.big_endian else "little")

    def text(self, most: int = 256) -> str:
        """Return the next text, which a zero byte ends, of at most ``most`` bytes."""
        ahead = self.file.read(self.at, most + 1)
        end = ahead.find(b"\0")
        if end < 0:
            raise CutShortError
        self.at += end + 1
        return ahead[:end].decode("utf-8", "replace")

    def skip(self, n_bytes: int) -> None:
        """Pass over ``n_bytes`` bytes.

        Raises:
            CutShortError: If there are fewer.
        """
        if n_bytes > self.file.size - self.at:
            raise CutShortError
        self.at += n_bytes
