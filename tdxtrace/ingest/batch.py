"""Columns of unpaired events: the output of every reader and the input of the decoder.

The fields of an event are consecutive 64-bit words in the order of its layout, so the bytes of
the input need not be kept and the decoder is independent of the format of records and lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.tdx.wrappers import PAGES

U64Array = NDArray[np.uint64]
I64Array = NDArray[np.int64]
I32Array = NDArray[np.int32]
I16Array = NDArray[np.int16]
I8Array = NDArray[np.int8]
BoolArray = NDArray[np.bool_]
Index = NDArray[np.intp]

# What a reader writes where the input does not say: no thread, CPU or process
# has a negative number, and the tables turn it into null.
UNKNOWN: Final = -1
ABSENT: Final = -1
MAX_CPUS: Final = 8192  # NR_CPUS may be at most 8192 on x86: Linux arch/x86/Kconfig.

SLOTS: Final = (
    *("td_id", "vp_id", "gpa", "gfn", "level", *PAGES, "status", "fn", "leaf", "version"),
    *("rcx", "rdx", "r8", "out_rcx", "out_rdx", "out_r8", "ext_err1", "ext_err2", "duration_ns"),
    *("vcpu_id", "immediate_exit", "exit_reason", "isa", "info1", "info2", "intr_info"),
    *("error_code", "rip", "requests", "reason", "errno", "signed_errno"),
    *("gfn_end", "port", "is_write", "size", "count", "value"),
)
"""The fields that events can have.  ``isa`` and ``signed_errno`` are as KVM records them:
the decoder concludes from them what KVM would print as ``exit_reason``, ``reason``, ``errno``."""


@dataclass(slots=True)
class FieldLayouts:
    """Append-only list of layouts: which fields an event has, and the order of their words.

    A layout is a tuple of slots; an event of that layout has one word for each.
    """

    slots: list[tuple[str, ...]] = field(default_factory=list)
    _number: dict[tuple[str, ...], int] = field(default_factory=dict)

    def intern(self, slots: Sequence[str]) -> int:
        """Return the number of the layout with these ``slots``, in this order."""
        key = tuple(slots)
        number = self._number.setdefault(key, len(self.slots))
        if number == len(self.slots):
            self.slots.append(key)
        return number

    def positions(self) -> I16Array:
        """By layout and by place in SLOTS: which of its words the slot is; ABSENT: none."""
        layouts = list(self.slots)
        table = np.full((max(1, len(layouts)), len(SLOTS)), ABSENT, np.int16)
        for number, slots in enumerate(layouts):
            for position, slot in enumerate(slots):
                table[number, SLOTS.index(slot)] = position
        return table

    def n_words(self) -> Index:
        """Return the number of words per event, by layout."""
        return np.array([len(slots) for slots in list(self.slots)] or [0], np.intp)


EVENT_COLUMNS: Final = {
    **{"line": np.int64, "ts_ns": np.int64, "tid": np.int32, "tgid": np.int32, "cpu": np.int32},
    **{"in_irq": np.int8, "event": np.int32, "layout": np.int32, "first_word": np.int64},
}
"""The columns of a RecordBatch that have one entry an event, in their order, and their types."""


@dataclass(slots=True)
class RecordBatch:
    """Events of one source that may become rows, one entry each, in the order of their time."""

    line: I64Array
    """Position in the source, from 1: the line or record number."""
    ts_ns: I64Array
    tid: I32Array
    tgid: I32Array
    cpu: I32Array
    in_irq: I8Array
    """1: hard interrupt context, 0: not, UNKNOWN: no flags."""
    event: I32Array
    """Index into the registry's list of events."""
    layout: I32Array
    """Number of the layout of its words."""
    first_word: I64Array
    """Place of its first word in ``words``."""
    words: U64Array
    layouts: FieldLayouts
    """The same for all batches of a source."""

    def __len__(self) -> int:
        return len(self.line)

    @classmethod
    def empty(cls, layouts: FieldLayouts) -> RecordBatch:
        """No events."""
        columns = {name: np.zeros(0, kind) for name, kind in EVENT_COLUMNS.items()}
        return cls(**columns, words=np.zeros(0, np.uint64), layouts=layouts)

    def take(self, at: Index | BoolArray) -> RecordBatch:
        """The events at ``at``, in that order; their words stay where they are."""
        columns = {name: getattr(self, name)[at] for name in EVENT_COLUMNS}
        return replace(self, **columns)

    def detached(self) -> RecordBatch:
        """The same events with copies of their words alone, in their order."""
        n_words = self.layouts.n_words().take(self.layout)
        first = np.cumsum(n_words) - n_words
        at = np.repeat(self.first_word - first, n_words) + np.arange(int(n_words.sum()))
        return replace(self, first_word=first.astype(np.int64), words=self.words[at])

    def get(self, slot: str) -> tuple[U64Array, BoolArray]:
        """Return a field's value by event, 0 where it is absent, and a mask of its presence."""
        position = self.layouts.positions()[:, SLOTS.index(slot)].take(self.layout)
        is_present = position != ABSENT
        if not is_present.any():
            return np.zeros(len(self), np.uint64), is_present
        at = np.where(is_present, self.first_word + position, 0)
        return np.where(is_present, self.words[at], np.uint64(0)), is_present


def concatenate(parts: Sequence[RecordBatch]) -> RecordBatch:
    """Concatenate one or more batches of one source, in order."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(len(part.words) for part in parts)])
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in EVENT_COLUMNS
    }
    columns["first_word"] += np.repeat(before[:-1], [len(part) for part in parts])
    words = np.concatenate([part.words for part in parts])
    return RecordBatch(**columns, words=words, layouts=parts[0].layouts)
