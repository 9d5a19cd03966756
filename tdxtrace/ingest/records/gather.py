"""Bytes of records as the old decoder's loops read them, until it takes words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

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


@dataclass(slots=True, weakref_slot=True, eq=False)
class Block:
    """Bytes of a recording, as :func:`block_of` makes them, and as 64-bit words."""

    data: Bytes
    order: str
    """``<``: little-endian."""
    longs: U64Array = field(init=False)

    def __post_init__(self) -> None:
        self.longs = self.data[: len(self.data) // 8 * 8].view("<u8")
