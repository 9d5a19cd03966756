"""Sections on accepting, boot, TDVMCALLs and updates are shown if they have content."""

from __future__ import annotations

import polars as pl
import pytest
from support.story import story

from tdxtrace.pipeline import analyze
from tdxtrace.report.charts.accept_rates import MAX_TDS, MIN_SLICES, rate_rows
from tdxtrace.report.outline import sections
from tdxtrace.report.section import Section

NAMES = ("accept_rates", "boot_phases", "tdvmcalls", "module_updates")
BUILD = "9/createS 9/initS 9/addS1 9/extendS1 9/finalizeS"
LIFE = f"{BUILD} enterC mark enterX B1 S1 enterX _20ms S2 enterC 9/reclaimS1"
RUNS = " >X 2/>X" * 3
UPDATED = f"{RUNS} install(@1 _28ms install)S@1 {RUNS}"


def shown(text: str) -> dict[str, Section]:
    result = analyze(story(text, {1: 7, 2: 7, 9: 7}).trace)
    return {s.name: s for s in sections(result) if s.name in NAMES}


def test_sections_without_content_are_not_shown() -> None:
    assert list(shown("B1 S1 2/trackS")) == ["accept_rates"]
    assert not shown("9/trackS")


def test_accepting_says_its_rate_its_parts_and_intels_figures() -> None:
    section = shown("enterX S1 enterX S2 enterX 2/enterX 2/S3")["accept_rates"]
    rate, parts, beside = section.says
    assert rate.startswith("2 vCPUs at a time were given ")
    assert parts.startswith("Their time: ")
    assert "32 of 32 vCPUs 699,051 to 762,601" in beside
    assert len(section.grids[0].rows) == 1


def test_a_chart_has_a_bar_for_each_slice_of_each_td() -> None:
    assert not shown("S1 S2")["accept_rates"].figures
    findings = analyze(story(" _1ms ".join(f"S{n}" for n in range(1, 7)), {1: 7}).trace)
    rates = findings.accept_rates.filter(pl.col("tid").is_null())
    bars = rate_rows(rates)
    assert bars.height == rates.height >= MIN_SLICES
    assert bars["pages_per_s"].to_list() == rates["pages_per_s"].to_list()
    assert bars["from_s"][0] == 0
    section = next(s for s in sections(findings) if s.name == "accept_rates")
    (figure,) = section.figures
    assert len(figure.draw().to_dict()["datasets"].popitem()[1]) == bars.height


def test_the_tds_with_most_pages_are_drawn_and_named_by_input() -> None:
    rates = analyze(story("S1", {1: 7}).trace).accept_rates.filter(pl.col("tid").is_null())
    many = pl.concat(
        rates.with_columns(
            source=pl.lit(n % 2, pl.UInt16),
            td_id=pl.lit(n, pl.UInt64),
            n_pages=pl.lit(n + 1, pl.UInt64),
        )
        for n in range(10)
    )
    bars = rate_rows(many)
    assert len(bars) == MAX_TDS
    assert bars["td"][0] == "0x9, input 1"


def test_without_entries_the_limiting_part_is_unknown() -> None:
    section = shown("S1 S2")["accept_rates"]
    assert section.says[1].startswith("What limits it is not known: entries of the vCPUs")
    assert section.grids[0].rows[0][6] == "-"


def test_a_life_is_a_row_for_each_phase() -> None:
    section = shown(LIFE)["boot_phases"]
    assert [row[1] for row in section.grids[0].rows] == [
        *("build", "measure", "finalize", "firmware", "accept", "running", "teardown")
    ]
    assert section.says[0].startswith("Longest: running of 0x7d000, 20")
    assert section.says[1].startswith("Retries took ")


def test_tdvmcalls_are_listed_by_function() -> None:
    section = shown(">H >H >C exit3 >X >C")["tdvmcalls"]
    assert [row[:2] for row in section.grids[0].rows] == [
        *(("Instruction.HLT", "2"), ("MapGPA", "1"), ("TDCALL", "1"))
    ]
    assert "the trace ends" in section.says[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (UPDATED, "on 1 CPU for 28ms; all CPUs stopped, for at most 28"),
        (UPDATED.replace("_28ms", "S1 _28ms"), "; not all CPUs stopped: 2 events meanwhile."),
        ("install(@1 install)S@1", "; whether all CPUs stopped is not known: 0 other events"),
    ],
)
def test_an_update_is_one_sentence(text: str, says: str) -> None:
    (sentence,) = shown(text)["module_updates"].says
    assert says in sentence
