"""Updates of the TDX module: whether they stopped all CPUs, and which requests waited."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from support.story import Story, story

from tdxtrace.analysis.module_updates import module_updates
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.tables.events import LOSSES
from tdxtrace.tables.lifecycle import MODULE_UPDATES

RUNS = " >X 2/>X" * 3
UPDATE = "install(@1 install(@2 _28ms install)S@1 install)S@2"
UPDATED = f"{RUNS} {UPDATE} {RUNS}"


def of(scenario: Story) -> pl.DataFrame:
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    return MODULE_UPDATES.check(module_updates(scenario.trace, chains))


def test_an_update_during_which_nothing_ran_stopped_all_cpus() -> None:
    (row,) = of(story(UPDATED)).to_dicts()
    assert row["stopped"] == "all"
    assert (row["n_calls"], row["n_cpus"], row["n_meanwhile"]) == (2, 2, 0)
    assert row["end_ns"] - row["start_ns"] == 28_030_000
    assert row["longest_ns"] == 28_020_000
    assert row["stopped_ns"] == 28_050_000
    assert row["n_vcpus"] == 2
    assert row["longest_wait_ns"] > row["stopped_ns"]


def test_a_cpu_that_ran_meanwhile_was_not_stopped() -> None:
    text = UPDATED.replace("_28ms", "_20ms 2/S1 _8ms")
    (row,) = of(story(text)).to_dicts()
    assert (row["stopped"], row["n_meanwhile"], row["stopped_ns"]) == ("not_all", 2, None)
    assert row["n_vcpus"] == 1


def test_few_neighbouring_events_leave_the_stop_unknown() -> None:
    (row,) = of(story(f">X {UPDATE} >X")).to_dicts()
    assert row["stopped"] == "unknown"
    assert row["withheld"].startswith("4 other events")


def test_lost_events_leave_the_stop_unknown() -> None:
    scenario = story(UPDATED)
    row = {"source": 0, "kind": "lost_events", "severity": "data_loss", "n_lines": 1}
    lost = pl.DataFrame([row | {"detail": "", "advice": ""}], schema=LOSSES.schema)
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    (found,) = module_updates(replace(scenario.trace, losses=lost), chains).to_dicts()
    assert found["stopped"] == "unknown"
    assert "lost" in found["withheld"]


def test_a_call_without_an_end_leaves_the_stop_unknown() -> None:
    (row,) = of(story(f"{RUNS} install(@1 {RUNS}")).to_dicts()
    assert row["stopped"] == "unknown"
    assert "probe their entry and return" in row["withheld"]


@pytest.mark.parametrize(("status", "n_repeated", "n_failed"), [("I", 1, 0), ("F", 0, 1)])
def test_repeated_calls_and_their_answers_are_distinguished(
    status: str, n_repeated: int, n_failed: int
) -> None:
    (row,) = of(story(f"{RUNS} install(@1 install){status}@1 {RUNS}")).to_dicts()
    assert (row["n_repeated"], row["n_failed"]) == (n_repeated, n_failed)


def test_a_call_that_is_made_again_is_of_the_same_update() -> None:
    again = "install(@1 install)I@1 install(@1 install)S@1"
    assert of(story(again))["n_calls"].to_list() == [2]


def test_a_cpu_that_had_its_answer_begins_the_next_update() -> None:
    for status in "SF":
        once = f"install(@1 install){status}@1 install(@2 install)S@2"
        rows = of(story(f"{once} _1s {once}"))
        assert rows["update"].to_list() == [1, 2]
        assert rows["n_calls"].to_list() == [2, 2]


def test_calls_of_the_update_itself_are_not_other_events() -> None:
    scenario = story(UPDATED.replace("_28ms", "_20ms 9/trackS _8ms"))
    assert of(scenario)["stopped"].to_list() == ["not_all"]
    shutdown = pl.when(pl.col("tid") == 9).then(pl.lit(52, pl.UInt16)).otherwise("leaf")
    trace = replace(scenario.trace, seamcalls=scenario.seamcalls.with_columns(leaf=shutdown))
    rows = module_updates(trace, retry_chains(trace.seamcalls, trace.losses))
    assert rows["stopped"].to_list() == ["all"]


def test_requests_that_wait_for_it_are_counted() -> None:
    scenario = story(f"{RUNS} 5/B3 5/S3 3/B1 {UPDATE} 3/S1 4/S2 {RUNS}")
    assert of(scenario)["n_requests"].to_list() == [1]
