"""The places of the pages of a trace.dat that lost the list which says them.

Version 7 writes the list of a buffer's CPUs behind its pages: a file that was cut
short, or whose recorder died, has the pages but not the list.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tdxtrace.ingest.records.cursor import Cursor, CutShortError
from tdxtrace.ingest.records.datafile import DataFile
from tdxtrace.ingest.stats import MAX_CPUS
from tdxtrace.ingest.tracedat.options import CpuData

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
