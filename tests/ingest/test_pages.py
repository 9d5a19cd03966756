"""Pages of the ring buffer: what the kernel can write on one, in any byte order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.recorder import Machine

from tdxtrace.ingest.records.formats import PageLayout, page_layout
from tdxtrace.ingest.records.gather import Block, block_of
from tdxtrace.ingest.ring.loops import Walker
from tdxtrace.ingest.ring.pages import PageEvents, page_heads, walk

MACHINES = [
    Machine(big_endian, long_size, page_size)
    for big_endian in (False, True)
    for long_size in (4, 8)
    for page_size in (4096, 65536)
]
START = 10**12


def _layout(machine: Machine) -> PageLayout:
    header = machine.header_page.decode()
    made = page_layout(header, machine.page_size, machine.long_size, machine.big_endian)
    assert made is not None
    return made


def _walk(machine: Machine, *pages: bytes) -> tuple[PageEvents, list[int]]:
    """Walk pages; return the events and the sizes of their records."""
    layout = _layout(machine)
    block = Block(block_of(b"".join(pages)), layout.order)
    heads = page_heads(block, layout, layout.size * np.arange(len(pages), dtype=np.intp))
    events = walk(block, layout, heads)
    if not machine.big_endian:
        _is_same(events, Walker().walk(block, layout, heads))
    return events, events.size.tolist()


def _is_same(events: PageEvents, compiled: PageEvents) -> None:
    assert compiled.stamp.tolist() == events.stamp.tolist()
    assert compiled.base.tolist() == events.base.tolist()
    assert compiled.size.tolist() == events.size.tolist()
    assert compiled.ends.tolist() == events.ends.tolist()
    assert compiled.damaged.tolist() == events.damaged.tolist()


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_every_kind_of_record(machine: Machine) -> None:
    m = machine
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
    events, sizes = _walk(m, m.page(START, records))
    since = [5, 6 + (1 << 40), 8 + (1 << 40), 11 + (1 << 40), 4 + (1 << 50)]
    assert (events.stamp - np.uint64(START)).tolist() == since
    assert sizes == [8, 112, 116, 12, 4]
    assert not events.damaged.any()


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_padding_at_no_time_is_the_rest_of_the_page(machine: Machine) -> None:
    records = machine.event(5, b"a" * 8) + machine.head(29, 0) + b"\x55" * 40
    events, _ = _walk(machine, machine.page(START, records))
    assert events.stamp.tolist() == [START + 5]
    assert not events.damaged.any()


@pytest.mark.parametrize("start", [1 << 59, (3 << 59) + 12345])
def test_clocks_beyond_59_bits_keep_their_high_bits(start: int) -> None:
    m = Machine()
    records = m.stamp(start + 100) + m.event(1, b"a" * 4) + m.stamp(start + (1 << 40))
    records += m.event(2, b"b" * 4)
    events, _ = _walk(m, m.page(start, records))
    assert events.stamp.tolist() == [start + 101, start + (1 << 40) + 2]


def test_a_stamp_that_wraps_goes_on_in_the_next_59_bits() -> None:
    m, start = Machine(), (1 << 59) - 10
    records = m.stamp(5) + m.event(1, b"a" * 4)
    events, _ = _walk(m, m.page(start, records))
    assert events.stamp.tolist() == [(1 << 59) + 6]


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("lost", [0, 1, 12345, None])
def test_lost_events_are_marked_on_the_page_behind_them(machine: Machine, lost: int | None) -> None:
    layout = _layout(machine)
    page = machine.page(START, machine.event(1, b"a" * 8), lost)
    heads = page_heads(Block(block_of(page), layout.order), layout, np.zeros(1, np.intp))
    assert heads.lost.tolist() == [-1 if lost is None else lost]
    assert heads.data_size.tolist() == [12]


@pytest.mark.parametrize(
    "records",
    [
        Machine().head(0, 1) + Machine().pack("I", 0),
        Machine().head(0, 1) + Machine().pack("I", 1 << 30),
        Machine().head(29, 1) + Machine().pack("I", 0),
        Machine().head(20, 1) + b"short",
    ],
    ids=["no length", "beyond", "padding of nothing", "cut"],
)
def test_a_record_that_cannot_be_ends_its_page_only(records: bytes) -> None:
    m = Machine()
    good = m.event(1, b"a" * 8)
    events, _ = _walk(m, m.page(START, good + records), m.page(START + 9, good))
    assert events.stamp.tolist() == [START + 1, START + 10]
    assert events.damaged.tolist() == [True, False]


def test_absurd_headers_are_passed_over() -> None:
    m = Machine()
    good = m.page(START, m.event(1, b"a" * 8))
    too_long = good[:8] + m.pack("Q", 4081) + good[16:]
    no_time = m.pack("Q", 1 << 63) + good[8:]
    events, _ = _walk(m, too_long, no_time, good)
    assert events.damaged.tolist() == [True, True, False]
    assert events.ends.tolist() == [0, 0, 0, 1]


_records = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.integers(0, (1 << 27) - 1), st.integers(1, 40)),
        st.tuples(st.just("long"), st.integers(0, 1000), st.integers(1, 40)),
        st.tuples(st.just("extend"), st.integers(0, 1 << 50), st.just(0)),
        st.tuples(st.just("stamp"), st.integers(0, 1 << 50), st.just(0)),
        st.tuples(st.just("padding"), st.integers(1, 1000), st.integers(1, 9)),
    ),
    max_size=30,
)


@given(st.lists(_records, min_size=1, max_size=6), st.booleans())
def test_pages_side_by_side_read_as_pages_one_by_one(
    pages: list[list[tuple[str, int, int]]], big_endian: bool
) -> None:
    m = Machine(big_endian, page_size=65536)
    written, expected = [], []
    for content in pages:
        records, now = b"", START
        for kind, number, n_words in content:
            if kind == "event":
                records, now = records + m.event(number, b"p" * 4 * n_words), now + number
                expected.append((now, 4 * n_words))
            elif kind == "long":
                records, now = records + m.long_event(number, b"p" * 4 * n_words), now + number
                expected.append((now, 4 * n_words))
            elif kind == "extend":
                records, now = records + m.extend(number), now + number
            elif kind == "stamp":
                # Time does not run backwards in a buffer.
                now = now + number
                records += m.stamp(now)
            else:
                records, now = records + m.padding(4 * n_words, number), now + number
        written.append(m.page(START, records))
    events, sizes = _walk(m, *written)
    assert list(zip(events.stamp.tolist(), sizes, strict=True)) == expected
    assert not events.damaged.any()
