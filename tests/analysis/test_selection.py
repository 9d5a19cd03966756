"""Selection by TD, leaf and time."""

from __future__ import annotations

import polars as pl
import pytest
from support.story import story

from tdxtrace.analysis.selection import Selection
from tdxtrace.errors import QueryError
from tdxtrace.pipeline import analyze
from tdxtrace.tables.times import parse_moment
from tdxtrace.tables.trace import Trace

SECOND = 1_000_000_000


def rows_of(trace: Trace, table: str = "seamcalls", **asked: object) -> pl.DataFrame:
    rows: pl.DataFrame = getattr(trace, table)
    return Selection(**asked).filter(rows, trace)  # type: ignore[arg-type]


def pages(rows: pl.DataFrame) -> list[int]:
    return [gpa >> 12 for gpa in rows["gpa"].drop_nulls()]


TWO_VMS = story("S1#1 2/S2#2 enterC 2/enterC 3/S3#1 2/>C 2/?7 >C", {1: 10, 2: 20, 3: 10}).trace


def test_an_empty_selection_keeps_everything() -> None:
    for name, rows in TWO_VMS.tables().items():
        assert rows_of(TWO_VMS, name).equals(rows)
    assert Selection().to_dict() == {}


def test_a_selection_lists_its_fields() -> None:
    asked = Selection(vms=("10",), since="+1")
    assert asked.to_dict() == {"vms": ("10",), "since": "+1"}


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        ("TDH.MEM.PAGE.AUG", [6, 6, 6]),
        ("tdh_mem_page_aug", [6, 6, 6]),
        ("6", [6, 6, 6]),
        ("0x0", [0, 0]),
        ("TDH.VP.ENTER", [0, 0]),
        ("TDH.MEM.TRACK", []),
    ],
)
def test_leaves_go_by_name_or_number(leaf: str, expected: list[int]) -> None:
    assert rows_of(TWO_VMS, leaves=(leaf,))["leaf"].to_list() == expected


def test_several_leaves_are_a_union() -> None:
    assert rows_of(TWO_VMS, leaves=("TDH.VP.ENTER", "6")).height == 5


def test_an_unknown_leaf_is_refused_with_the_nearest() -> None:
    with pytest.raises(QueryError, match=r"TDH\.MEM\.PAGE\.AUG"):
        rows_of(TWO_VMS, leaves=("TDH.MEM.PAGE.AGU",))


@pytest.mark.parametrize("vm", ["10", "0x7d001", str(0x7D001), "0x07D001"])
def test_a_vm_goes_by_its_td_or_its_process(vm: str) -> None:
    assert pages(rows_of(TWO_VMS, vms=(vm,))) == [1, 3]


def test_several_vms_are_a_union() -> None:
    assert pages(rows_of(TWO_VMS, vms=("10", "0x7d002"))) == [1, 2, 3]


@pytest.mark.parametrize("processes", [{1: 10, 2: 20, 3: 10}, {}, {1: 10, 2: 20}])
def test_a_td_keeps_all_that_its_threads_did(processes: dict[int, int]) -> None:
    """Entries of a vCPU name no TD; its memory calls do."""
    text = "enterX S1#1 enterB enterC 2/enterX 2/S2#2 2/enterC >C 2/>C ?1 2/?2 3/S3#1"
    trace = story(text, processes).trace
    calls = rows_of(trace, vms=("0x7d001",))
    assert calls["tid"].to_list() == [1, 1, 1, 1, 3]
    assert rows_of(trace, "vm_entries", vms=("0x7d001",))["tid"].to_list() == [1]
    assert rows_of(trace, "page_faults", vms=("0x7d001",))["tid"].to_list() == [1]
    found = analyze(trace, Selection(vms=("0x7d001",)))
    assert found.vcpu_stats.select("tid", "n_entries", "n_refused", "zero_steps").rows() == [
        (1, 3, 1, 1)
    ]
    assert found.zero_steps["tid"].to_list() == [1]
    assert found.vm_stats["td_id"].to_list() == [0x7D001]


def test_a_process_keeps_calls_without_a_recorded_process() -> None:
    trace = story("S1#1 S2#1 2/S3#2", {1: 10, 2: 20}).trace
    calls = trace.seamcalls.with_columns(
        tgid=pl.when(pl.col("gpa") == 0x2000).then(None).otherwise("tgid")
    )
    partly = Trace(**(trace.tables() | {"seamcalls": calls}), provenance=trace.provenance)
    assert pages(rows_of(partly, vms=("10",))) == [1, 2]


def test_tables_without_a_vm_keep_their_rows() -> None:
    trace = story("S1#1 lost 2/S2#2").trace
    assert rows_of(trace, "losses", vms=("0x7d001",)).height == 1
    assert rows_of(trace, "losses", leaves=("TDH.MEM.PAGE.AUG",)).height == 1


