"""Compiled loops over the events of all CPUs: which there are, what heads them by time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxtrace.ingest.compiled import compiled
from tdxtrace.ingest.memory import roomy
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, I8Array, I32Array, I64Array, U64Array
from tdxtrace.ingest.records.formats import Common
from tdxtrace.ingest.records.gather import Places
from tdxtrace.ingest.records.known import ByLayout
from tdxtrace.ingest.records.loops import met
from tdxtrace.ingest.ring.rounds import Round

_NUMBERS: Final = 1 << 16  # common_type has 16 bits: struct trace_entry
# As in known.py, from enum trace_flag_type, Linux include/linux/trace_events.h.
_IN_IRQ: Final = 0x08 | 0x40
_NO_CONTEXT: Final = np.uint64(0xFF)

_Events = tuple[U64Array, Places, Places, U64Array]
"""Stamp, place, size and first eight bytes of each record of some pages."""
_Runs = tuple[Places, I32Array]
"""How much further back those of each CPU are than in the round, and which CPU that is."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """Events of a round that become rows, by time; those of one moment by CPU, then by place."""

    line: I64Array
    """Place among all events, of which others are not here."""
    stamp: U64Array
    base: Places
    index: Places
    """Of each record's layout."""
    cpu: I32Array
    tid: I32Array
    in_irq: I8Array
    event: I32Array
    """Index into the vocabulary's events."""
    fresh: I32Array
    """Threads that were not met before; those of unusual numbers may come again."""
    layouts: Places
    """Those that occur."""
    fits: bool
    """False if a record is too short for the fields of its layout: reading ended there."""


def are_usual(common: Common) -> bool:
    """Whether the common fields are where they are in every kernel so far."""
    places = common.type, common.pid, common.flags, common.preempt_count
    found = [(place.offset, place.size) for place in places if place and place.is_number]
    return found == [(0, 2), (4, 4), (2, 1), (3, 1)]


def count(made: Round) -> Places:
    """How often each event number occurs."""
    assert made.events.head is not None
    counts = np.zeros(_NUMBERS, np.intp)
    return counts[: _count(made.events.head, made.starts, made.stops, counts) + 1]


def ordered(made: Round, n: int, n_before: int, known: ByLayout, is_met: BoolArray) -> Ordered:
    """Put the events that become rows in order and read what heads their records.

    Args:
        made: Of which all numbers are known.
        n: Events that become rows.
        n_before: Events before this round.
        known: Of their numbers.
        is_met: By thread number, up to some: whether it was met; set for those that are.
    """
    events, n_of = made.events, made.stops - made.starts
    assert events.head is not None
    when = roomy(n, np.int64), roomy(n, np.uint64)
    places = roomy(n, np.intp), roomy(n, np.intp)
    cpu, event = roomy(n, np.int32), roomy(n, np.int32)
    tid, in_irq, fresh = roomy(n, np.int32), roomy(n, np.int8), np.empty(n, np.int32)
    layouts = np.zeros(len(known.size), np.intp)
    n_fresh = _order(
        (events.stamp, events.base, events.size, events.head),
        (made.starts - (np.cumsum(n_of) - n_of), made.cpus),
        (made.order(), np.repeat(np.arange(len(n_of), dtype=np.int32), n_of)),
        n_before,
        (known.index, known.size, known.event, known.is_wanted),
        is_met,
        (*when, *places, cpu, tid, in_irq, event, fresh),
        layouts,
    )
    fresh = fresh[: max(n_fresh, ~n_fresh)]
    heads = *when, *places, cpu, tid, in_irq, event
    return Ordered(*heads, fresh, np.flatnonzero(layouts), fits=n_fresh >= 0)


@compiled
def _count(head: U64Array, starts: Places, stops: Places, counts: Places) -> int:
    """Count the numbers; return the greatest."""
    greatest = np.uint64(0)
    for run in range(len(starts)):
        for i in range(starts[run], stops[run]):
            number = head[np.uint64(i)] & np.uint64(0xFFFF)
            counts[number] += 1
            greatest = max(greatest, number)
    return int(greatest)


@compiled
def _order(
    events: _Events,
    runs: _Runs,
    order: tuple[Places, I32Array],
    n_before: int,
    known: tuple[Places, Places, I32Array, BoolArray],
    is_met: BoolArray,
    into: tuple[
        I64Array, U64Array, Places, Places, I32Array, I32Array, I8Array, I32Array, I32Array
    ],
    layouts: Places,
) -> int:
    """Write what heads records; return the number of new threads, ~it if a record is too short."""
    stamp, base, size, head = events
    shift, cpus = runs
    by_time, run_of = order
    index_of, least, event_of, is_wanted = known
    line, new_stamp, new_base, index, cpu, tid, in_irq, event, fresh = into
    n_fresh, k = 0, np.uint64(0)
    for rank in range(len(by_time)):
        # Unsigned, so that no place is looked up from the end.
        place = np.uint64(by_time[rank])
        run = np.uint64(run_of[place])
        i = np.uint64(by_time[rank] + shift[run])
        word = head[i]
        layout = np.uint64(index_of[word & np.uint64(0xFFFF)])
        if not is_wanted[layout]:
            continue
        if size[i] < least[layout]:
            return ~n_fresh
        layouts[layout] = 1
        thread = np.int32(word >> np.uint64(32))
        line[k], new_stamp[k] = n_before + rank + 1, stamp[i]
        new_base[k], index[k] = base[i], layout
        cpu[k], tid[k], event[k] = cpus[run], thread, event_of[layout]
        context = 1 if word >> np.uint64(16) & np.uint64(_IN_IRQ) else 0
        in_irq[k] = UNKNOWN if word >> np.uint64(24) & np.uint64(0xFF) == _NO_CONTEXT else context
        k += np.uint64(1)
        n_fresh = met(thread, is_met, fresh, n_fresh)
    return n_fresh
