"""Which pages of one CPU are at hand: read, and not yet given out whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.raw import I64Array, U64Array
from tdxtrace.ingest.records.formats import PageLayout
from tdxtrace.ingest.records.gather import Block, Bytes
from tdxtrace.ingest.ring.pages import PageHeads, join_heads, page_heads

NEVER: Final = (1 << 63) - 1


@dataclass(slots=True)
class CpuPages:
    """The pages of one CPU's buffer, as they lie in the recording."""

    cpu: int
    read: Callable[[Bytes], int]
    """Fills an array with further whole pages; returns how many bytes, 0 at the end."""
    correct: Callable[[U64Array], U64Array] | None = None
    """What makes its stamps comparable with those of other CPUs, if they are not."""


@dataclass(slots=True)
class Window:
    """Pages of one CPU that were read and not yet given out whole.

    They lie in a part of the block that is the CPU's own.
    """

    source: CpuPages
    layout: PageLayout
    at: int
    """Byte of the block at which its part begins."""
    capacity: int
    """Pages that its part can hold."""
    heads: PageHeads
    begin: I64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    """When each page begins, never before the one in front of it."""
    has_more: bool = True
    n_given: int = 0
    """Events of the first page that were already given out."""
    last_stamp: int | None = None
    first_stamp: int | None = None
    n_lost: int = 0
    """Events lost before the next one; -1: an unknown number."""
    n_damaged: int = 0
    n_events: int = 0

    def fill(self, block: Block, before: Block) -> None:
        """Move what is left of the block ``before`` to the front and read pages behind it."""
        left, size = len(self.begin), self.layout.size
        is_enough = not self.has_more or left > self.capacity // 2
        if is_enough and block is before:
            return
        place = int(self.heads.at[0]) if left else self.at
        block.data[self.at : self.at + left * size] = before.data[place : place + left * size]
        self.heads.at = self.heads.at - (place - self.at)
        if is_enough:
            return
        start, end = self.at + left * size, self.at + self.capacity * size
        n_more = self.source.read(block.data[start:end]) // size
        if not n_more:
            self.has_more = False
            return
        fresh = page_heads(block, self.layout, start + size * np.arange(n_more, dtype=np.intp))
        begin = np.where(fresh.sound, self.corrected(fresh.start), np.uint64(0)).astype(np.int64)
        # A page that seems to begin before the one in front of it is damaged: its
        # events stay where they are in the recording.
        latest = self.begin[-1:] if left else np.zeros(1, np.int64)
        begin = np.maximum.accumulate(np.concatenate([latest, begin]))[1:]
        self.heads = join_heads([self.heads, fresh])
        self.begin = np.concatenate([self.begin, begin])

    def corrected(self, stamps: U64Array) -> U64Array:
        """The stamps as all CPUs count them."""
        if self.source.correct is None:
            return stamps
        return np.minimum(self.source.correct(stamps), np.uint64(NEVER))

    def drop(self, n_pages: int, n_given: int) -> None:
        """Forget the first pages; of the next one, ``n_given`` events are done."""
        self.heads = self.heads.take(slice(n_pages, None))
        self.begin = self.begin[n_pages:]
        self.n_given = n_given
