"""Numbers and texts of a binary header, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from tdxtrace.ingest.records.datafile import DataFile


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
