"""How the samples of a perf event are laid out, as its attributes say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxtrace.ingest.records.cursor import Cursor, CutShortError
from tdxtrace.ingest.records.formats import Field
from tdxtrace.ingest.records.gather import Block, Places

# enum perf_event_sample_format, Linux include/uapi/linux/perf_event.h: what a
# sample holds, in this order; all but READ and CALLCHAIN have eight bytes.
IP, TID, TIME, ADDR, READ, CALLCHAIN = 1, 2, 4, 8, 16, 32
ID, CPU, PERIOD, STREAM_ID, RAW, IDENTIFIER = 64, 128, 256, 512, 1024, 1 << 16
_SAMPLE_ORDER: Final = (IDENTIFIER, IP, TID, TIME, ADDR, ID, STREAM_ID, CPU, PERIOD)
# What follows other records if sample_id_all is set, counted from their end.
_TRAILER_ORDER: Final = (TID, TIME, ID, STREAM_ID, CPU, IDENTIFIER)
# enum perf_event_read_format.
_TIME_ENABLED, _TIME_RUNNING, _READ_ID, _GROUP, _READ_LOST = 1, 2, 4, 8, 16
TRACEPOINT: Final = 2  # PERF_TYPE_TRACEPOINT
# Bits of struct perf_event_attr behind read_format.
_INHERIT, _EXCLUDE_USER, _EXCLUDE_KERNEL, _FREQ, _SAMPLE_ID_ALL = 1, 4, 5, 10, 18
_USE_CLOCKID, _WRITE_BACKWARD = 25, 27
# clockid_t, Linux include/uapi/linux/time.h, named as perf names them.
_CLOCKS: Final = {0: "realtime", 1: "monotonic", 4: "monotonic_raw", 7: "boottime", 11: "tai"}
_MIN_ATTR: Final = 64  # PERF_ATTR_SIZE_VER0


@dataclass(frozen=True, slots=True)
class Attr:
    """One event that perf was asked to record."""

    type: int
    config: int
    """Of a tracepoint: its number."""
    period: int
    sample_type: int
    read_format: int
    flags: int
    """The bit field, first bit lowest."""
    clockid: int
    ids: tuple[int, ...] = ()

    def has(self, bit: int) -> bool:
        """Whether a bit of ``flags`` is set."""
        return bool(self.flags >> bit & 1)

    @property
    def is_tracepoint(self) -> bool:
        """Whether its samples hold records that a format describes."""
        return self.type == TRACEPOINT and bool(self.sample_type & RAW)

    @property
    def has_trailer(self) -> bool:
        """Whether records that are no samples say when and where they were made."""
        return self.has(_SAMPLE_ID_ALL)

    @property
    def clock(self) -> str:
        """The clock of its times, as perf names it."""
        if not self.has(_USE_CLOCKID):
            return "perf"
        return _CLOCKS.get(self.clockid, f"clockid {self.clockid}")

    def missing(self) -> dict[str, str]:
        """What it was not told to record: kind of loss, and how perf record keeps it."""
        kinds = {
            "sampled": self.has(_FREQ) or self.period > 1,
            "no_payload": self.type == TRACEPOINT and not self.sample_type & RAW,
            "no_time": not self.sample_type & TIME,
            "excluded": self.has(_EXCLUDE_USER) or self.has(_EXCLUDE_KERNEL),
        }
        ways = {
            "sampled": "-c 1 (every event)",
            "no_payload": "-R (raw records)",
            "no_time": "-T (times)",
            "excluded": "events without :u or :k",
        }
        return {kind: ways[kind] for kind, lacks in kinds.items() if lacks}


def attr_of(data: bytes, big_endian: bool, ids: tuple[int, ...] = ()) -> Attr | None:
    """Read a ``struct perf_event_attr``; None if it is too short to be one."""
    cursor = Cursor(data, big_endian)
    if len(data) < _MIN_ATTR:
        return None
    kind, _, config = cursor.number(4), cursor.number(4), cursor.number(8)
    period, sample_type, read_format = (cursor.number(8) for _ in range(3))
    flags = cursor.number(8)
    if big_endian:
        # Big-endian compilers put the first bit of a bit field highest.
        flags = int(f"{flags:064b}"[::-1], 2)
    cursor.at = 92
    try:
        clockid = cursor.number(4)
    except CutShortError:
        clockid = 0
    return Attr(kind, config, period, sample_type, read_format, flags, clockid, ids)


def _offsets(order: tuple[int, ...], sample_type: int) -> dict[int, int]:
    present = [bit for bit in order if sample_type & bit]
    return {bit: 8 * place for place, bit in enumerate(present)}


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """Where samples of one sample_type and read_format keep what; bytes after the header."""

    sample_type: int
    read_format: int

    @property
    def fixed(self) -> dict[int, int]:
        """Offset of each word that comes before anything of varying length."""
        return _offsets(_SAMPLE_ORDER, self.sample_type)

    @property
    def trailer(self) -> dict[int, int]:
        """Offset of each word of the trailer, from its begin."""
        return _offsets(_TRAILER_ORDER, self.sample_type)

    @property
    def id_at(self) -> int | None:
        """Where a sample names its event, if it does."""
        fixed = self.fixed
        return fixed.get(IDENTIFIER, fixed.get(ID))

    def raw_at(self, block: Block, body: Places, end: Places) -> tuple[Places, Places]:
        """Where the records of samples begin, and how many bytes they have.

        Args:
            block: The samples' bytes.
            body: Where each sample begins, after its header.
            end: Where each ends; a record that does not fit has no bytes.
        """
        at = body + 8 * len(self.fixed)
        words, each = self.read_words
        if each:
            at = at + 8 * each * _count(block, at, end)
        at = at + 8 * words
        if self.sample_type & CALLCHAIN:
            at = at + 8 * (1 + _count(block, at, end))
        at = np.minimum(at, end)
        size = block.column(at, Field("size", 0, 4, False, True)).astype(np.intp)
        return at + 4, np.where(at + 4 + size <= end, size, 0)

    @property
    def read_words(self) -> tuple[int, int]:
        """Words that READ puts into a sample, and further ones for each that the first counts."""
        if not self.sample_type & READ:
            return 0, 0
        each = 1 + bool(self.read_format & _READ_ID) + bool(self.read_format & _READ_LOST)
        times = bool(self.read_format & _TIME_ENABLED) + bool(self.read_format & _TIME_RUNNING)
        return (1 + times, each) if self.read_format & _GROUP else (each + times, 0)


def _count(block: Block, at: Places, end: Places) -> Places:
    """The number at ``at``, at most as many words as are left."""
    inside = np.minimum(at, end)
    n = block.column(inside, Field("nr", 0, 8, False, True))
    left = np.maximum(end - inside, 0) >> 3
    return np.minimum(n, left.astype(np.uint64)).astype(np.intp)
