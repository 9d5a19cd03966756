"""Remove duplicates of events that the kernel wrote to the buffers of several trace instances."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tdxtrace.compiler import Runner
from tdxtrace.ingest.batch import BoolArray, I32Array, I64Array, RecordBatch, U64Array
from tdxtrace.ingest.decode.events import number_threads

# The same CPU writes an event to all buffers in less than a microsecond; text rounds timestamps to
# one.  A choice.
COPY_NS: Final = 2_000
# Least share of an event's records that must come in groups of equal records for a group to count
# as one event.  A choice: if two buffers record an event, all its records come in pairs except
# those whose copy was lost; if only one does, none.
_MIN_COPIED_SHARE: Final = 0.9
_MULTIPLIER: Final = np.uint64(0xFF51_AFD7_ED55_8CCD)


def end_of_group(batch: RecordBatch) -> int:
    """Return the index after the last event that cannot have a copy in later batches."""
    gaps = np.flatnonzero(np.diff(batch.ts_ns) > COPY_NS)
    return int(gaps[-1]) + 1 if len(gaps) else 0


def drop_copies(batch: RecordBatch, n_buffers: int, run: Runner[Any]) -> RecordBatch:
    """Return the events without the copies from further buffers.

    A copy directly follows the event in its thread, on the same CPU, in the same context and with
    the same fields, within ``COPY_NS``.  Two calls never look like that: the return of the first
    lies between their entries.  If only one buffer records an event, hardly any of its records
    look like copies, and all are kept.

    Args:
        batch: Events of a source, in time order.
        n_buffers: Number of buffers of the recording, and so the most records of an event.
        run: Runs loops, interpreted or compiled.
    """
    if len(batch) < 2:
        return batch
    number, _ = number_threads(batch.tid, run)
    order = np.argsort(number, kind="stable")
    starts = np.ones(len(order), np.bool_)
    same = np.diff(batch.ts_ns[order]) <= COPY_NS
    for column in (number, batch.cpu, batch.in_irq, batch.event, _digest(batch)):
        same &= column[order][1:] == column[order][:-1]
    starts[1:] = ~same
    first = np.flatnonzero(starts)
    length = np.diff(np.append(first, len(order)))
    group = np.cumsum(starts) - 1
    index_in_group = np.arange(len(order)) - first[group]
    n_copies = _copies(batch.event[order[first]], length, n_buffers)
    is_kept = np.empty(len(order), np.bool_)
    is_kept[order] = index_in_group % n_copies[batch.event[order]] == 0
    return batch if is_kept.all() else batch.take(is_kept)


def _copies(event: I32Array, length: I64Array, n_buffers: int) -> I64Array:
    """Return the number of buffers that record each event, by event ID.

    Args:
        event: Event ID of each run of equal records.
        length: Length of each run.
        n_buffers: Number of buffers of the recording.
    """
    n_events = int(event.max()) + 1
    total = np.bincount(event, length, n_events)
    n_copies = np.ones(n_events, np.int64)
    for n in range(2, n_buffers + 1):
        is_full: BoolArray = length == n
        n_copies[
            np.bincount(event[is_full], length[is_full], n_events)
            >= np.maximum(1, _MIN_COPIED_SHARE * total)
        ] = n
    return n_copies


def _digest(batch: RecordBatch) -> U64Array:
    """Return a hash of each event's fields."""
    n_words = batch.layouts.n_words().take(batch.layout)
    digest = batch.layout.astype(np.uint64)
    for index in range(int(n_words.max(initial=0))):
        has_word = np.flatnonzero(n_words > index)
        digest[has_word] = (
            digest[has_word] ^ batch.words[batch.first_word[has_word] + index]
        ) * _MULTIPLIER
        digest[has_word] ^= digest[has_word] >> np.uint64(33)
    return digest
