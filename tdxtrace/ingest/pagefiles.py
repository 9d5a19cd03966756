"""The pages of one CPU, as files keep them: plain, or compressed in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxtrace.ingest.cursor import CutShortError, FileCursor
from tdxtrace.ingest.datafile import DataFile
from tdxtrace.ingest.formats import PageLayout
from tdxtrace.ingest.gather import Bytes
from tdxtrace.ingest.unpack import DamagedPartError, Unpack

# Flag and length in a page's header, as in pages.py; the count of lost events at the
# page's end is gone with its end.
_MISSED_EVENTS: Final = 1 << 31
_COMMIT_MASK: Final = (1 << 27) - 1
# trace-cmd packs ten pages a chunk (lib/trace-cmd/trace-compress.c), whatever the
# size of a page; all pages of a file unpack to less than this many times its size.
_MAX_CHUNK_BYTES: Final = 16 << 20
_MAX_RATIO: Final = 1000


@dataclass(slots=True)
class PlainPages:
    """Pages that lie in a file one after the other."""

    file: DataFile
    layout: PageLayout
    at: int
    size: int
    cut_short: str = ""

    def read(self, n_pages: int) -> Bytes:
        """Return up to ``n_pages`` further pages; none at the end."""
        size = self.layout.size
        wanted = min(n_pages * size, self.size)
        made = self.file.array(self.at, wanted)
        self.at, self.size = self.at + len(made), self.size - len(made)
        if len(made) < wanted:
            self.size, self.cut_short = 0, "the file ends in the middle of a CPU's pages"
        return _whole(made, self.layout)


def _whole(made: Bytes, layout: PageLayout) -> Bytes:
    """Make a last page that is cut short a page that holds less."""
    left = len(made) % layout.size
    if not left:
        return made
    if left <= layout.data:
        return made[: len(made) - left]
    whole = np.zeros(len(made) - left + layout.size, np.uint8)
    whole[: len(made)] = made
    place = layout.commit
    start = len(made) - left + place.offset
    long = whole[start : start + place.size].view(f"{layout.order}u{place.size}")
    commit = int(long[0])
    flags = commit & _MISSED_EVENTS
    long[0] = flags | min(commit & _COMMIT_MASK, left - layout.data)
    return whole


@dataclass(slots=True)
class PackedPages:
    """Pages in chunks that are compressed one by one: trace.dat version 7."""

    cursor: FileCursor
    layout: PageLayout
    unpack: Unpack
    n_chunks: int | None = None
    cut_short: str = ""
    n_unpacked: int = 0
    _rest: bytes = b""

    def read(self, n_pages: int) -> Bytes:
        """Return up to ``n_pages`` further pages, or a chunk more; none at the end."""
        parts, size = [self._rest], len(self._rest)
        while size < n_pages * self.layout.size:
            chunk = self._chunk()
            if not chunk:
                break
            parts.append(chunk)
            size += len(chunk)
        data = b"".join(parts)
        whole = len(data) // self.layout.size * self.layout.size
        self._rest = data[whole:]
        return np.frombuffer(bytearray(data[:whole]), np.uint8)

    def _chunk(self) -> bytes:
        """Unpack the next chunk; empty at the end, or where it is damaged."""
        try:
            if self.n_chunks is None:
                self.n_chunks = self.cursor.number(4)
            if self.n_chunks <= 0:
                return b""
            self.n_chunks -= 1
            packed, size = self.cursor.number(4), self.cursor.number(4)
            self.n_unpacked += size
            bound = _MAX_RATIO * self.cursor.file.size
            if not 0 < size <= _MAX_CHUNK_BYTES or self.n_unpacked > bound:
                raise DamagedPartError
            return self.unpack(self.cursor.take(packed), size)
        except CutShortError:
            self.cut_short = "the file ends in the middle of a CPU's pages"
        except DamagedPartError:
            self.cut_short = "a compressed part of a CPU's pages is damaged"
        self.n_chunks = 0
        return b""
