"""From events to rows, against a simple implementation of the rules, for any batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support.referee import referee

from tdxtrace.compiler import Runner, interpreted
from tdxtrace.ingest.batch import SLOTS, FieldLayouts, RecordBatch
from tdxtrace.ingest.decode import decoder
from tdxtrace.ingest.decode.decoder import Decoder, LevelBaseDetector, MemorySink, SourceSink
from tdxtrace.ingest.decode.events import Column, frame
from tdxtrace.ingest.decode.implied_losses import LossDetector, spans_of
from tdxtrace.ingest.events.registry import Event
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tdx.wrappers import PAGES

PAIRS = {
    "aug": ("tdh_mem_page_aug", 6, "wrapper"),
    "enter": ("tdh_vp_enter", 0, "vcpu_run"),
    "seamcall": ("__seamcall", None, "seamcall"),
    "tracepoint": ("op", None, "tracepoint"),
}
EVENTS = [
    *(
        Event(f"{name} {role}", "call", role, function, leaf, probe)
        for name, (function, leaf, probe) in PAIRS.items()
        for role in ("entry", "return")
    ),
    Event("graph", "call", "return", "tdh_mem_track;", 38, "function_graph"),
    Event("kvm:kvm_entry", "vm_entry", "entry", "vm"),
    Event("kvm:kvm_exit", "vm_entry", "return", "vm"),
    Event("kvm:kvm_page_fault", "page_fault"),
    Event("kvm:kvm_userspace_exit", "host_event"),
    Event("sched:sched_switch", "noise"),
]
NUMBER = {event.name: at for at, event in enumerate(EVENTS)}
ENTER, RELOCATE, AUG, TRACK, PAMT_ADD = 0, 5, 6, 38, 58
# The registers of some leaves; those of all leaves are in tdx/data.
REGISTERS = {
    ENTER: {"rcx": "vp_id"},
    RELOCATE: {"rcx": "gpa", "rdx": "td_id", "r8": "page"},
    AUG: {"rcx": "gpa level", "rdx": "td_id", "r8": "page"},
    TRACK: {"rcx": "td_id"},
    PAMT_ADD: {"rcx": "page level", "rdx": "page_2", "r8": "page_3"},
}


@dataclass(frozen=True)
class DrawnEvent:
    """One event."""

    name: str
    tid: int = 7
    slots: dict[str, int] = field(default_factory=dict)
    ts_ns: int = 0
    cpu: int = 0
    in_irq: int = -1
    tgid: int = -1


def batch_of(
    events: Sequence[DrawnEvent], first: int = 1, layouts: FieldLayouts | None = None
) -> RecordBatch:
    """Put events into columns; the words are padded, and not in the order of the events."""
    layouts = FieldLayouts() if layouts is None else layouts
    words, places = [7], {}
    for at in reversed(range(len(events))):
        places[at] = len(words)
        words += [*events[at].slots.values(), 9]
    tid, tgid, cpu = (
        np.array([getattr(e, name) for e in events], np.int32) for name in ("tid", "tgid", "cpu")
    )
    return RecordBatch(
        first + np.arange(len(events)),
        np.array([e.ts_ns for e in events], np.int64),
        tid,
        tgid,
        cpu,
        np.array([e.in_irq for e in events], np.int8),
        np.array([NUMBER[e.name] for e in events], np.int32),
        np.array([layouts.intern(tuple(e.slots)) for e in events], np.int32),
        np.array([places[at] for at in range(len(events))], np.int64),
        np.array(words, np.uint64),
        layouts,
    )


@dataclass
class Decoded:
    """What a decoder made: tables by name, and lines that are in none by kind."""

    tables: dict[str, pl.DataFrame]
    losses: dict[tuple[str, str], int]

    def sorted(self) -> dict[str, pl.DataFrame]:
        return {name: rows.sort(rows.columns[:2]) for name, rows in self.tables.items()}


def decoded(parts: Sequence[Sequence[DrawnEvent]], run: Runner[Any] = interpreted) -> Decoded:
    """Decode batches of events."""
    sink, stats, layouts = MemorySink(), SourceStats(), FieldLayouts()
    target = SourceSink(sink, LevelBaseDetector(), LossDetector(run))
    made, first = Decoder(3, EVENTS, stats, target, run), 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoder, "BATCH_EVENTS", 1)
        for part in parts:
            made.feed(batch_of(part, first, layouts))
            first += len(part)
        made.finish()
    target.losses.unpaired()
    target.losses.start.has_started_midway(target.losses.has_entries)
    return Decoded(sink.result(), {key: entry.n_lines for key, entry in stats.entries.items()})


def calls_of(*events: DrawnEvent) -> list[dict[str, Any]]:
    """The ``seamcalls`` rows of events, without what is null."""
    rows = decoded([events], referee).tables["seamcalls"].to_dicts()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


# One row, as a plain reading of the rules says.


def expected_row(entry: DrawnEvent | None, back: DrawnEvent | None) -> dict[str, Any] | None:
    """What a call must be; None where it names no leaf, or is P-SEAMLDR's."""
    ends = [event for event in (entry, back) if event is not None]
    slots = {**(back.slots if back else {}), **(entry.slots if entry else {})}
    event = EVENTS[NUMBER[ends[-1].name]]
    leaf, version = event.leaf, None
    if "fn" in slots:
        leaf, version = slots["fn"] & 0xFFFF, slots["fn"] >> 16 & 0xFF
    leaf, version = slots.get("leaf", leaf), slots.get("version", version)
    if leaf is None or slots.get("fn", 0) >> 63:
        return None
    row: dict[str, Any] = {
        "source": 3,
        "leaf": leaf,
        "version": version,
        "probe": event.probe,
        "n_lines": len(ends),
    }
    row |= expected_operands(slots, leaf, ends[0].slots) | expected_place(ends[0], ends[-1])
    answer = back.slots if back else {}
    row["status"] = answer.get("status")
    row["ext_err1"] = slots.get("ext_err1", answer.get("out_rcx"))
    row["ext_err2"] = slots.get("ext_err2", answer.get("out_rdx"))
    is_forward = entry and (not back or entry.ts_ns <= back.ts_ns)
    row["start_ns"] = entry.ts_ns if entry and is_forward else None
    if back and "duration_ns" in answer:
        row["start_ns"] = back.ts_ns - answer["duration_ns"]
    row["end_ns"] = back.ts_ns if back else None
    row["start_cpu"] = entry.cpu if entry and 0 <= entry.cpu <= 0xFFFF else None
    return {
        k: None if k in ("level", "version") and v is not None and v > 255 else v
        for k, v in row.items()
    }


