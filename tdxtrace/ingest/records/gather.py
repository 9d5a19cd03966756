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

# Fields that lie within so many bytes are fetched together: to fetch a run of bytes
# costs little more than to fetch one number.
_MAX_RUN: Final = 256
# Zeros after a block, so that reading a word at its last byte stays inside.
PADDING: Final = 16


def block_of(data: bytes | bytearray | memoryview) -> Bytes:
    """Copy bytes into a block that words can be read from: aligned, padded with zeros."""
    block = np.zeros((len(data) + PADDING + 7) // 8 * 8, np.uint8)
    block[: len(data)] = np.frombuffer(data, np.uint8)
    return block


@dataclass(slots=True)
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
    _views: dict[int, NDArray[np.unsignedinteger]] = field(default_factory=dict)
    """The numbers of so many bytes that begin at each byte."""

    def __post_init__(self) -> None:
        self.words = self.data.view(f"{self.order}u4")
        for size in (2, 4, 8):
            n = max(0, len(self.data) - size + 1)
            self._views[size] = np.ndarray(
                (n,), f"{self.order}u{size}", self.data.data, strides=(1,)
            )
        self._views[1] = self.data

    def numbers(self, base: Places, place: Field) -> NDArray[np.intp]:
        """Read the event numbers, of 16 bits at most, of the records at ``base``."""
        number: NDArray[np.intp] = self._views[place.size][base + place.offset].astype(np.intp)
        return number if place.size <= 2 else number & 0xFFFF

    def column(self, base: Places, place: Field) -> U64Array:
        """Read ``place`` of the records that begin at ``base``, as 64-bit words.

        Signed numbers are extended: -1 of any size becomes 2^64 - 1.

        Args:
            base: Byte offsets of records.
            place: A field with ``is_number``.
        """
        found = self._views[place.size][base + place.offset]
        if place.signed and place.size < 8:
            signed = found.astype(f"=u{place.size}").view(f"i{place.size}")
            return signed.astype(np.int64).view(np.uint64)
        return found.astype(np.uint64, copy=False)

    def columns(self, base: Places, places: Mapping[str, Field]) -> dict[str, U64Array]:
        """Read several places of the same records: as :meth:`column` does, but at once.

        Args:
            base: Byte offsets of records.
            places: Fields with ``is_number``.
        """
        first = min((place.offset for place in places.values()), default=0)
        size = max((place.end for place in places.values()), default=0) - first
        if len(places) < 2 or size > _MAX_RUN:
            return {name: self.column(base, place) for name, place in places.items()}
        run = np.dtype(
            {
                "names": list(places),
                "formats": [self._format(place) for place in places.values()],
                "offsets": [place.offset - first for place in places.values()],
                "itemsize": size,
            }
        )
        # One that would end behind the block is refused by its index, as in column.
        n = max(0, len(self.data) - size + 1)
        runs = np.ndarray((n,), f"V{size}", self.data.data, strides=(1,))
        found = runs[base + first].view(run)
        return {name: _extended(found[name]) for name in places}

    def _format(self, place: Field) -> str:
        return f"{self.order}{'i' if place.signed else 'u'}{place.size}"


def _extended(column: NDArray[np.integer]) -> U64Array:
    """A column of numbers of any size as 64-bit words; signed ones keep their value."""
    if column.dtype.kind == "i":
        return column.astype(np.int64).view(np.uint64)
    return column.astype(np.uint64)
