"""The counters that a host would keep per TD."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.logs import WORDS
from support.story import Story, story, without

from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.analysis.stats import counters, vm_stats
from tdxtrace.analysis.zero_steps import zero_steps
from tdxtrace.errors import TableError
from tdxtrace.tables.findings import COUNTED, COUNTERS, RETRY_CHAINS, VM_STATS, ZERO_STEPS


def stats_of(scenario: Story, calls: pl.DataFrame | None = None) -> pl.DataFrame:
    calls = scenario.seamcalls if calls is None else calls
    steps = zero_steps(calls, scenario.vm_entries, scenario.page_faults)
    return VM_STATS.check(vm_stats(retry_chains(calls, scenario.losses), steps))


def test_a_td_counts_each_retried_request_once() -> None:
    scenario = story("B1#1 B1#1 S1#1 S2#1 trackP#1 trackS#1 2/S1#2 enterB enterC 2/enterC")
    rows = stats_of(scenario).to_dicts()
    assert rows == [
        {
            "source": 0,
            "td_id": 0x7D001,
            "tgid": None,
            "n_seamcalls": 8,
            "n_requests": 4,
            "retried_seamcalls": 3,
            "n_busy": 4,
            "max_attempts": 3,
            "n_vcpus": 1,
            "zero_steps": 1,
        },
        {
            "source": 0,
            "td_id": 0x7D002,
            "tgid": None,
            "n_seamcalls": 2,
            "n_requests": 2,
            "retried_seamcalls": 0,
            "n_busy": 0,
            "max_attempts": 1,
            "n_vcpus": 1,
            "zero_steps": 0,
        },
    ]


def test_threads_of_a_td_share_its_process_whether_it_was_printed_or_not() -> None:
    scenario = story("S1#1 2/S2#1 3/S3#2", {1: 10, 3: 11})
    assert stats_of(scenario).select("td_id", "tgid", "n_requests").sort("tgid").rows() == [
        (0x7D001, 10, 2),
        (0x7D002, 11, 1),
    ]


def test_requests_of_unknown_tds_are_counted_by_process_or_together() -> None:
    scenario = story("S1 2/S2 3/S3 4/S4", {1: 10, 2: 11})
    calls = without(scenario.seamcalls, "td_id")
    rows = stats_of(scenario, calls).select("td_id", "tgid", "n_requests").rows()
    assert sorted(rows, key=str) == [(None, 10, 1), (None, 11, 1), (None, None, 2)]


def test_weak_episodes_are_left_out() -> None:
    scenario = story("S1 2/>F 2/>C")
    assert (
        zero_steps(scenario.seamcalls, scenario.vm_entries, scenario.page_faults)["strength"][0]
        == "weak"
    )
    assert stats_of(scenario)["zero_steps"].sum() == 0


ARMED = "9/trackS >C " + 7 * ">X ?1 "


@pytest.mark.parametrize(
    ("text", "processes"),
    [
        (ARMED + ">F >C", {}),
        (ARMED + ">F >C", {1: 10}),
        (ARMED + ">F >C 2/S1", {1: 10, 2: 10}),
        (ARMED + ">F >C 2/S1", {1: 10, 2: 11}),
        (ARMED + ">F >C S1", {}),
    ],
)
def test_an_episode_is_counted_also_where_its_vcpu_made_no_captured_seamcall(
    text: str, processes: dict[int, int]
) -> None:
    rows = stats_of(story(text, processes)).filter(pl.col("zero_steps") > 0)
    assert rows["zero_steps"].to_list() == [1]
    assert rows["tgid"].to_list() == [processes.get(1)]


words = st.builds(
    "{}{}".format,
    st.sampled_from(["", "2/", "3/"]),
    st.sampled_from(["B1", "S1", "S2#1", "B1#1", "trackS", "enterB", "enterC", ">X", ">F", ">C"]),
)
stories = st.lists(words, max_size=60).map(" ".join)


@settings(max_examples=25)
@given(stories, st.dictionaries(st.integers(1, 3), st.integers(10, 11)))
def test_every_request_is_counted_once(text: str, processes: dict[int, int]) -> None:
    scenario = story(text, processes)
    stats = stats_of(scenario)
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    steps = zero_steps(scenario.seamcalls, scenario.vm_entries, scenario.page_faults)
    assert stats["n_seamcalls"].sum() == scenario.seamcalls.height
    assert stats["n_requests"].sum() == chains.height
    assert stats["retried_seamcalls"].sum() == chains.filter(pl.col("n_busy") > 0).height
    assert stats["n_busy"].sum() == chains["n_busy"].sum()
    assert stats["zero_steps"].sum() == steps.filter(pl.col("strength") != "weak").height


def test_empty_input_gives_an_empty_table() -> None:
    nothing = vm_stats(RETRY_CHAINS.empty(), ZERO_STEPS.empty())
    assert nothing.is_empty()
    assert nothing.schema == VM_STATS.schema


def test_columns_that_are_missing_are_named() -> None:
    with pytest.raises(TableError, match="zero_steps"):
        vm_stats(RETRY_CHAINS.empty(), ZERO_STEPS.empty().drop("tid"))


@given(WORDS)
def test_counters_end_at_what_the_td_counted(words: list[str]) -> None:
    scenario = story(" ".join(words))
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    steps = zero_steps(scenario.seamcalls, scenario.vm_entries, scenario.page_faults)
    rows = COUNTERS.check(counters(chains, busy_answers(scenario.seamcalls, chains), steps))
    last = rows.group_by("source", "td_id", "tgid", "counter").agg(pl.col("total").max())
    told_last = {(row["td_id"], row["counter"]): row["total"] for row in last.to_dicts()}
    for row in vm_stats(chains, steps).to_dicts():
        for name in COUNTED:
            assert told_last.pop((row["td_id"], name), 0) == row[name]
    assert not told_last


def test_a_counter_goes_up_at_the_first_busy_answer_alone() -> None:
    scenario = story("B1#1 B1#1 S1#1 2/B1#2 enterB enterB enterC B2#1")
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    steps = zero_steps(scenario.seamcalls, scenario.vm_entries, scenario.page_faults)
    rows = counters(chains, busy_answers(scenario.seamcalls, chains), steps)
    assert rows.select("td_id", "counter", "total").rows() == [
        (0x7D001, "retried_seamcalls", 1),
        (0x7D002, "retried_seamcalls", 1),
        (0x7D001, "zero_steps", 1),
        (0x7D001, "retried_seamcalls", 2),
        (0x7D001, "retried_seamcalls", 3),
    ]
    assert rows["ts_ns"].is_sorted()