def expected_operands(slots: dict[str, int], leaf: int, first: dict[str, int]) -> dict[str, Any]:
    """What a call works on: as named, as a page number, or as the registers at entry hold it."""
    row: dict[str, Any] = dict.fromkeys(("td_id", "vp_id", "gpa", "level", *PAGES))
    for register, names in REGISTERS.get(leaf, {}).items():
        for name in names.split() if register in first else ():
            word = first[register]
            in_guest = word & 0x000F_FFFF_FFFF_F000 if "level" in names else word
            row[name] = word & 7 if name == "level" else in_guest
    if row["gpa"] is not None and row["level"] is None:
        row["level"] = 0
    if "gfn" in slots:
        row["gpa"] = slots["gfn"] << 12 & (1 << 64) - 1
    return row | {name: slots[name] for name in row if name in slots}


def expected_place(first: DrawnEvent, last: DrawnEvent) -> dict[str, Any]:
    """Where a call ended, whose it was, and in which context."""
    tgid = max(first.tgid, last.tgid)
    context = last.in_irq if last.in_irq != -1 else first.in_irq
    return {
        "cpu": last.cpu if 0 <= last.cpu <= 0xFFFF else None,
        "tid": None if last.tid == -1 else last.tid,
        "tgid": None if tgid == -1 else tgid,
        "in_irq": None if context == -1 else context == 1,
    }


