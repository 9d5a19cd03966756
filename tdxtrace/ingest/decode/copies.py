"""Events that the kernel wrote to several buffers: instances that record the same."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tdxtrace.compiler import Runner
from tdxtrace.ingest.batch import BoolArray, I32Array, I64Array, RecordBatch, U64Array
from tdxtrace.ingest.decode.events import number_threads

# One event is written to one buffer after the other, by the same CPU, in less than a microsecond;
# text rounds stamps to one.  A choice.
COPY_NS: Final = 2_000
# Share of an event's records that come in pairs from which on each pair is one event.  A choice: if
# two buffers record an event, all but what either of them lost do, and none if one does.
_MOST: Final = 0.9
_ODD: Final = np.uint64(0xFF51_AFD7_ED55_8CCD)


def end_of_group(batch: RecordBatch) -> int:
    """Return the place after the last event that no copy of may still come."""
    apart = np.flatnonzero(np.diff(batch.ts_ns) > COPY_NS)
    return int(apart[-1]) + 1 if len(apart) else 0


def drop_copies(batch: RecordBatch, n_buffers: int, run: Runner[Any]) -> RecordBatch:
    """Return the events without copies in further buffers.

    A copy follows the event in its thread with nothing in between, on the same CPU, in the same
    context and with the same fields, within ``COPY_NS``.  Two calls are never that near: the return
    of the first is between their entries.  Of an event that only some of the buffers record, nearly
    none looks so, and then all are kept.

    Args:
        batch: Events of a source, in the order of time.
        n_buffers: Buffers of the recording: the most copies of an event.
        run: How to run loops.
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
    place = np.arange(len(order)) - first[group]
    n_copies = _copies(batch.event[order[first]], length, n_buffers)
    kept = np.empty(len(order), np.bool_)
    kept[order] = place % n_copies[batch.event[order]] == 0
    return batch if kept.all() else batch.take(kept)


def _copies(event: I32Array, length: I64Array, n_buffers: int) -> I64Array:
    """Return the number of buffers that record each event, from its runs of equal records."""
    n_events = int(event.max()) + 1
    total = np.bincount(event, length, n_events)
    found = np.ones(n_events, np.int64)
    for n in range(2, n_buffers + 1):
        whole: BoolArray = length == n
        found[
            np.bincount(event[whole], length[whole], n_events) >= np.maximum(1, _MOST * total)
        ] = n
    return found


def _digest(batch: RecordBatch) -> U64Array:
    """A number of each event's fields, equal for equal ones."""
    n_words = batch.layouts.n_words().take(batch.layout)
    digest = batch.layout.astype(np.uint64)
    for place in range(int(n_words.max(initial=0))):
        has = np.flatnonzero(n_words > place)
        digest[has] = (digest[has] ^ batch.words[batch.first_word[has] + place]) * _ODD
        digest[has] ^= digest[has] >> np.uint64(33)
    return digest
