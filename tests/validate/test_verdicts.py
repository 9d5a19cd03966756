"""The scorer of verdicts, with the simulated truth inverted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cache
from typing import Any

import polars as pl
import pytest

from tdxtrace.validate.captured import CapturedRun, capture_run
from tdxtrace.validate.cells import Cell, Plan
from tdxtrace.validate.matrix import simulated
from tdxtrace.validate.verdicts import false_accusations, score_verdicts, verdict_score_rows

ATTACK = Plan("zero_step_attack", "B", "fixed-64", 1, 4)
LIFE = Plan("lifecycle", "C", "mainline", 1, 60)


@cache
def _captured(plan: Plan, **changes: Any) -> CapturedRun:  # noqa: ANN401 - fields of a cell
    made = capture_run(simulated(plan), dataclasses.replace(Cell(plan), **changes))
    assert made is not None
    return made


def _with_tds(made: CapturedRun, **changes: Any) -> CapturedRun:  # noqa: ANN401
    """The same capture of a run in which the host is said to have been another."""
    scenario = made.run.scenario
    tds = tuple(dataclasses.replace(td, **changes) for td in scenario.tds)
    run = dataclasses.replace(made.run, scenario=dataclasses.replace(scenario, tds=tds))
    return dataclasses.replace(made, run=run)


def test_an_attack_is_named_and_its_cause_right() -> None:
    counts = score_verdicts(_captured(ATTACK)).counts
    assert counts["hostile_shown"] == counts["hostile_named"] == counts["HOSTILE"] == 1
    assert counts["causes_right"] == counts["causes_found"] > 0
    assert false_accusations(counts) == []


def test_an_innocent_host_must_not_be_accused() -> None:
    score = score_verdicts(_with_tds(_captured(ATTACK), refuses_faults=False))
    assert score.counts["HOSTILE_false"] == 1
    assert "1 verdicts HOSTILE are false" in false_accusations(score.counts)
    assert any("accused" in text for text in score.examples)


def test_a_wrong_cause_is_seen() -> None:
    made = _with_tds(_captured(ATTACK), workers=())
    counts = score_verdicts(made).counts
    assert counts["causes_right"] == 0
    assert any("zero-step causes are wrong" in text for text in false_accusations(counts))


def test_a_kernel_without_bugs_must_not_be_accused() -> None:
    made = _captured(ATTACK)
    verdicts = made.findings.verdicts
    bug = verdicts.filter(pl.col("subject") == "busy").head(1)
    bug = bug.with_columns(verdict=pl.lit("BUG", verdicts.schema["verdict"]), evidence=pl.lit("1"))
    answers = {**made.findings._computed, "verdicts": bug}
    findings = dataclasses.replace(made.findings, _computed=answers)
    counts = score_verdicts(dataclasses.replace(made, findings=findings)).counts
    assert counts["BUG_false"] == 1


@pytest.mark.parametrize("probes", ["wrappers", "seamcall"])
def test_loops_are_counted_as_the_probes_show_them(probes: str) -> None:
    counts = score_verdicts(_captured(LIFE, probes=probes)).counts
    assert counts["loops_shown"] == counts["loops_right"] > 0
    assert false_accusations(counts) == []


@pytest.mark.parametrize(
    "change",
    [
        {"n_repeats": pl.col("n_repeats") + 1},
        {"progress": pl.lit("not_seen")},
        {"loop": pl.lit("sys_busy")},
        {"first_seq": pl.lit(1, pl.UInt64)},
    ],
)
def test_a_wrong_loop_is_seen(change: dict[str, pl.Expr]) -> None:
    made = _captured(LIFE)
    loops = made.findings.progress_loops
    spoilt = loops.head(1).with_columns(**change).cast(loops.schema)
    answers = {**made.findings._computed, "progress_loops": spoilt}
    findings = dataclasses.replace(made.findings, _computed=answers)
    counts = score_verdicts(dataclasses.replace(made, findings=findings)).counts
    assert counts["loops_wrong"] + counts["loops_false"] == 1
    assert false_accusations(counts) == ["1 progress loops are wrong"]


def test_the_table_has_a_row_for_each_scenario() -> None:
    rows = verdict_score_rows(
        {"a": Counter(causes_found=2, causes_right=1, BUG=3), "all": Counter()}
    )
    assert rows[1][:3] == ["a", "1/2", "0/2"]
    assert "0/3" in rows[1]
    assert set(rows[2][1:7]) == {"-"}
    assert len({len(row) for row in rows}) == 1
