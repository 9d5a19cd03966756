"""From the old form of a batch to the new one, until all readers have moved."""

from __future__ import annotations

import numpy as np

from tdxtrace.ingest.batch import SLOTS, FieldLayouts, RecordBatch
from tdxtrace.ingest.raw import RawEvents


def as_batch(raw: RawEvents, layouts: FieldLayouts) -> RecordBatch:
    """Return what a reader gave in the old form as the new decoder takes it."""
    made = raw.settled()
    names = sorted(made.values.keys() & set(SLOTS), key=SLOTS.index)
    n = len(made)
    which = np.zeros(n, np.int64)
    for bit, name in enumerate(names):
        which |= made.present[name].astype(np.int64) << bit
    masks, inverse = np.unique(which, return_inverse=True)
    slots = [tuple(x for b, x in enumerate(names) if m >> b & 1) for m in masks.tolist()]
    numbers = np.array([layouts.intern(s) for s in slots] or [0], np.int32)
    n_words = np.array([len(s) for s in slots] or [0], np.int64)[inverse]
    first = np.cumsum(n_words) - n_words
    words = np.zeros(int(n_words.sum()), np.uint64)
    for k, mine in enumerate(slots):
        at = np.flatnonzero(inverse == k)
        for position, name in enumerate(mine):
            words[first[at] + position] = made.values[name][at]
    heads = made.line, made.ts_ns, made.tid, made.tgid, made.cpu, made.in_irq, made.event
    return RecordBatch(*heads, numbers[inverse], first, words, layouts)
