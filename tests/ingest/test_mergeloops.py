"""Compiled loops put the events of all CPUs in the order that sorting them gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.ingest.raw import UNKNOWN
from tdxtrace.ingest.records.gather import Block, block_of
from tdxtrace.ingest.records.known import ByLayout
from tdxtrace.ingest.ring.mergeloops import count, ordered
from tdxtrace.ingest.ring.pages import PageEvents
from tdxtrace.ingest.ring.rounds import Round

NUMBERS = {1: True, 2: False, 300: True}
LEAST = 8
EVENT = st.tuples(
    st.integers(-1, 3),  # time since the one before: damage may make it go back
    st.sampled_from(tuple(NUMBERS)),
    st.sampled_from((0, 1, 7, 90, -3)),  # thread
    st.sampled_from((0, 0x08, 0x40, 0x01)),  # flags
    st.sampled_from((0, 1, 0xFF)),  # preempt count
)
CPU = st.tuples(
    st.lists(EVENT, max_size=12),
    st.integers(0, 2),  # events before the round
    st.integers(0, 2),  # and after it
)
Cpu = tuple[list[tuple[int, int, int, int, int]], int, int]


def _round(cpus: list[Cpu]) -> Round:
    stamp: list[int] = []
    head: list[int] = []
    starts: list[int] = []
    stops: list[int] = []
    for events, n_before, n_after in cpus:
        starts.append(min(len(stamp) + n_before, len(stamp) + len(events)))
        stops.append(max(starts[-1], len(stamp) + len(events) - n_after))
        stamp += (12 + np.cumsum([event[0] for event in events], dtype=int)).tolist()
        head += [
            number | flags << 16 | preempted << 24 | (tid & 0xFFFFFFFF) << 32
            for _, number, tid, flags, preempted in events
        ]
    n = len(stamp)
    made = PageEvents(
        np.array(stamp, np.uint64),
        100 + np.arange(n, dtype=np.intp),
        np.full(n, LEAST, np.intp),
        np.zeros(1, np.intp),
        np.zeros(0, np.bool_),
        np.array(head, np.uint64),
    )
    numbers = 10 + np.arange(len(cpus), dtype=np.int32)
    of = np.array(starts, np.intp), np.array(stops, np.intp)
    return Round(Block(block_of(b""), "<"), made, numbers, *of)


def _known() -> ByLayout:
    index = np.full(1 << 16, -1, np.intp)
    index[list(NUMBERS)] = np.arange(len(NUMBERS))
    wanted = np.array(list(NUMBERS.values()))
    return ByLayout(index, np.full(3, LEAST, np.intp), np.arange(50, 53, dtype=np.int32), wanted)


@given(st.lists(CPU, min_size=1, max_size=9), st.integers(0, 5))
def test_events_of_all_cpus_come_in_their_order(cpus: list[Cpu], n_before: int) -> None:
    made, known = _round(cpus), _known()
    order, runs = made.order(), list(zip(made.starts.tolist(), made.stops.tolist(), strict=True))
    assert made.events.head is not None
    head = np.concatenate([made.events.head[a:b] for a, b in runs])[order]
    number = (head & np.uint64(0xFFFF)).astype(np.intp)
    found = count(made)
    assert found[found > 0].tolist() == np.unique(number, return_counts=True)[1].tolist()
    wanted = known.is_wanted[known.index[number]]
    mine = order[wanted]
    is_met = np.zeros(64, np.bool_)
    is_met[7] = True
    given = ordered(made, len(mine), n_before, known, is_met)
    assert given.fits
    assert given.line.tolist() == (np.flatnonzero(wanted) + 1 + n_before).tolist()
    assert given.stamp.tolist() == made.stamp()[mine].tolist()
    assert given.base.tolist() == made.base()[mine].tolist()
    assert given.cpu.tolist() == made.cpu()[mine].tolist()
    assert given.index.tolist() == known.index[number][wanted].tolist()
    assert given.event.tolist() == (50 + given.index).tolist()
    assert given.layouts.tolist() == np.unique(given.index).tolist()
    tid = (head >> np.uint64(32)).astype(np.uint32).view(np.int32)[wanted]
    assert given.tid.tolist() == tid.tolist()
    assert set(given.fresh.tolist()) == set(tid.tolist()) - {7}
    flags, preempted = head >> np.uint64(16) & np.uint64(0xFF), head >> np.uint64(24)
    is_irq = np.where(flags & np.uint64(0x48), 1, 0)
    in_irq = np.where(preempted & np.uint64(0xFF) == np.uint64(0xFF), UNKNOWN, is_irq)
    assert given.in_irq.tolist() == in_irq[wanted].tolist()


@pytest.mark.parametrize("too_short", [0, 2])
def test_reading_ends_at_a_record_that_is_too_short(too_short: int) -> None:
    made = _round([([(1, 1, 7 + n, 0, 0) for n in range(3)], 0, 0)])
    made.events.size[too_short] = LEAST - 1
    given = ordered(made, 3, 0, _known(), np.zeros(64, np.bool_))
    assert not given.fits
    assert given.fresh.tolist() == [7, 8, 9][:too_short]
