"""Fields that are read late are those that are read at once, in any division into rounds."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from tdxtrace.ingest import raw as raw_events
from tdxtrace.ingest.decoding import frames
from tdxtrace.ingest.decoding.frames import Column, Room, frame
from tdxtrace.ingest.raw import Columns, Fields, Index, RawEvents, Values, concatenate
from tdxtrace.ingest.records.formats import Field
from tdxtrace.ingest.records.gather import Block, block_of
from tdxtrace.ingest.records.kept import KeptFields, slots_of
from tdxtrace.ingest.records.layouts import Layout
from tdxtrace.ingest.records.loops import RecordFields, table_of
from tdxtrace.tables.events import SEAMCALLS


def _layout(event: int, kind: str = "call", **places: tuple[int, int, bool]) -> Layout:
    reads = {name: Field(name, *place, True) for name, place in places.items()}
    size = max((place.end for place in reads.values()), default=0)
    return Layout(event, kind, f"event{event}", reads, size)


LAYOUTS = (
    _layout(0, gpa=(16, 8, False), level=(24, 4, True)),
    _layout(1, status=(24, 8, False)),
    _layout(2, gpa=(8, 8, False), status=(20, 8, False)),
    _layout(3, level=(26, 4, True)),
    _layout(4, "noise"),
    _layout(5, gpa=(16, 4, False), level=(8, 8, False)),
    _layout(6, gpa=(12, 4, True)),
    _layout(7, gpa=(20, 4, True), status=(7, 1, False)),
)
RECORD = 40
TABLE = table_of(LAYOUTS)


def _one_by_one(data: bytes, base: list[int], which: list[int]) -> Columns:
    names = {name for layout in LAYOUTS for name in layout.reads}
    values = {name: np.zeros(len(which), np.uint64) for name in names}
    present = {name: np.zeros(len(which), np.bool_) for name in names}
    for row, layout in enumerate(which):
        for name, place in LAYOUTS[layout].reads.items():
            at = base[row] + place.offset
            number = int.from_bytes(data[at : at + place.size], "little", signed=place.signed)
            values[name][row], present[name][row] = number % (1 << 64), True
    return Columns(len(which), values, present)


def _kept(data: bytes, which: list[int], start: int) -> tuple[KeptFields, Columns]:
    """Records of some layouts, to be read late; and read at once, one field after the other."""
    base = start + RECORD * np.arange(len(which), dtype=np.intp)
    slots = slots_of(LAYOUTS)
    assert slots is not None

    def read(_: Block, places: Index, layout: Index) -> Values:
        return _one_by_one(data, places.tolist(), layout.tolist()).settle()

    late = KeptFields(Block(block_of(data), "<"), base, np.array(which, np.intp), slots, read)
    return late, _one_by_one(data, base.tolist(), which)


def _same(late: Fields, at_once: Fields) -> None:
    assert len(late) == len(at_once)
    for name in at_once.names():
        if name not in late.names():
            assert not at_once.get(name)[1].any()
            continue
        for one, other in zip(late.get(name), at_once.get(name), strict=True):
            assert one.tolist() == other.tolist(), name


RECORDS = st.lists(st.integers(0, 7), min_size=1, max_size=8)


def _compiled(data: bytes, which: list[int], start: int) -> RecordFields:
    """The same records, to be read by a compiled loop."""
    base = start + RECORD * np.arange(len(which), dtype=np.intp)
    block = Block(block_of(data), "<")
    return RecordFields(block, block, base, np.array(which, np.intp), TABLE)


@pytest.mark.parametrize("is_compiled", [False, True])
@given(RECORDS, st.integers(0, 9), st.data())
def test_late_fields_are_those_of_each_records_layout(
    is_compiled: bool, which: list[int], start: int, data: st.DataObject
) -> None:
    size = start + RECORD * len(which)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    late: Fields
    late, at_once = _kept(raw, which, start)
    if is_compiled:
        late = _compiled(raw, which, start)
        assert late.names() == {name for layout in which for name in LAYOUTS[layout].reads}
        apart = late.pick(np.arange(len(late))).apart()
        _same(apart, at_once)
        _same(apart.apart(), at_once)
    _same(late, at_once)
    some = np.array(data.draw(st.lists(st.integers(0, len(which) - 1))), np.intp)
    _same(late.pick(some), at_once.pick(some))
    _same(late.pick(some).pick(np.zeros(len(some), np.bool_)), at_once.pick(some[:0]))


def _events(fields: Fields) -> RawEvents:
    every = np.zeros(len(fields), np.int64)
    small, tiny = every.astype(np.int32), every.astype(np.int8)
    made = RawEvents(every, every, small, small, small, tiny, small)
    if isinstance(fields, Columns):
        made.values, made.present = fields.settle()
    else:
        made.kept = fields
    return made


@given(st.lists(st.tuples(RECORDS, st.booleans()), min_size=1, max_size=4), st.data())
def test_joined_fields_are_those_of_all(
    parts: list[tuple[list[int], bool]], data: st.DataObject
) -> None:
    which = [layout for layouts, _ in parts for layout in layouts]
    is_compiled = data.draw(st.booleans())
    size = RECORD * len(which)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    _, whole = _kept(raw, which, 0)
    start, batches = 0, []
    for layouts, is_late in parts:
        late: Fields
        late, at_once = _kept(raw, layouts, start)
        if is_compiled:
            end = start + RECORD * len(layouts)
            # Nothing else is in their block.
            mine = bytes(start) + raw[start:end] + bytes(len(raw) - end)
            late = _compiled(mine, layouts, start)
            # Events of a batch before this one may have been taken out of their block.
            late = late.apart() if start == 0 and data.draw(st.booleans()) else late
        start += RECORD * len(layouts)
        batches.append(_events(late if is_late else at_once))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(raw_events, "MANY_EVENTS", 1)
        first = concatenate(batches[:2])
        joined = concatenate([first, *batches[2:]]).fields()
    _same(joined, whole)
    some = np.array(data.draw(st.lists(st.integers(0, len(which) - 1))), np.intp)
    again = np.array(data.draw(st.permutations(range(len(some)))), np.intp)
    _same(joined.pick(some), whole.pick(some))
    _same(joined.pick(some).pick(again), whole.pick(some[again]))
    _same(Columns(len(some), *joined.pick(some).settle()), whole.pick(some))


def test_fields_of_other_events_than_calls_are_not_read_late() -> None:
    assert slots_of([_layout(0, "vm_entry", vcpu_id=(8, 4, False))]) is None


def test_few_events_of_which_some_are_kept_are_read_when_they_are_joined() -> None:
    late, at_once = _kept(bytes(range(RECORD)), [2], 0)
    few = Columns(1, {"gpa": np.array([7], np.uint64)}, {"gpa": np.array([True])})
    (read,) = at_once.get("gpa")[0].tolist()
    several: list[list[Fields]] = [[few, late, few], [late, late], [late, few]]
    for parts in several:
        joined = concatenate([_events(part) for part in parts])
        assert joined.kept is None
        assert joined.value("gpa").tolist() == [7 if part is few else read for part in parts]
        assert joined.has("status").tolist() == [part is late for part in parts]


NUMBERS = st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=9)


@given(NUMBERS, st.integers(0, 3))
def test_rows_kept_are_the_rows(numbers: list[int], n_before: int) -> None:
    place = np.array(numbers, np.int64)
    columns: dict[str, Column] = {
        "source": 3,
        "seq": place.view(np.uint64),
        "start_ns": place,
        "cpu": place,
        "tid": place,
        "leaf": place & 0xFFFF,
        "level": place.view(np.uint64),
        "probe": (place & 1).astype(np.int8),
        "n_lines": 2,
    }
    seen = {"tid": place % 2 == 0, "start_ns": place > 0}
    room = Room()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(frames, "_ROOM_ROWS", 1)
        for _ in range(n_before):
            frame(SEAMCALLS, len(place), columns, seen, room=room)
        kept = frame(SEAMCALLS, len(place), columns, seen, room=room)
        frame(SEAMCALLS, len(place), columns | {"seq": place.view(np.uint64) + 1}, seen, room=room)
    assert_frame_equal(kept, frame(SEAMCALLS, len(place), columns, seen))
    expected = [n if 0 <= n < 1 << 16 else None for n in numbers]
    assert kept["cpu"].to_list() == expected
    assert kept["tid"].to_list() == [
        n if n % 2 == 0 and -(1 << 31) <= n < 1 << 31 else None for n in numbers
    ]
    assert kept["gpa"].null_count() == kept.height
    assert kept["probe"].to_list() == [("wrapper", "seamcall")[n & 1] for n in numbers]
    assert kept["n_lines"].to_list() == [2] * kept.height
    assert kept.schema == pl.Schema(SEAMCALLS.schema)


def test_numbers_at_any_byte_of_any_order_are_read_as_python_does() -> None:
    data = bytes((7 * i) % 256 for i in range(96))
    for order, named in (("<", "little"), (">", "big")):
        block = Block(block_of(data), order)
        for size in (1, 2, 4, 8):
            for signed in (False, True):
                for first in (*range(9), 64):
                    base = np.array([first, first + 8, first + 4 * (first % 3)], np.intp)
                    for offset in range(9):
                        place = Field("x", offset, size, signed, True)
                        expected = [
                            int.from_bytes(data[a : a + size], named, signed=signed) % (1 << 64)  # type: ignore[arg-type]
                            for a in (base + offset).tolist()
                        ]
                        assert block.column(base, place).tolist() == expected
