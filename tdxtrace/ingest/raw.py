"""What every reader hands to the decoder: events in columns, not yet paired."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

U64Array = NDArray[np.uint64]
I64Array = NDArray[np.int64]
I32Array = NDArray[np.int32]
I8Array = NDArray[np.int8]
BoolArray = NDArray[np.bool_]

# What a reader writes where the input does not say: no thread, CPU or process
# has a negative number, and the tables turn it into null.
UNKNOWN = -1


@dataclass(slots=True)
class RawEvents:
    """Events that became, or will become, rows: one entry per line or record.

    ``values`` holds the fields that were read, by slot name (``gpa``, ``status``,
    ``vcpu_id``…) as unsigned 64-bit words; ``present`` says where each was seen.
    """

    line: I64Array
    """Position in the source, from 1: the line or record number."""
    ts_ns: I64Array
    tid: I32Array
    tgid: I32Array
    cpu: I32Array
    in_irq: I8Array
    """1: hard interrupt context, 0: not, UNKNOWN: no flags."""
    event: I32Array
    """Index into the vocabulary's list of events."""
    values: dict[str, U64Array] = field(default_factory=dict)
    present: dict[str, BoolArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.line)

    def take(self, index: NDArray[np.intp] | BoolArray) -> RawEvents:
        """The events at ``index``, in that order."""
        return RawEvents(
            self.line[index],
            self.ts_ns[index],
            self.tid[index],
            self.tgid[index],
            self.cpu[index],
            self.in_irq[index],
            self.event[index],
            {name: column[index] for name, column in self.values.items()},
            {name: column[index] for name, column in self.present.items()},
        )

    def value(self, name: str) -> U64Array:
        """The words of a field; zeros where it was never seen."""
        found = self.values.get(name)
        return np.zeros(len(self), np.uint64) if found is None else found

    def has(self, name: str) -> BoolArray:
        """Where a field was seen."""
        found = self.present.get(name)
        return np.zeros(len(self), np.bool_) if found is None else found


def concatenate(parts: list[RawEvents]) -> RawEvents:
    """Join batches in order; a field missing from one is absent there."""
    if len(parts) == 1:
        return parts[0]
    names = sorted({name for part in parts for name in part.values})
    return RawEvents(
        np.concatenate([p.line for p in parts] or [np.zeros(0, np.int64)]),
        np.concatenate([p.ts_ns for p in parts] or [np.zeros(0, np.int64)]),
        np.concatenate([p.tid for p in parts] or [np.zeros(0, np.int32)]),
        np.concatenate([p.tgid for p in parts] or [np.zeros(0, np.int32)]),
        np.concatenate([p.cpu for p in parts] or [np.zeros(0, np.int32)]),
        np.concatenate([p.in_irq for p in parts] or [np.zeros(0, np.int8)]),
        np.concatenate([p.event for p in parts] or [np.zeros(0, np.int32)]),
        {name: np.concatenate([p.value(name) for p in parts]) for name in names},
        {name: np.concatenate([p.has(name) for p in parts]) for name in names},
    )
