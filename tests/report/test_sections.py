"""Sections on causes, outcomes, costs and zero-step episodes, for small traces."""

from __future__ import annotations

import dataclasses

import polars as pl
import pytest
from support.running import SAMPLES
from support.story import story

from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.report.charts.limits import threshold_rows
from tdxtrace.report.charts.time_shares import MAX_BARS, share_rows
from tdxtrace.report.outline import sections
from tdxtrace.report.section import Section
from tdxtrace.report.sections import zero_steps
from tdxtrace.tables.catalog import TABLES
from tdxtrace.tables.findings import STEP_CAUSES
from tdxtrace.tables.trace import Findings

SECTIONS = (
    *("latencies", "time_shares", "td_conflicts", "abandoned_requests", "progress_loops"),
    *("zero_step_causes", "step_thresholds"),
)


def section_of(findings: Findings, name: str) -> Section:
    (section,) = [section for section in sections(findings) if section.name == name]
    return section


def of(text: str, name: str) -> Section:
    return section_of(analyze(story(text).trace), name)


@pytest.fixture(scope="module")
def stepping() -> Findings:
    return analyze(read_trace(SAMPLES / "zerostep.txt"))


# Without findings there is one sentence, and no table.

EMPTY = {
    ("", "latencies"): "No SEAMCALL was answered busy.",
    ("", "time_shares"): "No SEAMCALL was captured.",
    ("", "td_conflicts"): "No SEAMCALL was answered busy.",
    ("", "abandoned_requests"): "No request was captured.",
    ("", "progress_loops"): "No request was captured.",
    ("", "zero_step_causes"): "Unknown: no entry of a vCPU was captured.",
    ("", "step_thresholds"): "Unknown: no entry of a vCPU was captured.",
    ("S1 S2", "abandoned_requests"): "No request was abandoned in this trace.",
    ("S1", "progress_loops"): (
        "Nothing was repeated without a lock conflict; no vCPU was idle after a fault."
    ),
    ("enterS S1 enterS", "zero_step_causes"): ("There is no zero-step episode in this trace."),
    ("enterS S1 enterS", "step_thresholds"): (
        "No run of faults exceeds 4, the lowest threshold tried: the longest has 0 faults."
    ),
}


@pytest.mark.parametrize(("text", "name"), EMPTY)
def test_no_findings_are_one_sentence(text: str, name: str) -> None:
    section = of(text, name)
    assert section.says == [EMPTY[text, name]]
    assert not section.grids
    assert not section.figures


@pytest.mark.parametrize("name", SECTIONS)
def test_each_section_has_the_definition_of_its_table(name: str, stepping: Findings) -> None:
    (table,) = [table for table in TABLES if table.name == name]
    section = section_of(stepping, name)
    assert section.definition == table.meaning != ""
    assert section.definition.endswith(".")
    assert section.title


# Something found.


def test_abandoned_requests_are_counted_by_consequence() -> None:
    section = of("blockB1 S2 blockB3 S2 2/blockS3", "abandoned_requests")
    (says,) = section.says
    assert says.startswith("2 requests abandoned. Consequences: another call completed it: 1;")
    assert says.endswith("no consequence in the trace: 1.")
    (grid,) = section.grids
    assert [(*row[:2], *row[4:]) for row in grid.rows] == [
        ("MEM.RANGE.BLOCK", "1", "6", "10", "another call completed it"),
        ("MEM.RANGE.BLOCK", "1", "2", "-", "no consequence in the trace"),
    ]


def test_a_request_with_two_consequences_is_one_request() -> None:
    rows = analyze(story("blockB3 S2 2/blockS3").trace).abandoned_requests
    both = pl.concat(
        [
            rows,
            rows.with_columns(consequence=pl.lit("later_call_failed", rows["consequence"].dtype)),
        ]
    )
    section = section_of(
        _with(analyze(story("S1").trace), abandoned_requests=both), "abandoned_requests"
    )
    assert section.says[0].startswith("1 request abandoned.")


def _with(findings: Findings, **answers: pl.DataFrame) -> Findings:
    changed = dataclasses.replace(findings, _computed=dict(answers))
    assert {name: getattr(changed, name) for name in answers} == answers
    return changed


def test_loops_are_counted_by_progress() -> None:
    section = of("N1 N1 S1 N2 S3", "progress_loops")
    assert section.says == ["2 loops: 1 with progress, 1 without progress."]
    (grid,) = section.grids
    assert [(*row[1:4], row[6]) for row in grid.rows] == [
        ("MEM.PAGE.AUG", "1", "2", "seen"),
        ("MEM.PAGE.AUG", "1", "1", "not seen"),
    ]


def test_no_conflict_with_another_td_is_one_sentence() -> None:
    section = of("2/block(1 B1 2/)S S1", "td_conflicts")
    (says,) = section.says
    assert says.startswith("No busy answer is known to be caused by another TD. Of 1:")
    assert not section.grids


