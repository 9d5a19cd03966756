"""Reading of record fields of any size, offset and sign."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.referee import referee

from tdxtrace.ingest.batch import SLOTS, UNKNOWN
from tdxtrace.ingest.loops import pages
from tdxtrace.ingest.records.formats import Common, Field
from tdxtrace.ingest.records.layouts import PADDING, FieldTables, Layout, common_fields_of, int64_at
from tdxtrace.ingest.tracedat.options import Shift, shifts_of

SIZE = 48
PLACE = st.tuples(st.integers(0, SIZE - 8), st.sampled_from((1, 2, 4, 8)), st.booleans())
LAYOUT = st.dictionaries(st.sampled_from(SLOTS), PLACE, max_size=9)


def _layout(reads: dict[str, tuple[int, int, bool]], kind: str = "call") -> Layout:
    places = {slot: Field(slot, *place, True) for slot, place in reads.items()}
    return Layout(3, kind, "event", places, SIZE)


def _block(data: bytes) -> np.ndarray:
    return np.frombuffer(data + bytes(PADDING), np.uint8).copy()


@given(st.lists(LAYOUT, min_size=1, max_size=20), st.data())
def test_words_are_the_numbers_of_each_layout(
    reads: list[dict[str, tuple[int, int, bool]]], data: st.DataObject
) -> None:
    tables = FieldTables()
    for one in reads:
        tables.add(_layout(one))
    start = data.draw(st.integers(0, 9))
    held = data.draw(st.binary(min_size=start + SIZE, max_size=start + SIZE))
    at, words = int64_at(_block(held)), np.zeros(SIZE, np.int64)
    for layout, one in enumerate(reads):
        first, behind, least, event, slots = tables.layouts[layout].tolist()
        n = referee(pages.read_fields)(at, start, first, behind, tables.fields, words, 2)
        assert (n, least, event) == (2 + len(one), SIZE, 3)
        assert tables.slots.slots[slots] == tuple(one)
        expected = [
            int.from_bytes(held[start + offset : start + offset + size], "little", signed=signed)
            % (1 << 64)
            for offset, size, signed in one.values()
        ]
        assert words[2:n].view(np.uint64).tolist() == expected


def test_of_noise_and_of_unknown_slots_nothing_is_read() -> None:
    tables = FieldTables()
    tables.add(_layout({"gpa": (8, 8, False)}, "noise"))
    tables.add(_layout({"no_slot": (8, 8, False), "gpa": (16, 8, False)}))
    assert tables.layouts[:2].tolist() == [[0, 0, -1, 3, 0], [0, 1, SIZE, 3, 1]]
    assert tables.slots.slots == [(), ("gpa",)]


def _common(**places: tuple[int, int]) -> Common:
    made = {name: Field(name, *place, False, True) for name, place in places.items()}
    return Common(made["type"], made.get("pid"), made.get("flags"), made.get("count"))


USUAL = {"type": (0, 2), "pid": (4, 4), "flags": (2, 1), "count": (3, 1)}


@pytest.mark.parametrize(
    ("places", "number", "context"),
    [
        (USUAL, 0x0201, (-2, 1)),
        (USUAL | {"type": (0, 1)}, 0x01, (-2, 1)),
        (USUAL | {"type": (0, 4)}, 0x0201, (-2, 1)),
        (USUAL | {"count": (8, 1)}, 0x0201, (-2, UNKNOWN)),
        (USUAL | {"flags": (9, 1), "pid": (12, 4)}, 0x0201, (0x7FFFFFFF, 0)),
        ({"type": (0, 2), "pid": (4, 2)}, 0x0201, (UNKNOWN, UNKNOWN)),
        ({"type": (0, 2), "count": (8, 1)}, 0x0201, (UNKNOWN, UNKNOWN)),
    ],
    ids=["usual", "byte", "word", "no context", "elsewhere", "no thread", "no flags"],
)
def test_common_fields_are_where_the_formats_have_them(
    places: dict[str, tuple[int, int]], number: int, context: tuple[int, int]
) -> None:
    record = bytes(
        [1, 2, 0x49, 0, 0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0x07, 0, 0, 0xFF, 0xFF, 0xFF, 0x7F]
    )
    at, heads = int64_at(_block(record)), common_fields_of(_common(**places))
    assert referee(pages.event_number)(at, 0, heads) == number
    assert referee(pages.context)(at, 0, heads) == context


@given(st.lists(st.integers(-3, 9), max_size=30))
def test_threads_with_common_numbers_are_recorded_once(tids: list[int]) -> None:
    is_known, fresh, n = np.zeros(5, np.bool_), np.zeros(30, np.int32), 0
    is_known[2] = True
    for tid in tids:
        n = referee(pages.record_thread)(tid, is_known, fresh, n)
    usual = list(dict.fromkeys(tid for tid in tids if 0 <= tid < 5 and tid != 2))
    assert [tid for tid in fresh[:n].tolist() if 0 <= tid < 5] == usual
    assert [t for t in fresh[:n].tolist() if not 0 <= t < 5] == [t for t in tids if not 0 <= t < 5]


U63 = st.integers(0, (1 << 63) - 2)
SHIFT = st.tuples(st.integers(0, 60), st.integers(-100, 100), st.integers(0, 3), st.integers(0, 70))


@given(st.lists(st.tuples(st.booleans(), st.lists(SHIFT, max_size=4)), min_size=1, max_size=3), U63)
def test_clocks_are_corrected_the_same_either_way(
    drawn: list[tuple[bool, list[tuple[int, int, int, int]]]], far: int
) -> None:
    shifts = []
    for interpolate, rows in drawn:
        sample = sorted({row[0]: row for row in rows}.values())
        columns = tuple(zip(*sample, strict=True)) if sample else ((), (), (), ())
        shifts.append(Shift(interpolate, *columns))
    made = shifts_of(shifts)
    for source, shift in enumerate(shifts):
        for stamp in (0, 7, 30, 61, far):
            given = referee(pages.corrected)(stamp, made, source)
            assert 0 <= given <= pages.MAX_TIME
            if not shift.time:
                assert given == stamp
            elif len(shift.time) == 1:
                assert given == min((stamp + shift.offset[0]) % (1 << 64), pages.MAX_TIME)
