"""Tables by which loops read records: where their common fields are, and those of each event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import SLOTS, FieldLayouts, I32Array, I64Array
from tdxtrace.ingest.loops.fields import Heads
from tdxtrace.ingest.records.formats import Common, Field
from tdxtrace.ingest.records.layouts import Layout

PADDING: Final = 32
"""Bytes that must follow the last record, so that words of its common fields lie inside."""


def int64_at(data: NDArray[np.uint8]) -> I64Array:
    """Return the 64-bit number that begins at each byte: a view that needs no alignment.

    Args:
        data: Records of a little-endian machine, and PADDING bytes.
    """
    return np.ndarray((max(0, len(data) - 7),), "<i8", data.data, strides=(1,))


def heads_of(common: Common) -> Heads:
    """Say where records have their common fields; those of unusual sizes are taken as absent."""
    kind = common.type
    return (
        kind.offset,
        0xFF if kind.size == 1 else 0xFFFF,
        _offset(common.pid, 4),
        _offset(common.flags, 1),
        _offset(common.preempt_count, 1),
    )


def _offset(place: Field | None, size: int) -> int:
    return place.offset if place and place.is_number and place.size == size else -1


@dataclass(frozen=True, slots=True)
class FieldTables:
    """Where the records of each layout have their fields: arrays for ``loops.fields``."""

    first: I64Array
    """By layout, and one more: where its fields begin in the arrays of ``fields``."""
    fields: tuple[I64Array, I64Array, I64Array]
    """Offset in bytes, mask, and sign bit of each field; 0: unsigned."""
    least: I64Array
    """By layout: bytes that a record must have; -1 if its records become no rows."""
    event: I32Array
    """By layout: index into the registry's list of events."""
    slots: I32Array
    """By layout: number of its slots in FieldLayouts."""


def tables_of(layouts: Sequence[Layout], slots: FieldLayouts) -> FieldTables:
    """Make the tables of ``layouts``; add to ``slots`` what their records' words are."""
    read = [
        {s: place for s, place in layout.reads.items() if s in SLOTS} if layout.is_wanted else {}
        for layout in layouts
    ]
    places = [place for one in read for place in one.values()]
    bits = [8 * place.size for place in places]
    is_short_and_signed = [place.signed and place.size < 8 for place in places]
    return FieldTables(
        np.cumsum([0, *map(len, read)], dtype=np.int64),
        (
            np.array([place.offset for place in places], np.int64),
            np.array([-1 if n == 64 else (1 << n) - 1 for n in bits], np.int64),
            np.array(
                [x << n - 1 for x, n in zip(is_short_and_signed, bits, strict=True)], np.int64
            ),
        ),
        np.array([layout.size if layout.is_wanted else -1 for layout in layouts], np.int64),
        np.array([layout.event for layout in layouts], np.int32),
        np.array([slots.intern(tuple(one)) for one in read], np.int32),
    )
