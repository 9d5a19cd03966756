"""Where do the records of perf data begin: each says only how long it is.

A long block is followed from many places at once.  Each place is a guess, a word
that looks like a header; a chain counts only if the chain before it ends exactly
where it begins, so that no guess is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.raw import BoolArray, U64Array
from tdxtrace.ingest.records.gather import Bytes, Places

# Types that are not simply passed over: what follows them is of no or of another
# kind.  tools/perf/lib/include/perf/event.h, enum perf_user_event_type.
HEADER_TRACING_DATA: Final = 66
AUXTRACE: Final = 71
COMPRESSED: Final = 81
COMPRESSED2: Final = 83
SPECIAL: Final = (HEADER_TRACING_DATA, AUXTRACE, COMPRESSED, COMPRESSED2)
# Bytes from one guess to the next: some eighty records, so that two thousand
# chains fill a block of 16 MiB.
_PIECE: Final = 4096
_SHORTEST: Final = 8
_LEARNT: Final = 256
_MAX_KINDS: Final = 16


@dataclass(frozen=True, slots=True)
class Chain:
    """The records of a block."""

    start: Places
    """Byte at which each whole record begins."""
    end: int
    """Byte at which what was not followed begins."""
    is_damaged: bool
    """Whether a record stands there that cannot be one."""


def follow(block: Bytes, n_bytes: int, big_endian: bool) -> Chain:
    """Find the records of ``block``, up to one that is special, cut off or damaged.

    Args:
        block: Bytes of records, the first at 0, padded as gather.block_of pads.
        n_bytes: How many of them are records.
        big_endian: Their byte order.
    """
    words = block[: len(block) // 8 * 8].view(">u8" if big_endian else "<u8")
    walk = _Walk(words, n_bytes, big_endian)
    if n_bytes < 4 * _PIECE:
        return walk.plain(0, n_bytes, [])
    return walk.in_pieces()


@dataclass(slots=True)
class _Walk:
    words: NDArray[np.uint64]
    n_bytes: int
    big_endian: bool

    def _size(self, word: int) -> int:
        return word & 0xFFFF if self.big_endian else word >> 48

    def _type(self, word: int) -> int:
        return word >> 32 if self.big_endian else word & 0xFFFF_FFFF

    def plain(self, at: int, until: int, found: list[int]) -> Chain:
        """Follow one chain from ``at`` until it reaches ``until``, one record at a time."""
        words, n_bytes = self.words, self.n_bytes
        is_damaged = False
        while at < until and at + _SHORTEST <= n_bytes and at % 8 == 0:
            word = int(words[at >> 3])
            size = self._size(word)
            if size < _SHORTEST:
                is_damaged = True
                break
            if at + size > n_bytes or self._type(word) in SPECIAL:
                break
            found.append(at)
            at += size
        return Chain(np.array(found, np.intp), at, is_damaged)

    def in_pieces(self) -> Chain:
        """Follow chains from every guess, and join those that meet."""
        first = self.plain(0, min(self.n_bytes, _PIECE), [])
        if first.end < _PIECE or first.end % 8 or first.end + _PIECE > self.n_bytes:
            return self.plain(first.end, self.n_bytes, first.start.tolist())
        known = np.unique(self.words[first.start[-_LEARNT:] >> 3])[:_MAX_KINDS]
        begins = self._guesses(first.end, known)
        made = self._all_meet(first, begins)
        if made is not None:
            return made
        at, count, ends = self._lanes(begins)
        return self._join(first, begins, at, count, ends)

    def _all_meet(self, first: Chain, begins: Places) -> Chain | None:
        """Follow every chain by the lengths alone; None unless all meet and nothing is odd."""
        words, at = self.words, begins
        limit = np.append(at[1:], -(-self.n_bytes // 8))
        ends, lane = at.copy(), np.arange(len(at))
        count = np.zeros(len(at), np.intp)
        found: list[tuple[Places, Places]] = []
        for _ in range(_PIECE):
            found.append((lane, at))
            # Lengths that are no multiple of 8 are found in the end.
            at = at + self._words_of(words.take(at))
            live = at < limit
            if live.all():
                continue
            ends[lane[~live]] = at[~live]
            count[lane[~live]] = len(found)
            lane, at, limit = lane[live], at[live], limit[live]
            if not len(lane):
                break
        last = len(begins) - 1
        if len(lane) or (ends[:-1] != begins[1:]).any():
            return None
        start = _in_order(first.start, found, count)
        # The last chain runs to the block's end, and may stop in the middle of a record.
        end = int(ends[last]) << 3
        if end > self.n_bytes:
            end, start = int(start[-1]), start[:-1]
        size, kind = self._parts(words.take(start >> 3))
        is_odd = (size < _SHORTEST) | (size & 7 != 0) | _is_special(kind)
        return None if is_odd.any() else Chain(start, end, False)

    def _words_of(self, word: U64Array) -> Places:
        """Words of the records with these headers."""
        if self.big_endian:
            return (word & np.uint64(0xFFFF)).astype(np.intp) >> 3
        return (word >> np.uint64(51)).view(np.intp)

    def _guesses(self, start: int, known: U64Array) -> Places:
        """The first word of each piece that looks like the header of a known kind."""
        begins = np.arange(start, self.n_bytes - 8, _PIECE, dtype=np.intp) >> 3
        limit = np.append(begins[1:], self.n_bytes >> 3)
        place = begins.copy()
        open_lanes = np.arange(1, len(place))
        while len(open_lanes):
            word = self.words[place[open_lanes]]
            miss = np.ones(len(open_lanes), np.bool_)
            for kind in known:
                miss &= word != kind
            open_lanes = open_lanes[miss]
            place[open_lanes] += 1
            open_lanes = open_lanes[place[open_lanes] < limit[open_lanes]]
        return np.unique(np.minimum(place, self.n_bytes >> 3)[place < limit])

    def _lanes(self, begins: Places) -> tuple[NDArray[np.uint32], Places, Places]:
        """Follow every chain to the begin of the next; places are in words."""
        last = self.n_bytes >> 3
        limit = np.append(begins[1:], last)
        capacity = int((limit - begins).max()) + 1
        at = np.zeros((len(begins), capacity), np.uint32)
        flat = at.reshape(-1)
        lane = np.arange(len(begins))
        place, slot = begins.copy(), lane * capacity
        count, ends = np.zeros(len(begins), np.intp), begins.copy()
        while len(lane):
            word = self.words[place]
            size, kind = self._parts(word)
            follows = place + (size >> 3)
            good = (size >= _SHORTEST) & (size & 7 == 0) & (follows <= last) & ~_is_special(kind)
            lane, place, slot = lane[good], place[good], slot[good]
            flat[slot] = place
            count[lane] += 1
            ends[lane] = place = follows[good]
            slot = slot + 1
            live = place < limit[lane]
            if not live.all():
                lane, place, slot = lane[live], place[live], slot[live]
        return at, count, ends

    def _parts(self, word: U64Array) -> tuple[Places, Places]:
        if self.big_endian:
            return (word & np.uint64(0xFFFF)).astype(np.intp), (word >> np.uint64(32)).astype(
                np.intp
            )
        return (word >> np.uint64(48)).astype(np.intp), (word & np.uint64(0xFFFF_FFFF)).astype(
            np.intp
        )

    def _join(
        self,
        first: Chain,
        begins: Places,
        at: NDArray[np.uint32],
        count: Places,
        ends: Places,
    ) -> Chain:
        """Accept a chain where the one before it ends at its begin; mend where none does."""
        parts = [first.start]
        lane, n = 0, len(begins)
        met = ends[:-1] == begins[1:]
        broken = np.flatnonzero(~met)
        while True:
            later = broken[np.searchsorted(broken, lane) :]
            last = int(later[0]) if len(later) else n - 1
            parts.append(_flat(at, count, lane, last + 1))
            if last == n - 1:
                tail = self.plain(int(ends[last]) * 8, self.n_bytes, [])
                parts.append(tail.start)
                return Chain(np.concatenate(parts), tail.end, tail.is_damaged)
            mended, lane = self._mend(int(ends[last]), last, begins)
            parts.append(mended.start)
            if lane < 0:
                return Chain(np.concatenate(parts), mended.end, mended.is_damaged)

    def _mend(self, place: int, lane: int, begins: Places) -> tuple[Chain, int]:
        """Go on from ``place`` one record at a time until a guess is met; -1 if none is."""
        found: list[int] = []
        at = place * 8
        for following in range(lane + 1, len(begins)):
            goal = int(begins[following]) * 8
            made = self.plain(at, goal, found)
            at = made.end
            if at == goal:
                return made, following
            if at < goal:
                return made, -1
        made = self.plain(at, self.n_bytes, found)
        return made, -1


def _in_order(before: Places, found: list[tuple[Places, Places]], count: Places) -> Places:
    """Put what was found step by step chain by chain: the k-th step gave the k-th of a chain."""
    ends = np.cumsum(count) + len(before)
    start = np.empty(int(ends[-1]), np.intp)
    start[: len(before)] = before
    lanes: Places | None = None
    target = first = ends - count
    for step, (lane, at) in enumerate(found):
        if lane is not lanes:
            lanes, target = lane, first[lane] + step
        start[target] = at << 3
        target += 1
    return start


def _is_special(kind: Places) -> BoolArray:
    made: BoolArray = kind == SPECIAL[0]
    for other in SPECIAL[1:]:
        made = made | (kind == other)
    return made


def _flat(at: NDArray[np.uint32], count: Places, first: int, end: int) -> Places:
    """The places of the chains ``first`` to ``end``, in bytes."""
    width = int(count[first:end].max(initial=0))
    rows = at[first:end, :width]
    taken = np.arange(width) < count[first:end, None]
    return rows[taken].astype(np.intp) << 3
