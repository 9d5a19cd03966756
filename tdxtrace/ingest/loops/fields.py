"""What a record of the kernel says: its event, the thread that made it, its fields as words.

Bytes come as ``int64_at``: the 64-bit number that begins at each byte (records.layouts.int64_at).
A number of fewer bytes is the lowest part of such a word: little-endian machines only.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.ingest.batch import BoolArray, I32Array, I64Array

Heads = tuple[int, int, int, int, int]
"""Where records have their common fields, in bytes: that of the event's number and its mask,
the thread's number, the flags, the preempt count; -1 for those that they lack."""

# Columns of the table of layouts, and of that of their fields: see records.layouts.FieldTables.
FIRST, BEHIND, LEAST, EVENT, SLOTS = range(5)
OFFSET, MASK, SIGN = range(3)

# enum trace_flag_type, Linux include/linux/trace_events.h: HARDIRQ and NMI.
_IN_IRQ: Final = 0x08 | 0x40
_NO_CONTEXT: Final = 0xFF  # preempt count of uprobe events: it tells nothing
_LOW: Final = 0xFFFF_FFFF
_SIGN: Final = 1 << 31
_UNKNOWN: Final = -1


def event_number(int64_at: I64Array, record: int, heads: Heads) -> int:
    """The number of the event that the record at byte ``record`` is of."""
    return int(int64_at[record + heads[0]]) & heads[1]


def context(int64_at: I64Array, record: int, heads: Heads) -> tuple[int, int]:
    """The thread that made a record, and 1 if in hard interrupt context, 0 if not; -1: unknown."""
    tid, in_irq = _UNKNOWN, _UNKNOWN
    if heads[2] >= 0:
        tid = ((int(int64_at[record + heads[2]]) & _LOW) ^ _SIGN) - _SIGN
    if heads[3] >= 0:
        in_irq = 1 if int(int64_at[record + heads[3]]) & _IN_IRQ else 0
        if heads[4] >= 0 and int(int64_at[record + heads[4]]) & 0xFF == _NO_CONTEXT:
            in_irq = _UNKNOWN
    return tid, in_irq


def read_fields(
    int64_at: I64Array,
    record: int,
    first: int,
    end: int,
    fields: I64Array,
    words: I64Array,
    n_words: int,
) -> int:
    """Write a record's fields behind the first ``n_words`` of ``words``; return how many then.

    Args:
        int64_at: The number at each byte.
        record: The byte at which the record begins.
        first: Row in ``fields`` of the first one that its layout has …
        end: … and behind the last.
        fields: By field: OFFSET in bytes, MASK, and SIGN bit; 0: unsigned.
        words: Filled; with room for them.
        n_words: Words before these.
    """
    for field in range(first, end):
        word = int64_at[record + fields[field, OFFSET]] & fields[field, MASK]
        sign = fields[field, SIGN]
        words[n_words] = (word ^ sign) - sign
        n_words += 1
    return n_words


def record_thread(tid: int, is_known: BoolArray, fresh: I32Array, n_fresh: int) -> int:
    """Put a thread behind the first ``n_fresh`` of ``fresh`` unless known; return how many then.

    ``is_known`` says it of threads by their numbers, up to some: others come again and again.
    """
    if 0 <= tid < len(is_known):
        if is_known[tid]:
            return n_fresh
        is_known[tid] = True
    fresh[n_fresh] = tid
    return n_fresh + 1
