"""Times of a TD's boot phases."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from support.logs import WORDS
from support.story import Story, story

from tdxtrace.analysis.boot_phases import boot_phases
from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.tables.lifecycle import BOOT_PHASES

BUILD = "9/createS 9/initS 9/addS1 9/extendS1 9/finalizeS"
BOOT = "enterC mark enterX S1 enterX S2 enterX S3"
LIFE = f"{BUILD} {BOOT} _20ms enterC 9/reclaimS1 9/reclaimS2"
PROCESSES = {1: 7, 2: 7, 9: 7}


def of(scenario: Story) -> pl.DataFrame:
    calls = scenario.seamcalls
    chains = retry_chains(calls, scenario.losses)
    answers = busy_answers(calls, chains)
    rows = boot_phases(calls, scenario.vm_entries, scenario.host_events, chains, answers)
    return BOOT_PHASES.check(rows)


def phases(text: str) -> dict[str, dict[str, object]]:
    return {str(row["phase"]): row for row in of(story(text, PROCESSES)).to_dicts()}


def test_a_life_has_its_phases_in_order_without_a_gap() -> None:
    rows = of(story(LIFE, PROCESSES))
    assert rows["phase"].to_list() == [
        *("build", "measure", "finalize", "firmware", "accept", "running", "teardown")
    ]
    assert rows["end_ns"].to_list()[:-1] == rows["start_ns"].to_list()[1:]
    assert rows["withheld"].null_count() == rows.height
    result = dict(zip(rows["phase"], rows["n_calls"], strict=True))
    assert result == {
        **{"build": 2, "measure": 2, "finalize": 1, "firmware": 0},
        **{"accept": 3, "running": 0, "teardown": 2},
    }


def test_firmware_ends_at_its_last_mark() -> None:
    found = phases(LIFE.replace("mark", "mark _5ms mark"))
    assert found["firmware"]["n_marks"] == 2
    assert found["accept"]["n_marks"] == 0
    assert found["firmware"]["took_ns"] > 5_000_000  # type: ignore[operator]


def test_accepting_begins_behind_the_last_mark() -> None:
    scenario = story(LIFE, PROCESSES)
    (mark,) = scenario.host_events["ts_ns"]
    assert of(scenario).filter(phase="accept")["start_ns"].to_list() == [mark + 1]


def test_without_marks_firmware_ends_at_the_first_page_and_says_so() -> None:
    found = phases(LIFE.replace("mark ", ""))
    assert "kvm_pio" in str(found["firmware"]["withheld"])
    assert found["firmware"]["n_marks"] is None
    assert found["accept"]["began_by"] == "last mark of the firmware, else TDH.MEM.PAGE.AUG"


def test_accepting_ends_where_no_page_is_asked_for() -> None:
    found = phases(f"{BUILD} {BOOT} _9ms S4 enterX _11ms S5 enterX")
    assert found["accept"]["n_pages"] == 4
    assert found["running"]["n_pages"] == 1


def test_retries_are_told_from_work() -> None:
    text = LIFE.replace("S2 enterX", "B2 _50us B2 S2 enterX")
    row = phases(text)["accept"]
    assert (row["n_retries"], row["retry_ns"], row["wait_ns"]) == (2, 20_000, 70_000)
    assert row["call_ns"] == 30_000


def test_a_td_that_was_built_before_is_running() -> None:
    found = phases("enterX S1 enterX S2 enterX")
    assert list(found) == ["running"]
    assert "the build of the TD was not recorded" in str(found["running"]["withheld"])


def test_marks_tell_that_a_td_boots_whose_build_was_not_recorded() -> None:
    assert list(phases("S9 enterC mark enterX S1 enterX _1s S2")) == [
        *("firmware", "accept", "running")
    ]


def test_a_mark_of_another_vm_is_none_of_its_own() -> None:
    scenario = story(LIFE.replace("mark", "5/mark"), PROCESSES | {5: 8})
    assert "kvm_pio" in str(of(scenario).filter(phase="firmware")["withheld"][0])


def test_conversions_and_calls_of_the_guest_are_counted() -> None:
    row = phases(LIFE.replace("_20ms", "attr3 >C attr1"))["running"]
    assert (row["converted_bytes"], row["n_tdcalls"]) == (4 * 4096, 1)


def test_a_build_alone_is_no_run() -> None:
    assert list(phases("9/createS 9/initS 9/addS1")) == ["build", "measure"]


def test_threads_that_no_td_is_known_of_leave_the_guest_untold() -> None:
    scenario = story(f"{BUILD} 2/createS#2 enterC 9/blockS5", {9: 7, 1: 8, 2: 9})
    row = of(scenario).filter(pl.col("td_id") == 0x7D000, phase="running").to_dicts()[0]
    assert row["guest_ns"] == 0
    assert "no recorded entry is known" in row["withheld"]


@pytest.mark.parametrize("text", ["", "enterX", "2/>X"])
def test_no_td_is_no_row(text: str) -> None:
    assert of(story(text)).is_empty()


@given(WORDS)
def test_phases_do_not_overlap_and_hold_every_call(words: list[str]) -> None:
    rows = of(story(" ".join(words)))
    for _, life in rows.group_by("source", "td_id", maintain_order=True):
        assert life["phase"].n_unique() == life.height
        assert (life["end_ns"] - life["start_ns"] == life["took_ns"]).all()
        assert life["end_ns"].to_list()[:-1] == life["start_ns"].to_list()[1:]
