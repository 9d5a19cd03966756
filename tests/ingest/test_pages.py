"""Ring-buffer pages: all records that the kernel writes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.recorder import Machine
from support.referee import referee

from tdxtrace.ingest.loops import pages
from tdxtrace.ingest.loops.pages import next_event, page_start
from tdxtrace.ingest.records.formats import page_layout
from tdxtrace.ingest.records.layouts import PADDING, int64_at
from tdxtrace.ingest.tracedat.options import shifts_of

START = 10**12
SIZES = (4096, 65536)


class Event(NamedTuple):
    """What was found of an event."""

    time: int
    record: bytes


def _shape(machine: Machine) -> pages.PageShape:
    layout = page_layout(machine.header_page.decode(), machine.page_size)
    assert layout is not None
    return layout.size, layout.data, layout.commit


def _block(data: bytes) -> np.ndarray:
    return np.frombuffer(data + bytes(PADDING), np.uint8).copy()


def _walk(machine: Machine, *written: bytes) -> tuple[list[Event], int]:
    """Walk pages of one CPU; return the events and the number of damaged pages."""
    block = _block(b"".join(written))
    sources = np.zeros((1, pages.N_COLUMNS), np.int64)
    sources[0, pages.PAGES_END] = machine.page_size * len(written)
    shape, shifts, found = _shape(machine), shifts_of([None]), []
    while referee(next_event)(int64_at(block), shape, shifts, sources, 0):
        time, at, n = sources[0, [pages.TIME, pages.RECORD, pages.SIZE]].tolist()
        found.append(Event(time, block[at : at + n].tobytes()))
    return found, int(sources[0, pages.N_DAMAGED])


def _times(events: list[Event]) -> list[int]:
    return [event.time for event in events]


@pytest.mark.parametrize("page_size", SIZES)
def test_every_kind_of_record(page_size: int) -> None:
    m = Machine(page_size=page_size)
    records = (
        m.event(5, b"a" * 8)
        + m.extend(1 << 40)
        + m.event(1, b"b" * 112)
        + m.event(2, b"c" * 116)
        + m.long_event(3, b"d" * 12)
        + m.padding(24, 7)
        + m.stamp(START + (1 << 50))
        + m.event(4, b"e" * 4)
    )
    events, n_damaged = _walk(m, m.page(START, records))
    since = [5, 6 + (1 << 40), 8 + (1 << 40), 11 + (1 << 40), 4 + (1 << 50)]
    assert [event.time - START for event in events] == since
    content = [b"a" * 8, b"b" * 112, b"c" * 116, b"d" * 12, b"e" * 4]
    assert [event.record for event in events] == content
    assert not n_damaged


def test_padding_at_no_time_is_the_rest_of_the_page() -> None:
    m = Machine()
    records = m.event(5, b"a" * 8) + m.head(29, 0) + b"\x55" * 40
    assert _walk(m, m.page(START, records)) == ([Event(START + 5, b"a" * 8)], 0)


@pytest.mark.parametrize("start", [1 << 59, (3 << 59) + 12345])
def test_clocks_beyond_59_bits_keep_their_high_bits(start: int) -> None:
    m = Machine()
    records = m.stamp(start + 100) + m.event(1, b"a" * 4) + m.stamp(start + (1 << 40))
    records += m.event(2, b"b" * 4)
    events, _ = _walk(m, m.page(start, records))
    assert _times(events) == [start + 101, start + (1 << 40) + 2]


def test_a_stamp_that_wraps_goes_on_in_the_next_59_bits() -> None:
    m, start = Machine(), (1 << 59) - 10
    events, _ = _walk(m, m.page(start, m.stamp(5) + m.event(1, b"a" * 4)))
    assert _times(events) == [(1 << 59) + 6]


def test_times_that_no_clock_reaches_stay_at_the_last_one() -> None:
    m, start = Machine(), pages.MAX_TIME - 10
    records = m.event(5, b"a" * 4) + m.event(9, b"b" * 4) + m.extend(1 << 58) + m.event(1, b"c" * 4)
    events, _ = _walk(m, m.page(start, records + m.stamp(7) + m.event(1, b"d" * 4)))
    assert _times(events) == [start + 5, pages.MAX_TIME, pages.MAX_TIME, pages.MAX_TIME]


@pytest.mark.parametrize("page_size", SIZES)
@pytest.mark.parametrize("lost", [0, 1, 12345, None])
def test_lost_events_are_marked_on_the_page_behind_them(lost: int | None, page_size: int) -> None:
    m = Machine(page_size=page_size)
    block = _block(m.page(START, m.event(1, b"a" * 8), lost))
    expected = START, 12, -1 if lost is None else lost
    assert referee(page_start)(int64_at(block), 0, _shape(m)) == expected


@pytest.mark.parametrize(
    "records",
    [
        Machine().head(0, 1) + Machine().pack("I", 0),
        Machine().head(0, 1) + Machine().pack("I", 1 << 30),
        Machine().head(29, 1) + Machine().pack("I", 0),
        Machine().head(20, 1) + b"short",
        Machine().head(0, 1) + Machine().pack("I", 9) + bytes(4),
        Machine().head(30, 1),
    ],
    ids=["no length", "beyond", "padding of nothing", "cut", "a word too long", "half an extend"],
)
def test_a_record_that_cannot_be_ends_its_page_only(records: bytes) -> None:
    m = Machine()
    good = m.event(1, b"a" * 8)
    events, n_damaged = _walk(m, m.page(START, good + records), m.page(START + 9, good))
    assert _times(events) == [START + 1, START + 10]
    assert n_damaged == 1


def test_absurd_headers_are_passed_over() -> None:
    m = Machine()
    good = m.page(START, m.event(1, b"a" * 8))
    too_long = good[:8] + m.pack("Q", 4081) + good[16:]
    no_time = m.pack("Q", 1 << 63) + good[8:]
    assert _walk(m, too_long, no_time, good) == ([Event(START + 1, b"a" * 8)], 2)


_records = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.integers(0, (1 << 27) - 1), st.integers(1, 40)),
        st.tuples(st.just("long"), st.integers(0, 1000), st.integers(0, 40)),
        st.tuples(st.just("extend"), st.integers(0, 1 << 50), st.just(0)),
        st.tuples(st.just("stamp"), st.integers(0, 1 << 50), st.just(0)),
        st.tuples(st.just("padding"), st.integers(1, 1000), st.integers(1, 9)),
    ),
    max_size=30,
)


@given(st.lists(_records, min_size=1, max_size=6))
def test_pages_are_read_one_after_the_other(
    written_records: list[list[tuple[str, int, int]]],
) -> None:
    m = Machine(page_size=65536)
    written, expected = [], []
    for content in written_records:
        records, now = b"", START
        for kind, number, n_words in content:
            payload = b"p" * 4 * n_words
            # Time does not run backwards in a buffer.
            now += number
            if kind == "event":
                records += m.event(number, payload)
                expected.append(Event(now, payload))
            elif kind == "long":
                records += m.long_event(number, payload)
                expected.append(Event(now, payload))
            elif kind == "extend":
                records += m.extend(number)
            elif kind == "stamp":
                records += m.stamp(now)
            else:
                records += m.padding(4 * n_words, number)
        written.append(m.page(START, records))
    assert _walk(m, *written) == (expected, 0)
