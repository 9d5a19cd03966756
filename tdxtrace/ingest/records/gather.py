"""The numbers at many places of a block of bytes, one column at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.raw import U64Array
from tdxtrace.ingest.records.formats import Field

Bytes = NDArray[np.uint8]
Places = NDArray[np.intp]

_WORD: Final = 4
_LONG: Final = 8
# Zeros after a block, so that reading a word at its last byte stays inside.
PADDING: Final = 16


def block_of(data: bytes | bytearray | memoryview) -> Bytes:
    """Copy bytes into a block that words can be read from: aligned, padded with zeros."""
    block = np.zeros((len(data) + PADDING + 7) // 8 * 8, np.uint8)
    block[: len(data)] = np.frombuffer(data, np.uint8)
    return block


@dataclass(slots=True, weakref_slot=True, eq=False)
class Block:
    """Bytes of a recording and the views that numbers are read through.

    ``data`` must be as :func:`block_of` makes it; every place read must lie
    :data:`PADDING` bytes before its end.
    """

    data: Bytes
    order: str
    """``<`` or ``>``, as numpy writes byte orders."""
    words: NDArray[np.uint32] = field(init=False)
    """The aligned words."""
    longs: U64Array = field(init=False)
    """The aligned pairs of words."""
    _is_native: bool = field(init=False)
    _views: dict[int, NDArray[np.unsignedinteger]] = field(default_factory=dict)
    """The numbers of so many bytes that begin at each byte."""

    def __post_init__(self) -> None:
        self.words = self.data.view(f"{self.order}u4")
        self.longs = self.data[: len(self.data) // 8 * 8].view(f"{self.order}u8")
        self._is_native = self.words.dtype.isnative and self.data.ctypes.data % 8 == 0
        for size in (2, 4, 8):
            n = max(0, len(self.data) - size + 1)
            self._views[size] = np.ndarray(
                (n,), f"{self.order}u{size}", self.data.data, strides=(1,)
            )
        self._views[1] = self.data

    def numbers(self, base: Places, place: Field) -> NDArray[np.intp]:
        """Read the event numbers, of 16 bits at most, of the records at ``base``."""
        number = self._read(base, place, self._alignment(base), {}).astype(np.intp)
        return number if place.size <= 2 else number & 0xFFFF

    def column(self, base: Places, place: Field) -> U64Array:
        """Read ``place`` of the records that begin at ``base``, as 64-bit words.

        Signed numbers are extended: -1 of any size becomes 2^64 - 1.

        Args:
            base: Byte offsets of records.
            place: A field with ``is_number``.
        """
        return self.columns(base, {"": place})[""]

    def columns(self, base: Places, places: Mapping[str, Field]) -> dict[str, U64Array]:
        """Read several places of the same records: as :meth:`column` does.

        Args:
            base: Byte offsets of records.
            places: Fields with ``is_number``.
        """
        alignment = self._alignment(base)
        words: dict[int, NDArray[np.uint32]] = {}
        return {
            name: _extended(self._read(base, place, alignment, words), place)
            for name, place in places.items()
        }

    def _alignment(self, base: Places) -> int:
        """What all of ``base`` is a multiple of: 1, 4 or 8, as far as words can be used."""
        low = int(np.bitwise_or.reduce(base)) & 7 if self._is_native else 1
        return 8 if not low else 4 if not low & 3 else 1

    def _read(
        self, base: Places, place: Field, alignment: int, words: dict[int, NDArray[np.uint32]]
    ) -> NDArray[np.unsignedinteger]:
        """Read ``place``, unsigned; numpy takes aligned words six times faster than others.

        ``words`` holds those that were read of the same records before, by their offset.
        """
        size, at = place.size, place.offset
        within = at & 3
        if alignment == 1 or (within + size > _WORD if size <= _WORD else within):
            return self._views[size][base + at]
        if size <= _WORD:
            word = words.get(at - within)
            if word is None:
                word = words[at - within] = self.words.take((base + (at - within)) >> 2)
            if size == _WORD:
                return word
            return (word >> np.uint32(8 * within)) & np.uint32((1 << 8 * size) - 1)
        if alignment == size and not at & 7:
            return self.longs.take((base + at) >> 3)
        both = np.empty((len(base), 2), np.intp)
        np.right_shift(base + at, 2, out=both[:, 0])
        np.add(both[:, 0], 1, out=both[:, 1])
        return self.words.take(both).view(np.uint64).ravel()


def _extended(column: NDArray[np.unsignedinteger], place: Field) -> U64Array:
    """A column of numbers of any size as 64-bit words; signed ones keep their value."""
    if not place.signed or place.size == _LONG:
        return column.astype(np.uint64, copy=False)
    signed = column.astype(f"=u{place.size}", copy=False).view(f"i{place.size}")
    return signed.astype(np.int64).view(np.uint64)