WORD = st.one_of(st.integers(0, 9), st.integers(0, (1 << 64) - 1))
_OPERANDS = ("td_id", "vp_id", "gpa", "gfn", "level", *PAGES, "ext_err1", "ext_err2")
_OF_ENTRY = (*_OPERANDS, "rcx", "rdx", "r8")
_OF_RETURN = (*_OPERANDS, "status", "out_rcx", "out_rdx", "out_r8", "rcx", "rdx")


@st.composite
def drawn_event(draw: st.DrawFn, name: str, tid: int) -> DrawnEvent:
    """An event with any fields that its side of a call can have."""
    is_entry = EVENTS[NUMBER[name]].role == "entry"
    slots = draw(st.lists(st.sampled_from(_OF_ENTRY if is_entry else _OF_RETURN), unique=True))
    made = {slot: draw(WORD) for slot in slots}
    if name.startswith(("seamcall", "tracepoint")) and draw(st.booleans()):
        fn = draw(st.sampled_from((*REGISTERS, 0x1_0006, 77, 0xFFFF, 1 << 63)))
        made |= (
            {"fn": fn} if draw(st.booleans()) else {"leaf": fn & 0xFFFF, "version": 1 + fn % 400}
        )
    if name == "graph":
        made["duration_ns"] = draw(st.integers(0, 9))
    return DrawnEvent(
        name,
        tid,
        made,
        draw(st.integers(10, 20)),
        draw(st.sampled_from((0, 1, 0xFFFF, -1, 0x10000))),
        draw(st.integers(-1, 1)),
        draw(st.integers(-1, 1)),
    )


@given(st.data(), st.sampled_from(("aug", "tracepoint", "seamcall")), st.integers(0, 2))
def test_a_row_is_what_its_events_say(data: st.DataObject, name: str, which: int) -> None:
    entry = data.draw(drawn_event(f"{name} entry", 7)) if which < 2 else None
    back = data.draw(drawn_event(f"{name} return", 7)) if which != 1 else None
    expected = expected_row(entry, back)
    rows = decoded([[event for event in (entry, back) if event]], referee).tables["seamcalls"]
    assert rows.height == (expected is not None)
    for row in rows.drop("seq").to_dicts():
        assert dict.fromkeys(PAGES) | row == expected


@given(drawn_event("graph", 7))
def test_a_call_on_one_line_began_as_long_before_its_end_as_it_took(event: DrawnEvent) -> None:
    (row,) = decoded([[event]], referee).tables["seamcalls"].drop("seq").to_dicts()
    assert dict.fromkeys(PAGES) | row == expected_row(None, event)


def test_places_of_all_leaves_registers_are_known() -> None:
    """One register may hold two things: of MNG.CREATE the TD and its root page."""
    of_create = {"td_id": 5, "page": 5}
    of_leaves = {18: {"vp_id": 5}, 17: {"td_id": 5}, 28: {"page": 5}, 27: {}, 9: of_create}
    for leaf, expected in of_leaves.items():
        (row,) = calls_of(DrawnEvent("seamcall entry", 7, {"fn": leaf, "rcx": 5}))
        found = {name: row[name] for name in ("td_id", "vp_id", "gpa", "page") if name in row}
        assert found == expected


# A wrapper and the SEAMCALLs inside it.


def _inside(n: int, *, enters: bool = True, status: int = 0, leaf: int = AUG) -> list[DrawnEvent]:
    """A wrapper's call with ``n`` SEAMCALLs inside; the last one's status is handed on."""
    made = [DrawnEvent("aug entry", 7, {"td_id": 1, "gpa": 0x5000, "level": 0})] if enters else []
    for k in range(n):
        made.append(DrawnEvent("seamcall entry", 7, {"fn": leaf, "rdx": 99}))
        made.append(DrawnEvent("seamcall return", 7, {"status": status if k == n - 1 else 8}))
    return [*made, DrawnEvent("aug return", 7, {"status": status})]


