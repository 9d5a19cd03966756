"""Entries, refusals and episodes of each vCPU."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.story import Story, story, without

from tdxtrace.analysis.stats import vcpu_stats
from tdxtrace.analysis.zero_steps import zero_steps
from tdxtrace.errors import TableError
from tdxtrace.tables.events import SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import VCPU_STATS, ZERO_STEPS


def stats_of(scenario: Story) -> pl.DataFrame:
    steps = zero_steps(scenario.seamcalls, scenario.vm_entries, scenario.page_faults)
    return VCPU_STATS.check(vcpu_stats(scenario.seamcalls, scenario.vm_entries, steps))


def test_a_vcpu_is_the_thread_that_enters_it() -> None:
    scenario = story("enterB enterD enterX S1#3 enterC 2/enterC*7 3/S1", {1: 40})
    assert stats_of(scenario).to_dicts() == [
        {
            "source": 0,
            "tid": 1,
            "tgid": 40,
            "td_id": 0x7D003,
            "vp_id": 0x5B001,
            "vcpu_id": None,
            "n_entries": 4,
            "n_refused": 2,
            "zero_steps": 1,
            "zero_steps_weak": 0,
        },
        {
            "source": 0,
            "tid": 2,
            "tgid": None,
            "td_id": None,
            "vp_id": 0x5B007,
            "vcpu_id": None,
            "n_entries": 1,
            "n_refused": 0,
            "zero_steps": 0,
            "zero_steps_weak": 0,
        },
    ]


def test_without_a_probe_on_entries_kvms_events_count() -> None:
    row = stats_of(story("9/trackS#2 >C " + 7 * ">X ?1 " + ">F >F >C 1/S1#2")).row(0, named=True)
    assert (row["vcpu_id"], row["td_id"]) == (1, 0x7D002)
    assert (row["n_entries"], row["n_refused"]) == (11, 2)
    assert (row["zero_steps"], row["zero_steps_weak"]) == (1, 0)


def test_where_both_were_recorded_entries_count_once_and_kvm_gives_the_number() -> None:
    row = stats_of(story(">C enterC >X enterX >F enterB >C enterC")).row(0, named=True)
    assert (row["vp_id"], row["vcpu_id"]) == (0x5B001, 1)
    assert (row["n_entries"], row["n_refused"], row["zero_steps"]) == (4, 1, 1)


def test_weak_signs_have_a_column_of_their_own() -> None:
    row = stats_of(story(">F >C")).row(0, named=True)
    assert (row["zero_steps"], row["zero_steps_weak"]) == (0, 1)


def test_the_vcpu_with_most_episodes_comes_first() -> None:
    scenario = story(
        "enterC 2/enterD 2/enterC 3/enterB 3/enterC 3/enterB 3/enterC 4/enterB 4/enterC"
    )
    assert stats_of(scenario)["tid"].to_list() == [3, 4, 2, 1]


def test_vcpus_without_a_recorded_thread_share_a_row() -> None:
    scenario = story("enterC 2/enterC")
    calls = without(scenario.seamcalls, "tid", "vp_id")
    rows = vcpu_stats(calls, scenario.vm_entries, ZERO_STEPS.empty())
    assert VCPU_STATS.check(rows).select("tid", "n_entries").rows() == [(None, 2)]


words = st.builds(
    "{}{}".format,
    st.sampled_from(["", "2/", "3/"]),
    st.sampled_from(["S1", "enterB", "enterD", "enterC", "enterX", ">X", ">F", ">C", ">U", "?1"]),
)


@settings(max_examples=25)
@given(st.lists(words, max_size=60).map(" ".join))
def test_every_entry_and_episode_is_counted_once(text: str) -> None:
    scenario = story(text)
    stats = stats_of(scenario)
    probed = scenario.seamcalls.filter(pl.col("leaf") == 0)
    stock = scenario.vm_entries.filter(~pl.col("tid").is_in(probed["tid"].unique().to_list()))
    steps = zero_steps(scenario.seamcalls, scenario.vm_entries, scenario.page_faults)
    weak = steps.filter(pl.col("strength") == "weak").height
    assert stats["n_entries"].sum() == probed.height + stock.height
    assert stats["zero_steps"].sum() == steps.height - weak
    assert stats["zero_steps_weak"].sum() == weak


def test_empty_input_gives_an_empty_table() -> None:
    nothing = vcpu_stats(SEAMCALLS.empty(), VM_ENTRIES.empty(), ZERO_STEPS.empty())
    assert nothing.is_empty()
    assert nothing.schema == VCPU_STATS.schema


def test_columns_that_are_missing_are_named() -> None:
    with pytest.raises(TableError, match="vm_entries"):
        vcpu_stats(SEAMCALLS.empty(), VM_ENTRIES.empty().drop("tid"), ZERO_STEPS.empty())