def test_conflicts_with_another_td_are_listed_by_leaf() -> None:
    findings = analyze(story("2/block(1 B1 2/)S S1").trace)
    rows = findings.td_conflicts
    met = rows.with_columns(
        n_busy=pl.lit(5, pl.UInt64),
        n_other_td=pl.lit(3, pl.UInt64),
        n_same_td=pl.lit(1, pl.UInt64),
        n_unknown=pl.lit(1, pl.UInt64),
    )
    section = section_of(_with(findings, td_conflicts=met), "td_conflicts")
    assert section.says == [
        "5 busy answers: 3 caused by another TD, 1 caused by the same TD, 1 unknown."
    ]
    assert section.grids[0].rows[0][2:6] == ("5", "3", "1", "1")


def test_a_success_is_compared_with_a_busy_answer(stepping: Findings) -> None:
    section = section_of(stepping, "latencies")
    row = stepping.latencies.filter(pl.col("leaf") == 6).row(0, named=True)
    result = (
        f"TDH.MEM.PAGE.AUG: a success takes {1 / row['busy_ratio']:.3g} times as long as a busy"
    )
    assert result == "TDH.MEM.PAGE.AUG: a success takes 24 times as long as a busy"
    assert [says for says in section.says if says.startswith(result)]
    assert "(95 % interval: 22 to 26)" in " ".join(section.says)
    assert len(section.grids[0].rows) == stepping.latencies.height


def test_times_of_a_td_add_up_in_table_and_chart(stepping: Findings) -> None:
    section = section_of(stepping, "time_shares")
    assert section.says == [
        "Run: 0.3 % of the threads' time in calls that did not complete their request, 22 % "
        "between attempts."
    ]
    assert not section.figures, "one row needs no chart"
    assert share_rows(stepping.time_shares)["share"].sum() == pytest.approx(1)


def test_a_chart_of_many_tds_says_how_many_are_left_out(stepping: Findings) -> None:
    one = stepping.time_shares
    many = pl.concat(one.with_columns(pl.col("td_id") + n) for n in range(MAX_BARS + 2))
    section = section_of(_with(stepping, time_shares=many), "time_shares")
    (figure,) = section.figures
    assert "the 16 with most retrying of 18 TDs and phases" in figure.caption
    assert share_rows(many)["of"].n_unique() == MAX_BARS
    assert section.grids[0].more == "6 more (tdxtrace time-shares)"


def test_causes_of_episodes_have_advice_on_what_to_record(stepping: Findings) -> None:
    section = section_of(stepping, "zero_step_causes")
    assert section.says == ["8 episodes: unknown 7 (88 %); left loop 1 (12 %)."]
    rows = section.grids[0].rows
    assert rows[0][:4] == ("unknown", "7", "6", "49")
    assert rows[0][-1].startswith("record also kvm:kvm_page_fault")
    assert rows[1][4:6] == ("86 %", "1202")


def test_every_cause_has_a_reason() -> None:
    assert {*zero_steps._REASONS, "unknown"} == set(STEP_CAUSES)


def test_thresholds_are_compared_with_that_of_the_module(stepping: Findings) -> None:
    section = section_of(stepping, "step_thresholds")
    assert section.says == [
        "Above the module's threshold of 6: at most 4 runs on 3 vCPUs; the longest run has 9 "
        "faults.",
        "With a threshold of 9 there would be none.",
    ]
    (figure,) = section.figures
    drawn = figure.draw().to_dict()
    (rows,) = drawn["datasets"].values()
    assert [row["n"] for row in rows] == threshold_rows(stepping.step_thresholds)[
        "n_runs"
    ].to_list()
    assert [row["threshold"] for row in rows if row["own"] > 0.9] == ["6"]


def test_few_distinct_thresholds_have_no_chart(stepping: Findings) -> None:
    rows = stepping.step_thresholds.with_columns(
        n_runs=pl.when(pl.col("threshold") < 7).then(1).otherwise(0).cast(pl.UInt64)
    )
    section = section_of(_with(stepping, step_thresholds=rows), "step_thresholds")
    assert not section.figures
    assert [row[:2] for row in section.grids[0].rows] == [
        *(("4", "1"), ("5", "1"), ("6", "1"), ("7", "0"))
    ]


def test_thresholds_of_several_inputs_are_added(stepping: Findings) -> None:
    one = stepping.step_thresholds
    two = pl.concat([one, one.with_columns(source=pl.lit(1, pl.UInt16))])
    assert threshold_rows(two)["n_runs"].to_list() == [2 * n for n in one["n_runs"]]


def test_every_threshold_may_be_exceeded(stepping: Findings) -> None:
    rows = stepping.step_thresholds.with_columns(n_runs=pl.lit(2, pl.UInt64))
    section = section_of(_with(stepping, step_thresholds=rows), "step_thresholds")
    assert section.says[1].startswith("Above 16, the highest threshold tried: still 2 runs on")
