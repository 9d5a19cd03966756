"""The numbers at many places of a block of bytes, one column at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.formats import Field
from tdxtrace.ingest.raw import U64Array

Bytes = NDArray[np.uint8]
Places = NDArray[np.intp]

# Zeros after a block, so that reading a word at its last byte stays inside.
PADDING: Final = 16


def block_of(data: bytes | bytearray | memoryview) -> Bytes:
    """Copy bytes into a block that words can be read from: aligned, padded with zeros."""
    block = np.zeros((len(data) + PADDING + 7) // 8 * 8, np.uint8)
    block[: len(data)] = np.frombuffer(data, np.uint8)
    return block


@dataclass(slots=True)
class Block:
    """Bytes of a recording and the views that words are read through.

    ``data`` must be as :func:`block_of` makes it; every place read must lie
    :data:`PADDING` bytes before its end.
    """

    data: Bytes
    order: str
    """``<`` or ``>``, as numpy writes byte orders."""
    words: NDArray[np.uint32] = field(init=False)
    halves: NDArray[np.uint16] = field(init=False)

    def __post_init__(self) -> None:
        self.words = self.data.view(f"{self.order}u4")
        self.halves = self.data.view(f"{self.order}u2")

    def numbers(self, base: Places, place: Field) -> NDArray[np.intp]:
        """Read the event numbers, usually of two bytes, of the records at ``base``."""
        if place.size == 2 and place.offset % 2 == 0:
            number: NDArray[np.intp] = self.halves[(base + place.offset) >> 1].astype(np.intp)
            return number
        return self.column(base, place).astype(np.intp) & 0xFFFF

    def column(self, base: Places, place: Field) -> U64Array:
        """Read ``place`` of the records that begin at ``base``, as 64-bit words.

        Signed numbers are extended: -1 of any size becomes 2^64 - 1.

        Args:
            base: Byte offsets of records, each a multiple of 4.
            place: A field with ``is_number``.
        """
        if place.offset % 4 + place.size <= 4 and place.size < 4:
            return self._inside_word(base, place)
        if place.offset % 4:
            return self._anywhere(base, place)
        at = (base + place.offset) >> 2
        first = self.words[at]
        if place.size == 4:
            value = first.astype(np.uint64)
            return _extended(value, place) if place.signed else value
        low, high = (
            (first, self.words[at + 1]) if self.order == "<" else (self.words[at + 1], first)
        )
        whole: U64Array = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        return whole

    def _inside_word(self, base: Places, place: Field) -> U64Array:
        """The same for numbers of one or two bytes that share a word with others."""
        skipped = place.offset % 4
        shift = 8 * (skipped if self.order == "<" else 4 - skipped - place.size)
        word = self.words[(base + place.offset) >> 2] >> np.uint32(shift)
        value = (word & np.uint32((1 << 8 * place.size) - 1)).astype(np.uint64)
        return _extended(value, place) if place.signed else value

    def _anywhere(self, base: Places, place: Field) -> U64Array:
        """The same for fields of any alignment, byte by byte."""
        steps = range(place.size) if self.order == ">" else reversed(range(place.size))
        value = np.zeros(len(base), np.uint64)
        for step in steps:
            value = (value << np.uint64(8)) | self.data[base + (place.offset + step)]
        return _extended(value, place) if place.signed else value


def _extended(value: U64Array, place: Field) -> U64Array:
    """Repeat the sign of a number of ``place.size`` bytes up to bit 63."""
    shift = np.int64(64 - 8 * place.size)
    return ((value.view(np.int64) << shift) >> shift).view(np.uint64)
