"""Tables by which loops read records: where their common fields are, and those of each event."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import SLOTS, FieldLayouts, I64Array
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


@dataclass(slots=True)
class FieldTables:
    """Where the records of each layout have their fields: arrays for ``loops.fields``."""

    slots: FieldLayouts = field(default_factory=FieldLayouts)
    """What the words of their records are."""
    n: int = 0
    """Layouts so far."""
    n_fields: int = 0
    layouts: I64Array = field(default_factory=lambda: np.zeros((16, 5), np.int64))
    """By layout: FIRST of its rows in ``fields`` and the one BEHIND them, the LEAST bytes that a
    record must have or -1 if its records become no rows, its EVENT in the registry's list, and
    the number of its SLOTS in FieldLayouts. There are more rows than layouts."""
    fields: I64Array = field(default_factory=lambda: np.zeros((64, 3), np.int64))
    """By field: OFFSET in bytes, MASK, and SIGN bit; 0: unsigned."""

    def add(self, layout: Layout) -> None:
        """Add a layout behind the others."""
        reads = {s: x for s, x in layout.reads.items() if s in SLOTS} if layout.is_wanted else {}
        while self.n == len(self.layouts):
            self.layouts = np.concatenate([self.layouts, np.zeros_like(self.layouts)])
        while self.n_fields + len(reads) > len(self.fields):
            self.fields = np.concatenate([self.fields, np.zeros_like(self.fields)])
        first = self.n_fields
        for place in reads.values():
            self.fields[self.n_fields] = _numbers(place)
            self.n_fields += 1
        least = layout.size if layout.is_wanted else -1
        slots = self.slots.intern(tuple(reads))
        self.layouts[self.n] = first, self.n_fields, least, layout.event, slots
        self.n += 1


def _numbers(place: Field) -> tuple[int, int, int]:
    bits = 8 * place.size
    if bits == 64:
        return place.offset, -1, 0
    return place.offset, (1 << bits) - 1, 1 << bits - 1 if place.signed else 0
