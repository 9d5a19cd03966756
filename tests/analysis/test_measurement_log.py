"""The order of the calls that make MRTD, and its text."""

from __future__ import annotations

import difflib

import polars as pl
import pytest
from support.story import story

from tdxtrace.analysis.measurement_log import measurement_log
from tdxtrace.report.build_text import measurement_text
from tdxtrace.tables.builds import MEASUREMENT_LOG

BUILD = "initS#1 addS1#1 extendS1#1 addS2#1 extendS2#1 finalizeS#1"


def text_of(words: str) -> list[str]:
    scenario = story(words)
    log = MEASUREMENT_LOG.check(measurement_log(scenario.seamcalls))
    return measurement_text(log, scenario.losses).splitlines()


def test_a_build_is_its_calls_in_order() -> None:
    assert text_of(BUILD) == [
        "TDH_MNG_INIT",
        "TDH_MEM_PAGE_ADD gpa=0x1000",
        "TDH_MR_EXTEND gpa=0x1000",
        "TDH_MEM_PAGE_ADD gpa=0x2000",
        "TDH_MR_EXTEND gpa=0x2000",
        "TDH_MR_FINALIZE",
    ]


def test_only_what_succeeded_is_measured() -> None:
    tried = "initS#1 addB1#1 addS1#1 extendE1#1 extendS1#1 finalizeB#1 finalizeS#1"
    assert text_of(tried) == text_of("initS#1 addS1#1 extendS1#1 finalizeS#1")


def test_two_builds_of_one_image_are_equal_line_by_line() -> None:
    beside = "initS#1 2/initS#2 addS1#1 2/addS1#2 extendS1#1 finalizeS#1 2/extendS1#2 2/finalizeS#2"
    lines = text_of(beside)
    at = lines.index("# build 2 of 2")
    assert lines[1:at] == lines[at + 1 :]
    other = text_of(BUILD)
    assert [line for line in difflib.ndiff(lines[1:at], other) if line[0] == "+"] == [
        "+ TDH_MEM_PAGE_ADD gpa=0x2000",
        "+ TDH_MR_EXTEND gpa=0x2000",
    ]


def test_a_td_built_again_at_one_address_is_another_build() -> None:
    assert text_of(f"{BUILD} {BUILD}").count("TDH_MNG_INIT") == 2
    assert "# build 2 of 2" in text_of(f"{BUILD} {BUILD}")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("addS1#1 finalizeS#1", "its TDH.MNG.INIT was not recorded"),
        ("initS#1 addS1#1", "no TDH.MR.FINALIZE was recorded"),
        (f"{BUILD} lost@1 enterC", "the recording has 1 loss"),
        ("initS#1 addU1#1 finalizeS#1", "the answers of 1 call were not recorded"),
    ],
)
def test_possibly_missing_calls_are_reported(words: str, why: str) -> None:
    assert text_of(words)[0] == f"# incomplete: {why}"


def test_nothing_recorded_says_which_probes_to_add() -> None:
    (line,) = text_of("B1 S1 enterC")
    assert line.startswith("# no TDH.MNG.INIT")


def test_a_call_without_a_recorded_td_is_of_the_only_one_of_its_thread() -> None:
    scenario = story(BUILD)
    is_extend = pl.col("leaf") == 16
    calls = scenario.seamcalls.with_columns(td_id=pl.when(~is_extend).then("td_id"))
    assert measurement_log(calls)["td_id"].unique().to_list() == [0x7D001]
