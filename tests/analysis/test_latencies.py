"""Durations of busy and successful calls, and pauses between attempts."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from support.story import Story, story, without

from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.latencies import latencies
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS, LATENCIES


def rows_of(scenario: Story, calls: pl.DataFrame | None = None) -> list[dict[str, Any]]:
    calls = scenario.seamcalls if calls is None else calls
    chains = retry_chains(calls, scenario.losses)
    return LATENCIES.check(latencies(calls, chains, busy_answers(calls, chains))).to_dicts()


def test_the_ratio_is_of_medians_and_lies_in_its_interval() -> None:
    # Busy answers take 10 us; a success that other calls interrupt takes 30 us.
    (row,) = rows_of(story("B1 ( _20us )S " * 30))
    assert (row["n_busy"], row["n_succeeded"]) == (30, 30)
    assert (row["busy_ns"], row["succeeded_ns"]) == (10_000, 30_000)
    assert row["busy_ratio"] == pytest.approx(1 / 3)
    assert row["busy_ratio_low"] <= row["busy_ratio"] <= row["busy_ratio_high"]
    assert row["withheld"] is None


def test_one_interrupt_does_not_move_the_ratio() -> None:
    (row,) = rows_of(story("B1 S1 " * 30 + "( _7s )S"))
    assert row["busy_ratio"] == 1.0


def test_pauses_run_from_a_busy_answer_to_the_next_try_whatever_lies_between() -> None:
    (row,) = rows_of(story("B1 B1 _5ms S1 _7s B2 2/S9 S2"))
    assert (row["n_gaps"], row["p50_gap_ns"], row["max_gap_ns"]) == (3, 30_000, 5_010_000)


def test_a_request_that_was_left_busy_has_no_pause_after_its_last_answer() -> None:
    (row,) = rows_of(story("B1 B1 S2"))
    assert (row["n_busy"], row["n_gaps"]) == (2, 1)


def test_the_ratio_is_withheld_for_entries_which_return_when_the_guest_does() -> None:
    (row,) = rows_of(story("enterB enterX"))
    assert (row["succeeded_ns"], row["busy_ratio"]) == (None, None)
    assert "guest" in row["withheld"]


def test_the_ratio_is_withheld_without_successes_or_entries() -> None:
    (row,) = rows_of(story("B1 B1"))
    assert row["withheld"] == "no successes whose beginning and end were seen"
    scenario = story("B1 S1")
    (row,) = rows_of(scenario, without(scenario.seamcalls, "start_ns"))
    assert row["withheld"] == "no busy answers whose beginning and end were seen"


def test_the_ratio_is_withheld_where_the_clock_is_too_coarse() -> None:
    scenario = story("B1 S1")
    (row,) = rows_of(scenario, scenario.seamcalls.with_columns(end_ns="start_ns"))
    assert row["withheld"] == "half of the busy answers took no time by this clock"


def test_few_calls_give_a_ratio_without_an_interval() -> None:
    (row,) = rows_of(story("B1 S1"))
    assert row["busy_ratio"] == 1.0
    assert (row["busy_ratio_low"], row["busy_ratio_high"]) == (None, None)
    assert row["withheld"] == "too few calls for both ends of the interval"


def test_leaves_that_were_never_busy_have_no_row() -> None:
    rows = rows_of(story("trackS B1 S1 blockB1 blockS1"))
    assert [row["leaf"] for row in rows] == [6, 7]


def test_empty_input_gives_an_empty_table() -> None:
    nothing = latencies(SEAMCALLS.empty(), RETRY_CHAINS.empty(), BUSY_ANSWERS.empty())
    assert nothing.equals(LATENCIES.empty())
