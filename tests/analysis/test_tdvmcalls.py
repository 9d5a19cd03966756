"""Exits by TDG.VP.VMCALL: their functions, and the evidence for each name."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.story import story

from tdxtrace.analysis.tdvmcalls import tdvmcalls
from tdxtrace.tables.lifecycle import TDVMCALLS


def functions(text: str) -> dict[str, int]:
    rows = of(text)
    sums = rows.group_by("function").agg(pl.col("n_exits").sum())
    return dict(sums.rows())


def of(text: str) -> pl.DataFrame:
    scenario = story(text)
    return TDVMCALLS.check(
        tdvmcalls(scenario.seamcalls, scenario.vm_entries, scenario.host_events, scenario.losses)
    )


@pytest.mark.parametrize(
    ("text", "function"),
    [
        (">H", "Instruction.HLT"),
        (">M", "#VE.RequestMMIO"),
        (">C exit3 >X", "MapGPA"),
        (">C exit3 exit3 >X", "MapGPA"),
        (">C exit24", "ReportFatalError"),
        (">C exit40 >X", "GetQuote or SetupEventNotifyInterrupt or GetTdVmCallInfo"),
        (">C exit7 >X", "TDCALL, then userspace exit 7"),
    ],
)
def test_an_exit_is_named_by_its_reason_or_by_what_userspace_is_asked(
    text: str, function: str
) -> None:
    assert functions(text) == {function: 1}


def test_other_exits_have_no_row() -> None:
    assert of(">X >Q >F >U").is_empty()
    assert of("").is_empty()


def test_an_exit_to_userspace_after_the_next_entry_names_nothing() -> None:
    assert functions(">C >X exit3 >X") == {"TDCALL answered by KVM": 1}


def test_the_exit_of_another_vcpu_names_nothing() -> None:
    assert functions(">C 2/exit3 >X") == {"TDCALL answered by KVM": 1}


def test_without_exits_to_userspace_a_tdcall_has_no_name_and_says_what_to_record() -> None:
    (row,) = of(">C >X").to_dicts()
    assert (row["function"], row["basis"]) == ("TDCALL", "unnamed")
    assert "kvm_userspace_exit" in row["withheld"]


def test_where_exits_were_not_recorded_the_status_of_the_entry_counts() -> None:
    (row,) = of("enterC S1 enterX").to_dicts()
    assert (row["function"], row["basis"], row["n_exits"]) == ("TDCALL", "unnamed", 1)
    assert "kvm_exit" in row["withheld"]
    assert row["td_id"] == 0x7D000


def test_a_vm_that_is_no_td_has_an_instruction_pointer_and_no_row() -> None:
    scenario = story(">H 2/>H")
    entries = scenario.vm_entries.with_columns(rip=pl.Series([0, 0x1234], dtype=pl.UInt64))
    assert tdvmcalls(scenario.seamcalls, entries, scenario.host_events, scenario.losses)[
        "n_exits"
    ].to_list() == [1]


def test_handling_lasts_until_the_next_entry() -> None:
    (row,) = of(">H _3ms >X").to_dicts()
    assert row["handled_ns"] == row["longest_ns"] == 3_010_000
    assert of(">H")["longest_ns"].to_list() == [None]


@pytest.mark.parametrize(
    ("text", "why"),
    [(">X exit3 >C", "the trace ends"), (">C lost >X exit3 >X", "events were lost")],
)
def test_a_tdvmcall_without_a_following_userspace_exit_has_no_name(text: str, why: str) -> None:
    (row,) = of(text).to_dicts()
    assert (row["function"], row["basis"]) == ("TDCALL", "unnamed")
    assert why in row["withheld"]


@given(st.lists(st.sampled_from([">H", "2/>H", ">C", "exit3", ">X", "_3ms", "_2s"]), max_size=40))
def test_every_exit_is_counted_once(words: list[str]) -> None:
    rows = of(" ".join(words))
    n = sum(word in (">H", "2/>H", ">C") for word in words)
    assert rows["n_exits"].sum() == n
    assert (rows["start_ns"] < rows["end_ns"]).all()
    assert rows["start_ns"].n_unique() <= 61