def test_seamcalls_inside_a_wrapper_replace_it() -> None:
    made = decoded([_inside(2, status=5)], referee)
    rows = made.tables["seamcalls"].select("td_id", "gpa", "level", "status", "probe").rows()
    assert rows == [(1, 0x5000, 0, 8, "seamcall"), (1, 0x5000, 0, 5, "seamcall")]
    assert made.losses == {("merged", ""): 2}


def test_a_wrappers_return_alone_ends_the_seamcalls_before_it() -> None:
    made = decoded([_inside(2, enters=False, status=5)], referee)
    assert made.tables["seamcalls"]["status"].to_list() == [8, 5]
    assert made.losses == {("merged", ""): 1}


@pytest.mark.parametrize("what", ["another leaf", "another status", "something between"])
def test_a_return_that_does_not_fit_is_a_call_of_its_own(what: str) -> None:
    events = _inside(1, enters=False, leaf=TRACK if what == "another leaf" else AUG)
    if what == "another status":
        events[-1] = DrawnEvent("aug return", 7, {"status": 3})
    if what == "something between":
        events[-1:-1] = [DrawnEvent("enter entry"), DrawnEvent("enter return", slots={"status": 0})]
    made = decoded([events], referee)
    assert made.tables["seamcalls"].height == 2 + (what == "something between")
    assert made.losses == {}


def test_calls_of_the_loader_have_a_table_and_those_without_a_leaf_are_counted() -> None:
    fn = 1 << 63 | 1
    loader = [
        DrawnEvent("seamcall entry", 7, {"fn": fn}),
        DrawnEvent("seamcall return", 7, {"status": 4}),
    ]
    made = decoded([[*loader, DrawnEvent("seamcall return", 7, {"status": 0})]], referee)
    assert made.tables["seamcalls"].is_empty()
    rows = made.tables["loader_calls"].select("loader_leaf", "status", "probe", "n_lines")
    assert rows.rows() == [(1, 4, "seamcall", 2)]
    assert made.losses == {("undecoded", "calls that name no leaf"): 1}


def test_a_call_of_the_loader_inside_a_wrappers_call_is_not_the_wrappers() -> None:
    events = _inside(1)
    loader = [
        DrawnEvent("seamcall entry", 7, {"fn": 1 << 63 | AUG}),
        DrawnEvent("seamcall return", 7, {"status": 0}),
    ]
    made = decoded([[*events[:-1], *loader, events[-1]]], referee)
    assert made.tables["seamcalls"]["status"].to_list() == [
        row["status"] for row in decoded([events], referee).tables["seamcalls"].to_dicts()
    ]
    assert made.tables["loader_calls"]["loader_leaf"].to_list() == [AUG]


def test_a_column_that_only_some_calls_have_stands_where_the_table_has_it() -> None:
    """Whatever came first; of a call that is no row it is missing."""
    parts = [[DrawnEvent("aug return", 7, {name: 5})] for name in ("page_3", "page_2")]
    rows = decoded(parts, referee).tables["seamcalls"]
    assert rows.columns[-2:] == ["page_2", "page_3"]
    loader = DrawnEvent("seamcall entry", 7, {"fn": 1 << 63, "page_2": 1})
    assert "page_2" not in decoded([[loader, *parts[0]]], referee).tables["seamcalls"]


# However events are cut into batches.

SIMPLE = ("aug entry", "aug return", "enter entry", "enter return", "graph", "kvm:kvm_entry")
ANY = st.sampled_from((*SIMPLE, "kvm:kvm_exit", "kvm:kvm_page_fault", "kvm:kvm_userspace_exit"))
TID = st.integers(-1, 2)
STORY = st.lists(st.tuples(ANY, TID).flatmap(lambda x: drawn_event(*x)), max_size=24)


