"""The records of a perf.data in blocks, unpacked where they are compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.loops import perf_records as kinds
from tdxtrace.ingest.perfdata.file import TRACING_DATA, PerfFile
from tdxtrace.ingest.records.fields import PADDING

Bytes = NDArray[np.uint8]
Follow = Callable[[Bytes, int], int]
"""Takes the records at the begin of a block of so many bytes, and says where the first stands
that it left; PADDING zeros follow the block."""

# What was read is still in the cache of the processor when the last loop comes to it: 2, 4 and
# 8 MiB took 1.44, 1.33 and 1.35 s for 12 million samples.
_BLOCK_BYTES: Final = 4 << 20
# What is read first, and after a record that has to be taken apart: the next one
# may be of that kind too.
_SMALL_BYTES: Final = 8 << 10
_HEADER: Final = 8
_MAX_RECORD: Final = 1 << 16
# A record holds at most 64 KiB of compressed data; what comes out at a time is bounded
# so that a bomb does not fill the memory.
_MAX_UNPACKED: Final = 64 << 20
_MAX_RATIO: Final = 1000
# Unpacked at a time: a zstd block of 128 KiB needs four bytes (RFC 8878, 3.1.1.2.2).
_SLICE_BYTES: Final = 1024


class _Zstd(Protocol):
    def decompress(self, data: bytes, /) -> bytes:
        """Return what ``data`` adds."""


@dataclass(slots=True)
class RecordReader:
    """Reads the records of a perf.data, in the order of the file."""

    perf: PerfFile
    at: int = field(init=False)
    """Byte of the file up to which records were read."""
    is_damaged: bool = False
    """Whether it ended where no record can be."""
    cut_short: str = ""
    _block: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    _zstd: _Zstd | None = None
    _rest: bytes = b""
    _n_packed: int = 0
    _n_unpacked: int = 0
    _end: int = field(init=False)

    def __post_init__(self) -> None:
        self.at = self.perf.data_at
        self._end = min(self.perf.data_at + self.perf.data_size, self.perf.file.size)

    def read(self, follow: Follow) -> Iterator[None]:
        """Give ``follow`` one block after the other; yield after each.

        A block is overwritten by the next one.  Records that ``follow`` leaves are taken apart
        here, if that is all that is at the begin of a block.
        """
        window = _SMALL_BYTES
        while self.at < self._end:
            n_bytes = self._fill(min(window, self._end - self.at))
            n_taken = follow(self._block, n_bytes)
            self.at += n_taken
            window = min(4 * window, _BLOCK_BYTES) if n_taken else _SMALL_BYTES
            if not n_taken and not self._take_apart(follow):
                break
            yield
        if self._rest:
            self.cut_short = self.cut_short or "compressed records end in the middle"

    def _fill(self, n_wanted: int) -> int:
        if len(self._block) < n_wanted + PADDING:
            self._block = np.empty(n_wanted + PADDING, np.uint8)
        n_bytes = self.perf.file.fill(self.at, self._block[:n_wanted])
        self._block[n_bytes : n_bytes + PADDING] = 0
        return n_bytes

    def _take_apart(self, follow: Follow) -> bool:
        """Take the record at ``at``, longer than its block or of no common kind; False at the end.

        A record that cannot be one ends all: nothing says where the next one begins.
        """
        head = self.perf.file.read(self.at, _HEADER)
        size, kind = int.from_bytes(head[6:8], "little"), int.from_bytes(head[:4], "little")
        if len(head) == _HEADER and size < _HEADER:
            self.is_damaged = True
            return False
        if len(head) < _HEADER or self.at + size > self._end:
            self.cut_short = "the file ends in the middle of a record"
            return False
        body = self.perf.file.read(self.at + _HEADER, size - _HEADER)
        self.at += size
        if kind in (kinds.COMPRESSED, kinds.COMPRESSED2):
            self._unpack(body, kind, follow)
        elif kind == kinds.AUXTRACE:
            self.at += int.from_bytes(body[:8], "little")
        elif kind == kinds.TRACING_DATA:
            n_bytes = int.from_bytes(body[:4], "little")
            self.perf.take_feature(TRACING_DATA, self.perf.file.read(self.at, n_bytes))
            self.at += (n_bytes + 7) // 8 * 8
        else:
            follow(_padded(head + body), size)
        return True

    def _unpack(self, body: bytes, kind: int, follow: Follow) -> None:
        """Unpack the next part of the stream that all compressed records form."""
        if kind == kinds.COMPRESSED2:
            body = body[8 : 8 + int.from_bytes(body[:8], "little")]
        unpacked = self._unpacked(body)
        if unpacked is None:
            self.is_damaged, self.at = True, self._end
            return
        data = self._rest + unpacked
        self._rest = data[follow(_padded(data), len(data)) :]
        if len(self._rest) > _MAX_RECORD:
            # No record is so long: the chain is broken, and with it all that follows.
            self.is_damaged, self._rest, self.at = True, b"", self._end

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


def _padded(data: bytes) -> Bytes:
    return np.frombuffer(data + bytes(PADDING), np.uint8).copy()
