"""Abandoned requests, progress loops, time shares and conflicts between TDs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from support.logs import WORDS, with_log
from support.story import STEP_NS, story

from tdxtrace import Findings, analyze
from tdxtrace.analysis.abandoned_requests import MESSAGE_NS, related_messages
from tdxtrace.analysis.causes.busy_causes import td_conflicts
from tdxtrace.analysis.causes.generation import module_release
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.trace import agreement
from tdxtrace.tables.verdicts import ABANDONED_REQUESTS, PROGRESS_LOOPS, TD_CONFLICTS, TIME_SHARES

BUSY_ENTRY = 0x8000_0200_0000_0001


def findings(text: str, processes: dict[int, int] | None = None) -> Findings:
    return analyze(story(text, processes).trace)


# Abandoned requests.


def left(found: Findings) -> list[tuple[int, str]]:
    """Leaf and consequence of each."""
    rows = ABANDONED_REQUESTS.check(found.abandoned_requests)
    return [(leaf, str(what)) for leaf, what in rows.select("leaf", "consequence").rows()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("S1 B1 S1", []),
        ("blockK1 trackS _ S2", [(7, "none_seen")]),
        # Of a trace that ends with it, nothing can be said.
        ("S1 blockK1", []),
        # canonical/tdx issue 213.
        ("blockK1 trackS 2/demoteT1", [(7, "later_call_failed")]),
        ("blockK1 trackS 2/demoteT2", [(7, "none_seen")]),
        ("blockK1 trackS 2/demoteT1#7", [(7, "none_seen")]),
        ("blockK1 trackS 2/demoteS1", [(7, "none_seen")]),
        ("2/demoteT1 blockK1 trackS", [(7, "none_seen")]),
        # Another call settled it first: the failure has another reason.
        ("blockK1 trackS 3/blockS1 2/demoteT1", [(7, "settled_later")]),
        # The page was blocked: what is missing is a TRACK.
        ("blockS1 2/blockB1 2/trackS demoteT1", [(7, "none_seen")]),
        ("blockB1 trackS 3/blockS1^1 2/demoteT1", [(7, "none_seen")]),
        ("8/S8@5 blockB1 trackS lost@5 _ 8/S9@5 2/demoteT1 S3", [(7, "none_seen")]),
        # A TRACK that was dropped concerns every page of the TD.
        ("blockS1 trackD 2/removeT1 S5", [(38, "later_call_failed")]),
        # Host priority stays on the entry until a host takes it.
        ("removeK1 trackS _20ms enterZ", [(29, "host_priority_timeout")]),
        ("removeK1 trackS _20ms enterC", [(29, "none_seen")]),
        # The module waits for 10 ms at least, from when the host first failed.
        ("removeK1 trackS enterZ", [(29, "none_seen")]),
        ("removeK1 trackS _9ms enterZ", [(29, "none_seen")]),
        ("removeK1 _20ms removeK1 trackS enterZ", [(29, "host_priority_timeout")]),
        ("removeK1 trackS enterZ _20ms enterZ", [(29, "host_priority_timeout")]),
        # A host call that takes the entry clears host priority, in whatever it ends.
        ("removeK1 trackS 2/demoteT1 _20ms enterZ", [(29, "none_seen")]),
        ("removeK1 trackS 2/blockS1 _20ms enterZ", [(29, "none_seen")]),
        ("removeK1 trackS 2/blockE1 _20ms enterZ", [(29, "host_priority_timeout")]),
        ("removeK1 trackS 2/demoteT2 _20ms enterZ", [(29, "host_priority_timeout")]),
        ("removeK1 trackS 2/demoteU1 _20ms enterZ", [(29, "none_seen")]),
        ("removeK1 trackS _20ms enterZ 2/demoteT1", [(29, "host_priority_timeout")]),
        ("8/S8@5 removeK1 trackS lost@5 _20ms 8/S9@5 enterZ", [(29, "none_seen")]),
        # Busy on the tree leaves nothing on the entry.
        ("removeB1 trackS _20ms enterZ", [(29, "none_seen")]),
        ("enterZ removeK1 trackS _20ms", [(29, "none_seen")]),
        ("removeK1 trackS 2/removeS1 _20ms enterZ", [(29, "settled_later")]),
        (
            "removeK1 trackS _20ms enterZ 2/removeS1",
            [(29, "host_priority_timeout"), (29, "settled_later")],
        ),
    ],
)
def test_consequences_of_an_abandoned_request(text: str, expected: list[tuple[int, str]]) -> None:
    assert left(findings(text)) == expected


def test_without_host_priority_there_is_no_timeout_of_it() -> None:
    trace = story("removeK1 trackS _20ms enterZ").trace
    for generation, consequence in (("A", "none_seen"), ("B", "host_priority_timeout")):
        found = analyze(trace, generation=generation).abandoned_requests
        assert found["consequence"].to_list() == [consequence]


def test_the_timeout_of_another_td_is_no_consequence() -> None:
    text = "3/S1#7 removeK1 trackS _20ms 3/enterZ"
    assert left(findings(text, {1: 10, 3: 30})) == [(29, "none_seen")]


def test_the_row_of_the_effect_is_named() -> None:
    scenario = story("blockK1 trackS _ 2/demoteT1")
    row = analyze(scenario.trace).abandoned_requests.row(0, named=True)
    effect = scenario.seamcalls.filter(pl.col("seq") == row["effect_seq"])
    assert effect["leaf"].to_list() == [15]
    assert (row["effect_source"], row["effect_leaf"]) == (0, 15)
    assert row["final_status"] == BUSY_ENTRY
    assert row["after_ns"] == effect["end_ns"].item() - row["left_ns"]


@pytest.mark.parametrize(
    ("change", "clock", "linked"),
    [
        ({}, "printk", True),
        ({}, "wall", False),
        ({"leaf": 29}, "printk", False),
        ({"status": 0x8000_0200_0000_0092}, "printk", False),
        ({"message": "warning"}, "printk", False),
        ({"late": MESSAGE_NS + STEP_NS}, "printk", False),
        ({"late": -5 * STEP_NS}, "printk", False),
    ],
)
def test_a_message_is_linked_only_by_status_and_time(
    change: dict[str, Any], clock: str, linked: bool
) -> None:
    scenario = story("S3 blockK1 blockK1 _ S2")
    ends = scenario.seamcalls.filter(leaf=7)["end_ns"].max()
    assert isinstance(ends, int)
    said = {"leaf": 7, "status": BUSY_ENTRY, "ts_ns": ends + 2000 + change.get("late", 0)}
    said |= {k: v for k, v in change.items() if k != "late"}
    trace = with_log(scenario, said, clock=clock)
    found = analyze(trace).abandoned_requests
    assert ("kernel_message" in found["consequence"]) == linked
    if linked:
        assert found.select("effect_source", "effect_seq", "after_ns").row(0) == (1, 1, 2000)


def test_clocks_that_differ_are_not_compared() -> None:
    trace = with_log(story("S1"), {"ts_ns": 5})
    assert related_messages(trace).height == 1
    for clock in ("mono", "boot", "x86-tsc", "integer", "relative"):
        first, log = trace.provenance.sources
        assert not agreement(dataclasses.replace(first, clock=clock), log).comparable
        sources = (dataclasses.replace(first, clock=clock), log)
        provenance = dataclasses.replace(trace.provenance, sources=sources)
        assert related_messages(dataclasses.replace(trace, provenance=provenance)).is_empty()


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([], None),
        ([None], None),
        (["1.5.16"], ("1.5.16", "B")),
        (["1.5.24", "1.5.24"], ("1.5.24", "C")),
        (["1.0"], ("1.0", "A")),
        (["1.5"], ("1.5", None)),
        (["1.5.06", "1.5.06.00"], ("1.5.06.00", "B")),
        (["1.5 build 700"], ("1.5 build 700", None)),
        # The module was updated meanwhile.
        (["1.5.16", "1.5.24"], None),
    ],
)
def test_the_module_release_is_read_from_the_log(
    versions: list[str | None], expected: tuple[str, str | None] | None
) -> None:
    said = [{"message": "module_version", "module_version": v} for v in versions]
    trace = with_log(story("S1"), *said)
    assert module_release(trace.kernel_messages) == expected


# Progress loops.


def loops(text: str) -> list[tuple[str, int, str]]:
    rows = PROGRESS_LOOPS.check(findings(text).progress_loops)
    columns = ("loop", "n_repeats", "progress")
    return [(str(a), b, str(c)) for a, b, c in rows.select(columns).rows()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B1 B1 S1", []),
        ("cachewbI cachewbI cachewbS", [("resumable", 2, "seen")]),
        ("demoteJ1 demoteJ1 demoteJ1 demoteS1", [("restartable", 3, "seen")]),
        ("demoteJ1 demoteJ1 trackS _ S1", [("restartable", 2, "not_seen")]),
        ("createN createN createS", [("entropy", 2, "seen")]),
        ("initY initS", [("sys_busy", 1, "seen")]),
        ("S1 cachewbI", [("resumable", 1, "unknown")]),
        ("demoteJ1 demoteB1 demoteJ1 demoteS1", [("restartable", 2, "seen")]),
        # A fault, and then nothing for longer than any fault takes.
        ("S9 >X ?1 _5ms >C", [("local_retry", 0, "seen")]),
        ("S9 >X ?1 _1ms >C", []),
        ("S9 >X ?1 _1ms S1 _1ms >C", []),
        ("S9 >X ?1 _5ms 2/S3", [("local_retry", 0, "unknown")]),
        # Without probes on SEAMCALLs a silence says nothing.
        (">X ?1 _5ms >C", []),
    ],
)
def test_loops_and_their_progress(text: str, expected: list[tuple[str, int, str]]) -> None:
    assert loops(text) == expected


def test_a_changing_rcx_is_progress() -> None:
    scenario = story("cachewbI cachewbI trackS _ S1")
    for number, row in enumerate(scenario.calls):
        row["ext_err1"] = number
    assert analyze(scenario.trace).progress_loops["progress"].to_list() == ["seen"]


def test_interrupts_are_counted_only_where_they_were_recorded() -> None:
    scenario = story("S1 demoteJ1 demoteJ1 demoteS1")
    assert analyze(scenario.trace).progress_loops["n_interrupts"].to_list() == [None]
    start = scenario.seamcalls.filter(leaf=15)["start_ns"].min()
    assert isinstance(start, int)
    for seq, (after, cpu) in enumerate([(-1, 0), (0, 0), (5_000, 0), (6_000, 1)], 100):
        scenario.events.append(
            {"source": 0, "seq": seq, "ts_ns": start + after, "cpu": cpu, "n_lines": 1}
            | {"event": "local_timer_entry"}
        )
    assert analyze(scenario.trace).progress_loops["n_interrupts"].to_list() == [2]


# Time shares.


def test_time_is_shared_between_work_retries_and_waiting() -> None:
    found = findings("B1 B1 S1 2/S2").time_shares
    row = TIME_SHARES.check(found).row(0, named=True)
    assert (row["phase"], row["n_calls"], row["n_retries"]) == ("run", 4, 2)
    assert (row["done_ns"], row["retry_ns"]) == (2 * STEP_NS, 2 * STEP_NS)
    assert (row["wait_ns"], row["rest_ns"]) == (2 * STEP_NS, 0)


def test_refused_entries_do_not_count_as_retries() -> None:
    row = findings("enterB enterB enterC S1").time_shares.row(0, named=True)
    assert (row["n_calls"], row["n_retries"], row["retry_ns"]) == (1, 0, 0)
    assert (row["done_ns"], row["guest_ns"]) == (STEP_NS, 3 * STEP_NS)


def test_pauses_between_refused_entries_are_not_wait_time() -> None:
    found = findings("enterB _ enterB _ enterC B1 _ S1").time_shares
    assert found["wait_ns"].to_list() == [1_000_000 + 10_000]


def test_a_reclaim_before_the_last_entry_is_not_teardown() -> None:
    text = "createS#7 reclaimS enterC*1#7 trackS#7 reclaimS enterC*1#7 reclaimS"
    found = findings(text, {1: 9}).time_shares
    assert dict(found.select("phase", "n_calls").rows())["teardown"] == 1


def test_no_td_is_inferred_where_there_are_two() -> None:
    found = findings("trackS#7 trackS#8 wbinvdS", {1: 9}).time_shares
    assert found["td_id"].null_count() == 1


def test_phases_are_bounded_by_finalize_and_the_last_entry() -> None:
    text = "initS S1 finalizeS enterC S2 enterC flushS reclaimS3 reclaimS4"
    found = findings(text).time_shares
    assert found.select("phase", "n_calls").rows() == [("build", 3), ("run", 2), ("teardown", 2)]
    guest = found.filter(phase="run")["guest_ns"].item()
    assert guest == 2 * STEP_NS
    assert findings("S1 enterC").time_shares["phase"].to_list() == ["run"]


# Conflicts between TDs.


def conflict(rows: Iterable[dict[str, Any]]) -> list[tuple[int, ...]]:
    base = {"source": 0, "rank": 1, "leaf": 6, "resource": "PAMT", "cause": "host_conflict"}
    base |= {"confidence": "strong", "n_tied": 1, "generations": "C", "end_ns": 0, "status": 1}
    frame = pl.DataFrame(
        [base | {"seq": i} | row for i, row in enumerate(rows)], schema=BUSY_CAUSES.schema
    )
    found = TD_CONFLICTS.check(td_conflicts(frame))
    columns = ("n_busy", "n_same_td", "n_other_td", "n_unknown", "n_tds")
    return found.select(columns).rows()


def test_holders_of_another_td_are_counted_separately() -> None:
    rows: list[dict[str, Any]] = [
        {"td_id": 1, "holder_td_id": 1},
        {"td_id": 1, "holder_td_id": 2},
        {"td_id": 2, "holder_td_id": 1},
        {"td_id": 1, "holder_td_id": None},
        {"td_id": None, "holder_td_id": 2},
        {"td_id": 3, "cause": "guest"},
        # What else would fit is no answer.
        {"td_id": 1, "holder_td_id": 2, "rank": 2},
    ]
    assert conflict(rows) == [(6, 2, 2, 2, 3)]
    assert conflict([]) == []


@settings(max_examples=12)
@given(WORDS)
def test_every_table_conforms_to_its_schema(words: list[str]) -> None:
    found = findings(" ".join(words))
    found.check()
    chains = found.retry_chains
    gone = chains.filter(pl.col("outcome").is_in(["abandoned", "resolved_elsewhere"]))
    result = found.abandoned_requests
    assert set(result["first_seq"]) == set(gone["first_seq"])
    calls = chains.filter(pl.col("leaf") != 0)["n_attempts"].sum()
    assert found.time_shares["n_calls"].sum() == calls