@st.composite
def nested(draw: st.DrawFn) -> list[DrawnEvent]:
    """Whole calls of some threads, with SEAMCALLs inside, event by event in any order."""
    waiting = []
    for tid in draw(st.lists(st.integers(1, 3), min_size=1, unique=True)):
        mine: list[DrawnEvent] = []
        for n in draw(st.lists(st.integers(0, 3), max_size=3)):
            mine += [draw(drawn_event("aug entry", tid))]
            for _ in range(n):
                mine += [
                    draw(drawn_event("seamcall entry", tid)),
                    draw(drawn_event("seamcall return", tid)),
                ]
            mine += [draw(drawn_event("aug return", tid))]
        waiting.append(mine)
    story = []
    while waiting := [mine for mine in waiting if mine]:
        story.append(draw(st.sampled_from(waiting)).pop(0))
    return story


@given(st.one_of(STORY, nested()), st.lists(st.integers(0, 24), max_size=5))
@settings(max_examples=60)
def test_batches_may_end_anywhere(story: list[DrawnEvent], cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(story)) for cut in cuts), len(story)]
    parts = [story[a:b] for a, b in itertools.pairwise(places)]
    whole, cut = decoded([story]), decoded(parts, referee)
    assert cut.losses == whole.losses
    for name, rows in whole.sorted().items():
        assert_frame_equal(cut.sorted()[name], rows)


@given(st.lists(st.tuples(st.sampled_from(sorted(NUMBER)), TID).flatmap(lambda x: drawn_event(*x))))
@settings(max_examples=100)
def test_every_event_is_in_a_row_or_counted(story: list[DrawnEvent]) -> None:
    story = [event for event in story if event.name != "sched:sched_switch"]
    made = decoded([story], referee)
    n_lines = sum(int(rows["n_lines"].sum()) for rows in made.tables.values() if "n_lines" in rows)
    assert n_lines + sum(made.losses.values()) == len(story)
    for rows in made.tables.values():
        assert rows["seq"].is_unique().all() if "seq" in rows else True


def test_open_calls_are_dropped_after_a_limit() -> None:
    sink = MemorySink()
    made = Decoder(0, EVENTS, SourceStats(), sink)
    made.feed(batch_of([DrawnEvent("aug entry", ts_ns=5), DrawnEvent("kvm:kvm_entry", ts_ns=5)]))
    made.flush()
    made.drop_open(6)
    made.feed(batch_of([DrawnEvent("enter entry", ts_ns=9)], 3, made._calls.open.layouts))  # type: ignore[union-attr]
    made.finish()
    tables = sink.result()
    assert tables["seamcalls"]["leaf"].to_list() == [0]
    assert tables["vm_entries"].is_empty()


# KVM's numbers.


@pytest.mark.parametrize(("isa", "expected"), [(1, 48), (2, None), (None, 48)])
def test_a_reason_to_exit_counts_on_intels_processors(
    isa: int | None, expected: int | None
) -> None:
    slots = {"exit_reason": 48} | ({} if isa is None else {"isa": isa})
    rows = decoded([[DrawnEvent("kvm:kvm_exit", slots=slots)]], referee).tables["vm_entries"]
    assert rows["exit_reason"].to_list() == [expected]


def test_a_negative_errno_replaces_the_reason() -> None:
    exits = [{"reason": 8, "signed_errno": (1 << 64) - 4}, {"reason": 8, "signed_errno": 0}]
    exits += [{"reason": 8}, {"errno": 11}]
    events = [DrawnEvent("kvm:kvm_userspace_exit", slots=slots) for slots in exits]
    rows = decoded([events], referee).tables["host_events"]
    assert rows.select("reason", "errno").rows() == [(None, 4), (8, None), (8, None), (None, 11)]
    assert set(rows["event"]) == {"kvm_userspace_exit"}