@pytest.mark.parametrize("vm", ["0x7d009", "11", "-1"])
def test_an_unknown_vm_is_refused_with_the_nearest(vm: str) -> None:
    with pytest.raises(QueryError, match=f"no VM {vm} in the trace; nearest: (0x7d00|10|20)"):
        rows_of(TWO_VMS, vms=(vm,))


@pytest.mark.parametrize("vm", ["", "alice", "0x", "1.5"])
def test_a_malformed_vm_is_refused(vm: str) -> None:
    with pytest.raises(QueryError, match="not a VM"):
        rows_of(TWO_VMS, vms=(vm,))


def test_a_trace_without_any_vm_says_so() -> None:
    trace = story("").trace
    with pytest.raises(QueryError, match="no VM 5 in the trace; nearest: none"):
        rows_of(trace, vms=("5",))


# Times.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4189", 4189 * SECOND),
        ("4189s", 4189 * SECOND),
        ("4189.25", 4189 * SECOND + SECOND // 4),
        ("4189.123456789", 4189 * SECOND + 123_456_789),
        ("0.000000001", 1),
        ("+0.5", 7 + SECOND // 2),
        ("+3", 7 + 3 * SECOND),
        (" 1.5 ", SECOND * 3 // 2),
        ("+10ms", 7 + 10_000_000),
        ("1.5us", 1_500),
        ("2min", 120 * SECOND),
    ],
)
def test_times_are_seconds_of_the_clock_or_from_the_start(text: str, expected: int) -> None:
    assert parse_moment(text, 7) == expected


def test_nanoseconds_are_exact() -> None:
    assert parse_moment("9007199.254740993", 0) == 9_007_199_254_740_993


@pytest.mark.parametrize("text", ["", "-1", "1e9", "noon", "1.", ".5", "1.0000000001", "1:30"])
def test_a_malformed_time_is_refused(text: str) -> None:
    with pytest.raises(QueryError, match="not a time"):
        parse_moment(text, 0)


# Calls begin at 1.0, 2.00002, 3.00004 s and take 10 us each.
THREE = story("S1 _1s S2 _1s S3").trace


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        ("+0", "+100", [1, 2, 3]),
        ("+1", None, [2, 3]),
        (None, "+1", [1]),
        ("+1", "+2", [2]),
        ("1.5", "2.5", [2]),
        ("+50", None, []),
        # A call of which any part is within.
        ("1.000005", "1.000006", [1]),
        ("1.00001", None, [1, 2, 3]),
        ("1.000010001", None, [2, 3]),
        (None, "1", [1]),
        (None, "0.999999999", []),
    ],
)
def test_a_row_is_within_the_time_if_any_part_of_it_is(
    since: str | None, until: str | None, expected: list[int]
) -> None:
    assert pages(rows_of(THREE, since=since, until=until)) == expected


def test_time_filters_every_table_that_has_times() -> None:
    trace = story("S1 >C ?1 lost@0 _1s S2 >C ?2").trace
    for name in ("seamcalls", "vm_entries", "page_faults"):
        assert rows_of(trace, name, until="+0.5").height == 1
        assert rows_of(trace, name, since="+0.5").height == 1


def test_rows_without_a_time_are_kept() -> None:
    trace = story("S1 _1s S2 lost").trace
    noise = {"source": 0, "kind": "noise", "severity": "info", "n_lines": 1, "detail": "a"}
    timeless = pl.DataFrame([noise | {"advice": ""}], schema=trace.losses.schema)
    losses = pl.concat([trace.losses, timeless])
    both = Trace(**(trace.tables() | {"losses": losses}), provenance=trace.provenance)
    assert rows_of(both, "losses", since="+0.5")["kind"].to_list() == ["lost_events", "noise"]
    assert rows_of(both, "threads", since="+0.5").height == 1


def test_a_partly_recorded_call_is_placed_by_its_known_time() -> None:
    trace = story("S1~ _1s U2").trace
    assert rows_of(trace, until="+0.5").height == 1
    assert rows_of(trace, since="+0.5").height == 1


def test_filters_are_combined_by_and() -> None:
    rows = rows_of(TWO_VMS, vms=("10",), leaves=("6",), until="+0.00003")
    assert pages(rows) == [1]


def test_chains_are_found_over_the_whole_trace_and_then_chosen() -> None:
    trace = story("B1 _1s B1 _1s S1").trace
    found = analyze(trace, Selection(since="+1.5"))
    assert found.retry_chains["n_attempts"].to_list() == [3]
    assert found.options == {"since": "+1.5"}
