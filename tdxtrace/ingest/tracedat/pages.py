"""The pages of one CPU in a file, plain or compressed in chunks; and the search for them.

Version 7 writes the list of a buffer's CPUs behind its pages: a file that was cut short, or
whose recorder died, has the pages but not the list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.batch import MAX_CPUS
from tdxtrace.ingest.records.datafile import (
    Bytes,
    Cursor,
    CutShortError,
    DamagedPartError,
    DataFile,
    Unpack,
)
from tdxtrace.ingest.records.formats import PageLayout
from tdxtrace.ingest.tracedat.options import CpuData

# Flag and length in a page's header, as in loops/pages.py; the count of lost events at the
# page's end is gone with its end.
_MISSED_EVENTS: Final = 1 << 31
_COMMIT_MASK: Final = (1 << 27) - 1
# trace-cmd packs ten pages a chunk (lib/trace-cmd/trace-compress.c), whatever the
# size of a page; all pages of a file unpack to less than this many times its size.
_MAX_CHUNK_BYTES: Final = 16 << 20
_MAX_RATIO: Final = 1000
_DAMAGED: Final = "a compressed part of a CPU's pages is damaged"
_CUT_SHORT: Final = "the file ends in the middle of a CPU's pages"


@dataclass(slots=True)
class PlainPages:
    """Pages that lie in a file one after the other."""

    file: DataFile
    layout: PageLayout
    at: int
    size: int
    cut_short: str = ""

    @property
    def n_bytes(self) -> int:
        """Bytes that are left to read."""
        return self.size

    def read(self, into: Bytes) -> int:
        """Fill ``into`` with further pages; return how many bytes, 0 at the end."""
        wanted = min(len(into), self.size)
        made = self.file.fill(self.at, into[:wanted])
        self.at, self.size = self.at + made, self.size - made
        if made < wanted:
            self.size, self.cut_short = 0, _CUT_SHORT
        return _whole(into, made, self.layout)


def _whole(pages: Bytes, n_bytes: int, layout: PageLayout) -> int:
    """Make a last page that is cut short a page that holds less; return the bytes then."""
    left = n_bytes % layout.size
    if not left:
        return n_bytes
    begin = n_bytes - left
    if left <= layout.data or begin + layout.size > len(pages):
        return begin
    pages[n_bytes : begin + layout.size] = 0
    commit = pages[begin + layout.commit : begin + layout.commit + 8].view("<u8")
    n_bytes = min(int(commit[0]) & _COMMIT_MASK, left - layout.data)
    commit[0] = int(commit[0]) & _MISSED_EVENTS | n_bytes
    return begin + layout.size


@dataclass(slots=True)
class CompressedPages:
    """Pages in chunks that are compressed one by one: trace.dat version 7."""

    file: DataFile
    layout: PageLayout
    at: int
    unpack: Unpack
    cut_short: str = ""
    n_unpacked: int = 0
    n_bytes: int = field(init=False)
    """Bytes of all chunks, if all are as large as the first."""
    _n_chunks: int = 0
    _rest: memoryview = field(default_factory=lambda: memoryview(b""))

    def __post_init__(self) -> None:
        head = self.file.read(self.at, 12)
        self.at += 4
        self._n_chunks, size = (int.from_bytes(head[at : at + 4], "little") for at in (0, 8))
        self.n_bytes = self._n_chunks * size
        if len(head) < 4:
            self.cut_short = _CUT_SHORT

    def read(self, into: Bytes) -> int:
        """Fill ``into`` with further pages; return how many bytes, 0 at the end."""
        done = 0
        while done < len(into):
            if not self._rest:
                self._rest = self._chunk()
                if not self._rest:
                    break
            part = self._rest[: len(into) - done]
            into[done : done + len(part)] = np.frombuffer(part, np.uint8)
            self._rest = self._rest[len(part) :]
            done += len(part)
        return _whole(into, done, self.layout)

    def _chunk(self) -> memoryview:
        """Unpack the next chunk; empty at the end, or where it is damaged."""
        if not self._n_chunks:
            return memoryview(b"")
        self._n_chunks -= 1
        cursor = Cursor(self.file, at=self.at)
        try:
            packed, size = cursor.number(4), cursor.number(4)
            self.n_unpacked += size
            if not 0 < size <= _MAX_CHUNK_BYTES or self.n_unpacked > _MAX_RATIO * self.file.size:
                raise DamagedPartError
            made = memoryview(self.unpack(cursor.take(packed), size))
        except (CutShortError, DamagedPartError) as error:
            is_cut = isinstance(error, CutShortError)
            self.cut_short = _CUT_SHORT if is_cut else _DAMAGED
            self._n_chunks = 0
            return memoryview(b"")
        self.at = cursor.at
        return made


# Pages whose timestamps are read at a time.
_PAGES: Final = 1024
_UNKNOWN_CPU: Final = -1
# trace-cmd packs ten pages a chunk (lib/trace-cmd/trace-compress.c), into some 4 KB; where
# many are far smaller than that, they are not followed one by one.
_CHUNK_BYTES: Final = 1024
_FREE_CHUNKS: Final = 4096


def find_cpus(
    file: DataFile, place: tuple[int, int], page_size: int, is_compressed: bool, n_cpus: int | None
) -> tuple[CpuData, ...]:
    """Find the pages of each CPU in a buffer's data.

    trace-cmd writes the CPUs one after the other, each from the next multiple of a
    page (lib/trace-cmd/trace-output.c, out_write_cpu_data); one without events leaves
    nothing.  So CPUs have their numbers only where as many were found as there are;
    else a run of pages is of one CPU that is not known, and in itself in order of time.

    Args:
        file: The trace.dat.
        place: The first byte of the data, and the one behind it.
        page_size: Bytes of a page.
        is_compressed: Whether the pages are compressed.
        n_cpus: CPUs of the recorded machine, where the file says it.

    Returns:
        Empty where there are more runs of pages than CPUs: then these are no pages.
    """
    most = MAX_CPUS if n_cpus is None else n_cpus
    find = _compressed_runs if is_compressed else _plain_runs
    runs = find(file, _aligned(place[0], page_size), place[1], page_size, most)
    if len(runs) > most:
        return ()
    numbers = range(len(runs)) if len(runs) == n_cpus else [_UNKNOWN_CPU] * len(runs)
    return tuple(
        CpuData(cpu, at, after - at) for cpu, (at, after) in zip(numbers, runs, strict=True)
    )


def _aligned(at: int, page_size: int) -> int:
    return -(-at // page_size) * page_size


def _compressed_runs(
    file: DataFile, begin: int, end: int, page_size: int, most: int
) -> list[tuple[int, int]]:
    """Follow the chunks of each CPU: their number, then each with its lengths."""
    runs: list[tuple[int, int]] = []
    cursor = Cursor(file, at=begin)
    left = _FREE_CHUNKS + max(0, end - begin) // _CHUNK_BYTES
    while cursor.at < end and len(runs) <= most:
        begin = cursor.at
        try:
            n_chunks = cursor.number(4)
            if not n_chunks:
                break
            left -= n_chunks
            if left < 0:
                raise CutShortError
            for _ in range(n_chunks):
                packed, _ = cursor.number(4), cursor.number(4)
                cursor.skip(packed)
        except CutShortError:
            runs.append((begin, end))
            break
        runs.append((begin, cursor.at))
        cursor.at = _aligned(cursor.at, page_size)
    return runs


def _plain_runs(
    file: DataFile, begin: int, end: int, page_size: int, most: int
) -> list[tuple[int, int]]:
    """Part the pages where time goes back: on one CPU it never does."""
    starts = [begin]
    last = np.zeros(0, np.uint64)
    for at in range(begin, end, _PAGES * page_size):
        data = file.array(at, min(_PAGES * page_size, end - at))
        n_pages = len(data) // page_size
        words = data[: n_pages * page_size].reshape(n_pages, page_size)[:, :8]
        times = np.concatenate([last, np.ascontiguousarray(words).view("<u8")[:, 0]])
        back = np.flatnonzero(times[1:] < times[:-1]) + 1 - len(last)
        starts += (at + back * page_size).tolist()
        last = times[-1:]
        if len(starts) > most:
            break
    return list(zip(starts, [*starts[1:], end], strict=True)) if begin < end else []
