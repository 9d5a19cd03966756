"""The records of a perf.data in blocks, unpacked where they are compressed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from tdxtrace.ingest.perf import chain
from tdxtrace.ingest.perf.file import TRACING_DATA, PerfFile
from tdxtrace.ingest.records.gather import PADDING, Block, Bytes, Places, block_of

# 4, 8 and 16 MiB took 3.5, 2.6 and 2.6 s for 8 million samples: in smaller blocks the thread
# that reads and the one that decodes wait for each other at more calls of numpy.
BLOCK_BYTES: Final = 8 << 20
# For compiled loops, which wait for nothing: what was read is still in the cache of
# the processor when the last of them comes to it.  2, 4 and 8 MiB took 1.44, 1.33 and 1.35 s
# for 12 million samples.
SMALL_BLOCK_BYTES: Final = 4 << 20
# What is read first, and after a record that has to be taken apart: the next one
# may be of that kind too.
_SMALL_BYTES: Final = 8 << 10
SAMPLE: Final = 9  # PERF_RECORD_SAMPLE, Linux include/uapi/linux/perf_event.h
_HEADER: Final = 8
_MAX_RECORD: Final = 1 << 16
# A record holds at most 64 KiB of compressed data; what comes out at a time is bounded
# so that a bomb does not fill the memory.
_MAX_UNPACKED: Final = 64 << 20
_MAX_RATIO: Final = 1000
# Unpacked at a time: a zstd block of 128 KiB needs four bytes (RFC 8878, 3.1.1.2.2).
_SLICE_BYTES: Final = 1024


@dataclass(slots=True)
class Records:
    """Whole records that follow one another."""

    block: Block
    start: Places
    """Where each begins …"""
    end: int
    """… and the last one ends."""
    others: Places
    """Which of them are no samples."""

    def __len__(self) -> int:
        return len(self.start)

    @property
    def n_samples(self) -> int:
        """How many of them are samples."""
        return len(self.start) - len(self.others)

    @property
    def samples(self) -> Places:
        """Which of them are samples."""
        mask = np.ones(len(self.start), np.bool_)
        mask[self.others] = False
        return np.flatnonzero(mask)

    def types(self, which: Places) -> Places:
        """The types of some of them."""
        made: Places = self.block.words[self.start[which] >> 2].astype(np.intp)
        return made

    def span(self, which: Places) -> tuple[Places, Places]:
        """Where some of them begin and end."""
        following = np.minimum(which + 1, len(self.start) - 1)
        end = np.where(which + 1 < len(self.start), self.start[following], self.end)
        return self.start[which], end


class _Zstd(Protocol):
    def decompress(self, data: bytes, /) -> bytes:
        """Return what ``data`` adds."""


@dataclass(slots=True)
class RecordReader:
    """Gives the records of a perf.data, in the order of the file."""

    perf: PerfFile
    is_compiled: bool = False
    """Whether chains are followed by compiled loops; only of this machine's byte order."""
    is_reused: bool = False
    """Whether what was given is of no use any more once the next is asked for."""
    at: int = 0
    n_damaged: int = 0
    """Places at which no record could be."""
    cut_short: str = ""
    _places: Places = field(default_factory=lambda: np.zeros((2, 0), np.intp))
    _bytes: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))
    _zstd: _Zstd | None = None
    _rest: bytes = b""
    _n_packed: int = 0
    _n_unpacked: int = 0
    _end: int = field(init=False)

    def __post_init__(self) -> None:
        self.at = self.perf.data_at
        self._end = min(self.perf.data_at + self.perf.data_size, self.perf.file.size)

    def blocks(self) -> Iterator[Records]:
        """Yield blocks of records; special ones are taken apart and not given."""
        window = _SMALL_BYTES
        while self.at < self._end:
            block, n_bytes = self._read(min(window, self._end - self.at))
            made, stop = self._split(block, n_bytes)
            self.at += stop
            if made is not None:
                window = min(4 * window, SMALL_BLOCK_BYTES if self.is_compiled else BLOCK_BYTES)
                yield made
                continue
            window = _SMALL_BYTES
            before = self.at
            yield from self._special()
            if self.at == before:
                break
        if self._rest:
            self.cut_short = self.cut_short or "compressed records end in the middle"

    def _read(self, wanted: int) -> tuple[Bytes, int]:
        """Read on into a block as gather.block_of makes it, without a copy between."""
        size = (wanted + PADDING + 7) // 8 * 8
        if not self.is_reused or len(self._bytes) < size:
            self._bytes = np.empty(size, np.uint8)
        block = self._bytes[:size]
        n_bytes = self.perf.file.fill(self.at, block[:wanted])
        block[n_bytes:] = 0
        return block, n_bytes

    def _split(self, block: Bytes, n_bytes: int) -> tuple[Records | None, int]:
        made = Block(block, ">" if self.perf.big_endian else "<")
        if self.is_compiled:
            start, others, stop = self._followed(block, n_bytes)
        else:
            found = chain.follow(block, n_bytes, self.perf.big_endian)
            start, stop = found.start, found.end
            others = np.flatnonzero(made.words[start >> 2] != SAMPLE)
        return (Records(made, start, stop, others) if len(start) else None), stop

    def _followed(self, block: Bytes, n_bytes: int) -> tuple[Places, Places, int]:
        """The begins of the records, which of them are no samples, and where they end."""
        from tdxtrace.ingest.perf import loops  # noqa: PLC0415 - see compiled.pays

        if not self.is_reused or self._places.shape[1] < n_bytes // 8:
            self._places = np.empty((2, n_bytes // 8), np.intp)
        start, others = self._places
        n, n_others, end, _ = loops.follow(block.view(np.int64), n_bytes, start, others)
        return start[:n], others[:n_others], end

    def _special(self) -> Iterator[Records]:
        """Take the record at ``at``, which is of no common kind; pass over it if it is sound."""
        head = self.perf.file.read(self.at, _HEADER)
        order = "big" if self.perf.big_endian else "little"
        size = int.from_bytes(head[6:8], order)  # type: ignore[arg-type]
        kind = int.from_bytes(head[:4], order)  # type: ignore[arg-type]
        if len(head) == _HEADER and size < _HEADER:
            self.n_damaged += 1
            return
        if len(head) < _HEADER or self.at + size > self._end:
            self.cut_short = "the file ends in the middle of a record"
            return
        body = self.perf.file.read(self.at + _HEADER, size - _HEADER)
        self.at += size
        if kind in (chain.COMPRESSED, chain.COMPRESSED2):
            yield from self._unpack(body, kind)
        elif kind == chain.AUXTRACE:
            self.at += int.from_bytes(body[:8], order)  # type: ignore[arg-type]
        elif kind == chain.HEADER_TRACING_DATA:
            n_bytes = int.from_bytes(body[:4], order)  # type: ignore[arg-type]
            self.perf.take_feature(TRACING_DATA, self.perf.file.read(self.at, n_bytes))
            self.at += (n_bytes + 7) // 8 * 8
        else:
            # A record of an odd length: those after it lie at odd places.
            yield from self._single(head + body)

    def _single(self, record: bytes) -> Iterator[Records]:
        block = Block(block_of(record), ">" if self.perf.big_endian else "<")
        start = np.zeros(1, np.intp)
        others = np.flatnonzero(block.words[:1] != SAMPLE)
        yield Records(block, start, len(record), others)

    def _unpack(self, body: bytes, kind: int) -> Iterator[Records]:
        """Unpack the next part of the stream that all compressed records form."""
        if kind == chain.COMPRESSED2:
            order = "big" if self.perf.big_endian else "little"
            size = int.from_bytes(body[:8], order)  # type: ignore[arg-type]
            body = body[8 : 8 + size]
        unpacked = self._unpacked(body)
        if unpacked is None:
            self.n_damaged += 1
            self.at = self._end
            return
        data = self._rest + unpacked
        made, stop = self._split(block_of(data), len(data))
        self._rest = data[stop:]
        if made is not None:
            yield made
        if len(self._rest) > _MAX_RECORD:
            # No record is so long: the chain is broken, and with it all that follows.
            self.n_damaged, self._rest, self.at = self.n_damaged + 1, b"", self._end

    def _unpacked(self, body: bytes) -> bytes | None:
        import zstandard  # noqa: PLC0415 - slow to import, seldom needed

        if self._zstd is None:
            self._zstd = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(
                read_across_frames=True
            )
        made = bytearray()
        for start in range(0, len(body), _SLICE_BYTES):
            try:
                made += self._zstd.decompress(body[start : start + _SLICE_BYTES])
            except (zstandard.ZstdError, MemoryError):
                return None
            if len(made) > _MAX_UNPACKED:
                return None
        self._n_packed += len(body)
        self._n_unpacked += len(made)
        bound = _MAX_RATIO * self._n_packed + _MAX_UNPACKED
        return bytes(made) if self._n_unpacked < bound else None
