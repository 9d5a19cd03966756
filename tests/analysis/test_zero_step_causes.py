"""Causes of zero-step episodes, one small scenario per cause."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.story import LEAVES, Story, story, without

from tdxtrace.analysis.block_rounds import block_rounds
from tdxtrace.analysis.fault_handling import explain_faults, number_faults
from tdxtrace.analysis.step_thresholds import step_thresholds
from tdxtrace.analysis.zero_step_causes import zero_step_causes
from tdxtrace.analysis.zero_steps import zero_steps
from tdxtrace.errors import TableError
from tdxtrace.tables.findings import STEP_THRESHOLDS, ZERO_STEP_CAUSES

REFUSED = "enterB enterC"
FAULT = "enterX ?1 "
SPLIT = "2/blockS1 " + 7 * FAULT + "enterB 2/demoteS1 "


def causes_of(scenario: Story, **options: int) -> pl.DataFrame:
    steps = zero_steps(
        scenario.seamcalls, scenario.vm_entries, scenario.page_faults, scenario.host_events
    )
    found = zero_step_causes(steps, scenario.trace, **options)
    assert found.select("source", "first_seq", "form").equals(
        steps.select("source", "first_seq", "form")
    )
    return ZERO_STEP_CAUSES.check(found)


def cause(text: str, **options: int) -> tuple[str, float]:
    row = causes_of(story(text), **options).row(0, named=True)
    return row["cause"], round(row["share"], 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Userspace is told of a page to convert, and enters again without.
        (7 * (FAULT + "out14 ") + REFUSED, ("memory_fault_ignored", 1.0)),
        (4 * (FAULT + "out14 ") + 3 * FAULT + REFUSED, ("memory_fault_ignored", 0.57)),
        # Another exit to userspace is none.
        (7 * (FAULT + "out4 ") + REFUSED, ("unknown", 0.0)),
        # Blocked and unblocked as it was.
        ("2/blockS1 " + 7 * FAULT + "enterB 2/unblockS1 enterC", ("block_churn", 1.0)),
        # A range with a table may be merged, by a call that no probe shows; one page may not.
        ("2/blockS0^1 " + 7 * FAULT + "enterB 2/unblockS0^1 enterC", ("block_undone", 1.0)),
        ("S0^1 2/blockS0^1 " + 7 * FAULT + "enterB 2/unblockS0^1 enterC", ("block_churn", 1.0)),
        (
            "promoteS512^1 2/blockS0^1 " + 7 * FAULT + "enterB 2/unblockS0^1 enterC",
            ("block_churn", 1.0),
        ),
        # Blocked, and then removed or split.
        ("2/blockS1 " + 7 * FAULT + "enterB 2/trackS 2/removeS1", ("invalidation", 1.0)),
        (SPLIT, ("invalidation", 1.0)),
        # ... merged later, and split once more; those of another range say nothing.
        (SPLIT + "promoteS1", ("invalidation", 1.0)),
        (SPLIT + "promoteS1 demoteS1", ("block_undone", 1.0)),
        (SPLIT + "promoteS2 demoteS2", ("invalidation", 1.0)),
        # Blocked, and the trace ends: to be unblocked or removed, who knows.
        ("2/blockS1 " + 7 * FAULT + REFUSED, ("unknown", 0.0)),
        # A BLOCK that failed blocks nothing; one of another page or TD not this one.
        ("2/blockE1 " + 7 * FAULT + "enterB 2/unblockE1", ("unknown", 0.0)),
        ("2/blockS2 " + 7 * FAULT + "enterB 2/unblockS2", ("unknown", 0.0)),
        ("K1 2/blockS1#7 " + 7 * FAULT + "enterB 2/unblockS1#7", ("unknown", 0.0)),
        # The vCPU's own install met busy, and KVM left its loop.
        (7 * (FAULT + "K1 ") + REFUSED, ("left_loop", 1.0)),
        # One instruction over many pages, each served.
        (
            "".join(f"enterX ?{page} S{page} " for page in range(1, 8)) + REFUSED,
            ("many_pages", 1.0),
        ),
        # Six pages are what the module lets pass; their number explains nothing.
        (
            "".join(f"enterX ?{page} S{page} " for page in (1, 2, 3, 4, 5, 6, 6)) + REFUSED,
            ("unknown", 0.0),
        ),
        # Another thread was installing the page all the while.
        ("2/(1 " + 7 * FAULT + "2/)S " + REFUSED, ("frozen_spte", 1.0)),
        ("2/(2 " + 7 * FAULT + "2/)S " + REFUSED, ("unknown", 0.0)),
        # Installed before the entry that faulted, and not blocked since.
        ("2/blockS9 S1 " + 7 * FAULT + REFUSED, ("pending_page", 1.0)),
        # Nobody would have seen a BLOCK.
        ("S1 " + 7 * FAULT + REFUSED, ("unknown", 0.0)),
        # No majority is no cause.
        (3 * (FAULT + "out14 ") + 3 * (FAULT + "K1 ") + FAULT + REFUSED, ("unknown", 0.0)),
    ],
)
def test_each_cause(text: str, expected: tuple[str, float]) -> None:
    assert cause(text) == expected


def test_a_probe_that_every_leaf_passes_shows_that_no_merge_was_tried() -> None:
    """``capture --seamcalls``: PROMOTE goes through __seamcall_ret, as BLOCK does."""
    scenario = story("2/blockS0^1 " + 7 * FAULT + "enterB 2/trackS 2/unblockS0^1 enterC")
    for function, expected in (("track", "block_undone"), ("block", "block_churn")):
        for row in scenario.calls:
            row["probe"] = "seamcall" if row["leaf"] == LEAVES[function] else row["probe"]
        assert causes_of(scenario)["cause"].to_list() == [expected]


def test_an_invalidation_of_many_pages_is_a_memslot_change() -> None:
    removals = "".join(f"2/blockS{p} 2/removeS{p} " for p in range(2, 8))
    text = "2/blockS1 " + 7 * FAULT + "enterB 2/removeS1 " + removals
    assert cause(text)[0] == "invalidation"
    assert cause(text, memslot_pages=6)[0] == "memslot_change"
    assert cause(text, memslot_pages=7)[0] == "invalidation"


def test_evidence_is_a_row_that_shows_the_cause() -> None:
    scenario = story("2/blockS1 " + 7 * FAULT + "enterB 2/unblockS1 enterC")
    row = causes_of(scenario).row(0, named=True)
    shown = scenario.seamcalls.filter(pl.col("seq") == row["evidence_seq"])
    assert shown["leaf"].to_list() == [7]
    scenario = story(7 * (FAULT + "out14 ") + REFUSED)
    row = causes_of(scenario).row(0, named=True)
    assert row["evidence_seq"] in scenario.host_events["seq"]
    assert (row["n_faults"], row["n_pages"], row["n_memory_fault"]) == (7, 1, 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (7 * "enterX " + REFUSED, ["kvm_page_fault", "userspace_exit", "page_aug", "range_block"]),
        (7 * FAULT + REFUSED, ["userspace_exit", "page_aug", "range_block"]),
        ("S9 2/blockS9 out4 " + 7 * FAULT + REFUSED, ["RIP", "possibly_epf_stepping"]),
    ],
)
def test_an_unknown_cause_says_what_to_record(text: str, words: list[str]) -> None:
    (advice,) = causes_of(story(text))["advice"]
    assert all(word in advice for word in words)
    assert ("kvm_page_fault" in words) == ("kvm_page_fault" in advice)


def test_episodes_of_kvms_own_events_have_causes_too() -> None:
    scenario = story(7 * ">X ?1 out14 " + ">F >C")
    found = causes_of(scenario)
    assert found.select("form", "cause").rows() == [("failed_vmentry", "memory_fault_ignored")]


def test_a_trace_without_episodes_has_no_causes() -> None:
    assert causes_of(story("")).is_empty()
    assert causes_of(story("B1 S1 " + 7 * FAULT + "enterC")).is_empty()


def test_a_table_of_another_kind_is_refused() -> None:
    scenario = story(FAULT)
    with pytest.raises(TableError):
        zero_step_causes(scenario.seamcalls, scenario.trace)


WORDS = st.lists(
    st.sampled_from(
        ["enterX", "enterB", "enterC", "?1", "?2", "S1", "K1", "out14", "2/blockS1", "2/removeS1"]
        + ["2/unblockS1", "2/(1", ">X", ">F", ">C", "2/enterX", "2/?1", "_"]
    ),
    max_size=40,
)


@settings(max_examples=20)
@given(WORDS, st.booleans())
def test_every_fault_has_one_explanation(words: list[str], with_arguments: bool) -> None:
    kept = [w for i, w in enumerate(words) if w != "2/(1" or w not in words[:i]]
    scenario = story(" ".join(kept))
    if not with_arguments:
        scenario.calls = without(scenario.seamcalls, "td_id", "gpa", "level").to_dicts()
    causes_of(scenario)  # checks the table's rules


# What each threshold would have made.


def sweep(text: str) -> dict[int, tuple[int, int]]:
    scenario = story(text)
    found = step_thresholds(scenario.seamcalls, scenario.vm_entries, scenario.page_faults)
    STEP_THRESHOLDS.check(found)
    return {row["threshold"]: (row["n_runs"], row["n_faults"]) for row in found.to_dicts()}


@pytest.mark.parametrize("fault", ["enterX ?1 K1 ", ">X ?1 "])
def test_a_run_counts_for_every_threshold_below_it(fault: str) -> None:
    end = "enterC " if fault.startswith("enter") else ">C "
    found = sweep(9 * fault + end + 5 * fault + end)
    assert list(found) == list(range(4, 17))
    assert found[4] == (2, 5 + 1)
    assert found[5] == (1, 4)
    assert (found[8], found[9], found[16]) == ((1, 1), (0, 0), (0, 0))


def test_progress_ends_a_run() -> None:
    assert sweep(5 * FAULT + "enterC " + 5 * FAULT)[5] == (0, 0)
    assert sweep(5 * FAULT + "enterQ " + 5 * FAULT)[5] == (1, 5)
    assert sweep(5 * FAULT + "S1 " + 5 * FAULT)[5] == (0, 0)


def test_two_vcpus_are_two_runs() -> None:
    scenario = story(5 * ("enterX 2/enterX "))
    row = step_thresholds(scenario.seamcalls, scenario.vm_entries, scenario.page_faults).row(
        0, named=True
    )
    assert (row["n_runs"], row["n_vcpus"], row["max_run"]) == (2, 2, 5)


def test_an_install_by_another_vcpu_ends_no_fault() -> None:
    assert cause("2/enterX 2/?2 " + 7 * (FAULT + "K1 ") + REFUSED) == ("left_loop", 1.0)


def test_runs_of_one_length_are_all_counted() -> None:
    assert sweep(3 * (5 * FAULT + "enterC "))[4] == (3, 3)
    assert sweep(2 * (6 * FAULT + "enterC ") + 5 * FAULT)[4] == (3, 2 * 2 + 1)


def test_vcpus_do_not_affect_each_other() -> None:
    scenario = story(3 * FAULT + "S1 " + "2/enterX 2/enterX 2/enterX 2/enterX 2/enterX")
    row = step_thresholds(scenario.seamcalls, scenario.vm_entries, scenario.page_faults).row(
        0, named=True
    )
    assert (row["n_runs"], row["n_faults"], row["n_vcpus"]) == (1, 1, 1)


words = st.sampled_from(
    ["enterX", "?1", "?2", "S1", "K1", "out14", "enterC", "2/enterX", "2/?1", "2/S1", "2/blockS1"]
    + ["2/unblockS1", ">X", "enterQ", "2/out14"]
)


@settings(max_examples=40)
@given(st.lists(words, max_size=25), st.data())
def test_a_fault_has_the_same_explanation_alone_or_with_others(
    text: list[str], data: st.DataObject
) -> None:
    scenario = story(" ".join(text))
    every = number_faults(scenario.seamcalls, scenario.page_faults)
    rounds = block_rounds(scenario.trace, every)
    rest = (scenario.seamcalls, scenario.vm_entries, scenario.host_events, rounds)
    some = data.draw(st.lists(st.booleans(), min_size=every.height, max_size=every.height))
    whole = explain_faults(every, *rest).sort("tid", "nth")
    wanted = explain_faults(every.filter(pl.Series(some, dtype=pl.Boolean)), *rest)
    keys = ["source", "tid", "nth"]
    assert wanted.sort("tid", "nth").equals(
        whole.join(wanted, on=keys, how="semi").sort("tid", "nth")
    )
    assert wanted.height == sum(some)


def test_without_entries_there_are_no_runs() -> None:
    assert sweep("B1 S1") == {}


# Pages of every level, and what only looks like a cause.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # An honest removal of a 2 MB page, and of 1 GB, with faults inside.
        ("2/blockS512^1 " + 7 * "enterX ?700 " + "enterB 2/trackS 2/removeS512^1", "invalidation"),
        ("2/blockS0^2 " + 7 * "enterX ?7000 " + "enterB 2/trackS 2/removeS0^2", "invalidation"),
        # Its neighbour's: just behind the end, just before the beginning.
        ("2/blockS512^1 " + 7 * "enterX ?1024 " + "enterB 2/removeS512^1", "unknown"),
        ("2/blockS512^1 " + 7 * "enterX ?511 " + "enterB 2/removeS512^1", "unknown"),
        # No address of a 2 MB page: the level was read with the wrong base, and it is one of 4 KB.
        ("2/blockS700^1 " + 7 * "enterX ?701 " + "enterB 2/removeS700^1", "unknown"),
        ("2/blockS700^1 " + 7 * "enterX ?700 " + "enterB 2/removeS700^1", "invalidation"),
        # Level not recorded: that of another call on the same address, or 4 KB.
        ("S512^1 2/blockS512^1 " + 7 * "enterX ?700 " + "enterB 2/removeS512^1", "invalidation"),
        # A 2 MB page, split, of which one 4 KB page is taken away later.
        (
            "S512^1 2/blockS512^1 2/demoteS512^1 2/blockS700 "
            + 7 * "enterX ?700 "
            + "enterB 2/removeS700",
            "invalidation",
        ),
        # A 2 MB page that another thread installs; one installed and not accepted.
        ("2/(512^1 " + 7 * "enterX ?700 " + "2/)S enterB enterC", "frozen_spte"),
        ("2/blockS9 S512^1 " + 7 * "enterX ?700 " + REFUSED, "pending_page"),
        # Another thread removes a page of the same 2 MB meanwhile, or of others.
        ("S9 2/remove(5 " + 7 * FAULT + "2/)S " + REFUSED, "invalidation"),
        ("S9 2/remove(600 " + 7 * FAULT + "2/)S " + REFUSED, "unknown"),
        # Writes that an export blocks: the page is there, and accepted.
        ("2/blockS9 S1 2/blockwS " + 7 * FAULT + "2/unblockwS1 " + REFUSED, "unknown"),
        # An install that failed for good is no loop that was left.
        (7 * (FAULT + "E1 ") + REFUSED, "unknown"),
        (7 * (FAULT + "septS1 ") + REFUSED, "left_loop"),
        # Many vCPUs accept in parallel, each of them serves its own.
        (
            "".join(f"enterX ?{p} 2/enterX 2/?{p + 50} S{p} 2/S{p + 50} " for p in range(1, 9))
            + REFUSED,
            "many_pages",
        ),
    ],
)
def test_pages_are_matched_by_level(text: str, expected: str) -> None:
    assert cause(text)[0] == expected


def test_a_level_that_was_not_recorded_is_that_of_other_calls_on_the_address() -> None:
    scenario = story("S512^1 2/blockS512^1 " + 7 * "enterX ?700 " + "enterB 2/removeS512^1")
    for row in scenario.calls[1:]:
        row["level"] = None
    assert causes_of(scenario)["cause"].to_list() == ["invalidation"]


def test_memory_slots_of_large_pages_are_measured_in_pages() -> None:
    removals = "".join(f"2/blockS{512 * n}^1 2/removeS{512 * n}^1 " for n in range(2, 4))
    text = "2/blockS512^1 " + 7 * "enterX ?700 " + "enterB 2/removeS512^1 " + removals
    assert cause(text, memslot_pages=1535)[0] == "memslot_change"
    assert cause(text, memslot_pages=1536)[0] == "invalidation"