# What calls tell of their threads.

MOMENT = st.integers(0, 9)
SPAN = st.tuples(st.integers(-2, 2), MOMENT, MOMENT, st.integers(0, 2))


@given(st.lists(SPAN, min_size=1, max_size=30))
def test_first_and_last_rows_of_threads(spans: list[tuple[int, int, int, int]]) -> None:
    rows = pl.DataFrame(
        [
            (None if tid == -2 else tid, seq, None if which == 1 else a, None if which == 2 else b)
            for seq, (tid, a, b, which) in enumerate(spans)
        ],
        schema={"tid": pl.Int32, "seq": pl.UInt64, "start_ns": pl.Int64, "end_ns": pl.Int64},
        orient="row",
    ).filter(pl.col("tid").is_null() | (pl.col("tid") != -1))
    if rows.is_empty():
        return
    made = spans_of(rows, referee)
    began, ended = pl.coalesce("start_ns", "end_ns"), pl.coalesce("end_ns", "start_ns")
    for tid, row, first, last in zip(
        made.tid, made.first_row, made.first_end_ns, made.last_end_ns, strict=True
    ):
        mine = rows.filter(pl.col("tid").eq_missing(tid))
        assert rows["seq"][row] == mine.sort(began, "seq")["seq"][0]
        assert (first, last) == mine.select(ended.min(), ended.max().alias("last")).row(0)
    assert len(set(made.tid)) == len(made.tid) == rows["tid"].n_unique()


def test_many_threads_have_numbers_of_their_own() -> None:
    """More than the first table of them has room for."""
    tid = np.random.default_rng(3).choice(1 << 22, 5000, replace=False) - 100
    rows = pl.DataFrame({"tid": np.concatenate([tid, tid[::-1]])}, schema={"tid": pl.Int32})
    rows = rows.with_columns(seq=pl.int_range(pl.len(), dtype=pl.UInt64), start_ns=0, end_ns=1)
    made = spans_of(rows.cast({"start_ns": pl.Int64, "end_ns": pl.Int64}), referee)
    assert [n for n in made.tid if n is not None] == [n for n in tid.tolist() if n != -1]
    assert made.number.tolist() == [*range(5000), *reversed(range(5000))]


# Numbers as tables.

NUMBERS = st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=9)


@given(NUMBERS)
def test_what_does_not_fit_a_column_is_null(numbers: list[int]) -> None:
    place = np.array(numbers, np.int64)
    columns: dict[str, Column] = {
        "source": 3,
        "seq": place.view(np.uint64),
        "start_ns": np.stack([place, place])[1],
        "cpu": place,
        "tid": place,
        "leaf": place & 0xFFFF,
        "level": place.view(np.uint64),
        "probe": (place & 1).astype(np.int8),
        "n_lines": 2,
    }
    rows = frame(SEAMCALLS, len(place), columns, {"tid": place % 2 == 0, "start_ns": place > 0})
    assert rows["cpu"].to_list() == [n if 0 <= n < 1 << 16 else None for n in numbers]
    assert rows["tid"].to_list() == [
        n if n % 2 == 0 and -(1 << 31) <= n < 1 << 31 else None for n in numbers
    ]
    assert rows["level"].to_list() == [n if 0 <= n < 256 else None for n in numbers]
    assert rows["start_ns"].to_list() == [n if n > 0 else None for n in numbers]
    assert rows["gpa"].null_count() == rows.height
    assert rows["probe"].to_list() == [("wrapper", "seamcall")[n & 1] for n in numbers]
    assert rows["n_lines"].to_list() == [2] * rows.height
    assert rows.schema == pl.Schema(SEAMCALLS.schema)


def test_every_slot_used_in_these_tests_exists() -> None:
    assert {*_OF_ENTRY, *_OF_RETURN} <= {*SLOTS}
