"""The scorer of verdicts, with the simulated truth inverted."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from functools import cache
from typing import Any

import polars as pl
import pytest

from tdxtrace.validate.captured import CapturedRun, capture_run
from tdxtrace.validate.cells import Cell, Plan
from tdxtrace.validate.matrix import simulated
from tdxtrace.validate.step_causes import confusion_rows, score_step_causes
from tdxtrace.validate.truth import Truth
from tdxtrace.validate.verdicts import (
    accusation_rows,
    false_accusations,
    score_verdicts,
    verdict_score_rows,
)

ATTACK = Plan("zero_step_attack", "B", "fixed-64", 1, 4)
LIFE = Plan("lifecycle", "C", "mainline", 1, 60)
TRACKS = Plan("zero_step_attack", "B", "fixed-64", 1, 6)
GIVES_UP = Plan("host_gives_up", "C", "fixed-1", 1, 60)
# Entries, arguments and nanoseconds.
WHOLE: dict[str, Any] = {"form": "trace-cmd", "options": ("raw", "ns")}


@cache
def _captured(plan: Plan, **changes: Any) -> CapturedRun:  # noqa: ANN401 - fields of a cell
    made = capture_run(simulated(plan), dataclasses.replace(Cell(plan), **changes))
    assert made is not None
    return made


def _with_conduct(made: CapturedRun, conduct: str) -> CapturedRun:
    """The same capture of a run in which everybody is said to have been of another mind."""
    journal = copy.copy(made.run.journal)
    journal.actors = [actor._replace(conduct=conduct) for actor in journal.actors]
    return dataclasses.replace(made, run=dataclasses.replace(made.run, journal=journal))


def _with_findings(made: CapturedRun, **tables: pl.DataFrame) -> CapturedRun:
    answers = {**made.findings._computed, **tables}
    findings = dataclasses.replace(made.findings, _computed=answers)
    return dataclasses.replace(made, findings=findings)


def test_an_attack_is_named_and_its_cause_right() -> None:
    counts = score_verdicts(_captured(ATTACK)).counts
    assert counts["hostile_shown"] == counts["hostile_named"] == counts["HOSTILE"] == 1
    assert counts["HOSTILE zero_step right"] == 1
    assert false_accusations(counts) == []
    causes = score_step_causes(_captured(ATTACK)).counts
    assert causes["right"] == causes["cause churned block_churn"] > 0
    assert causes["wrong"] == 0


def test_an_innocent_host_must_not_be_accused() -> None:
    score = score_verdicts(_with_conduct(_captured(ATTACK), "honest"))
    assert score.counts["HOSTILE_false"] == 1
    assert score.counts["hostile_shown"] == 0
    assert "1 verdicts HOSTILE are false" in false_accusations(score.counts)
    assert any("accused" in text for text in score.examples)


@pytest.mark.parametrize("lie", ["pending_page", "many_pages", "memslot_change", "left_loop"])
def test_a_wrong_cause_is_seen_at_its_episode(lie: str) -> None:
    made = _captured(ATTACK)
    causes = made.findings.zero_step_causes
    first = pl.int_range(pl.len()) == 0
    result = pl.when(first).then(pl.lit(lie, causes.schema["cause"])).otherwise("cause")
    counts = score_step_causes(
        _with_findings(made, zero_step_causes=causes.with_columns(cause=result))
    )
    assert counts.counts["wrong"] == 1
    assert counts.counts[f"cause churned {lie}"] == 1


def test_no_answer_is_no_wrong_cause() -> None:
    made = _captured(ATTACK)
    causes = made.findings.zero_step_causes
    none = causes.with_columns(cause=pl.lit("unknown", causes.schema["cause"]))
    counts = score_step_causes(_with_findings(made, zero_step_causes=none)).counts
    assert (counts["right"], counts["wrong"]) == (0, 0)


def _verdict(made: CapturedRun, table: str, subject: str, seq: int) -> CapturedRun:
    """The capture with one verdict BUG, on one row of a table."""
    verdicts = made.findings.verdicts
    bug = verdicts.head(1).with_columns(
        verdict=pl.lit("BUG", verdicts.schema["verdict"]),
        subject=pl.lit(subject, verdicts.schema["subject"]),
        evidence=pl.lit(str(seq)),
        evidence_table=pl.lit(table),
        rule=pl.lit("track_without_kick"),
    )
    return _with_findings(made, verdicts=bug)


def test_a_rule_is_right_only_where_it_was_broken() -> None:
    made = _captured(TRACKS, **WHOLE)
    broken = made.findings.broken_rules.filter(rule="track_without_kick")
    assert not broken.is_empty()
    counts = score_verdicts(made).counts
    assert counts["sure track_without_kick right"] == broken.height
    assert counts["rule track_without_kick found"] == counts["rule track_without_kick shown"] > 0
    elsewhere = broken.head(1).with_columns(seq=pl.col("seq") + 1)
    wrong = score_verdicts(_with_findings(made, broken_rules=elsewhere)).counts
    assert wrong["sure track_without_kick wrong"] == 1
    assert "1 broken rules track_without_kick are wrong" in false_accusations(wrong)
    other = broken.head(1).with_columns(rule=pl.lit("tdr_busy", broken.schema["rule"]))
    assert (
        score_verdicts(_with_findings(made, broken_rules=other)).counts["sure tdr_busy wrong"] == 1
    )


def test_evidence_that_does_not_prove_the_rule_is_wrong() -> None:
    made = _captured(TRACKS, **WHOLE)
    broken = made.findings.broken_rules.filter(rule="track_without_kick").head(1)
    innocent = broken.with_columns(evidence_seq=pl.lit(1, pl.UInt64))
    counts = score_verdicts(_with_findings(made, broken_rules=innocent)).counts
    assert counts["sure track_without_kick wrong"] == 1


def test_a_kernel_is_accused_only_at_rows_where_it_broke_the_rule() -> None:
    made = _captured(TRACKS, **WHOLE)
    seq = made.findings.broken_rules.filter(rule="track_without_kick")["seq"][0]
    right = score_verdicts(_verdict(made, "broken_rules", "broken_rule", seq)).counts
    assert (right["BUG_false"], right["BUG broken_rule right"]) == (0, 1)
    wrong = score_verdicts(_verdict(made, "broken_rules", "broken_rule", seq + 1)).counts
    assert (wrong["BUG_false"], wrong["BUG broken_rule wrong"]) == (1, 1)
    busy = score_verdicts(_verdict(made, "busy_causes", "busy", 1)).counts
    assert busy["BUG_false"] == 1
    unheard_of = score_verdicts(_verdict(made, "seamcalls", "busy", seq)).counts
    assert unheard_of["BUG_false"] == 1


def test_a_timeout_is_the_fault_of_the_request_that_was_left_busy() -> None:
    made = _captured(GIVES_UP)
    rows = made.findings.abandoned_requests.filter(consequence="host_priority_timeout")
    truth = Truth(made)
    broken = [b for b in truth.broken if b.rule == "host_priority_timeout"]
    assert broken
    left, timeout = broken[0].evidence, broken[0].call
    first = truth.requests[id(left)].calls[0]
    blamed = pl.DataFrame(
        [
            {
                **dict.fromkeys(rows.columns),
                **{"source": 0, "leaf": 7, "tid": 0, "left_ns": 0, "final_status": 0},
                "first_seq": made.entries[id(first)],
                "consequence": "host_priority_timeout",
                "effect_source": 0,
                "effect_seq": made.returns[id(timeout)],
            }
        ],
        schema=rows.schema,
    )
    lines = {True: blamed, False: blamed.with_columns(first_seq=pl.col("first_seq") + 2)}
    for is_right, table in lines.items():
        spoilt = _with_findings(made, abandoned_requests=table)
        seq = int(table["first_seq"][0])
        counts = score_verdicts(_verdict(spoilt, "abandoned_requests", "abandoned", seq)).counts
        assert counts["BUG_false"] == (not is_right)


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
def test_a_wrong_loop_is_counted(change: dict[str, pl.Expr]) -> None:
    made = _captured(LIFE)
    loops = made.findings.progress_loops
    spoilt = loops.head(1).with_columns(**change).cast(loops.schema)
    answers = {**made.findings._computed, "progress_loops": spoilt}
    findings = dataclasses.replace(made.findings, _computed=answers)
    counts = score_verdicts(dataclasses.replace(made, findings=findings)).counts
    assert counts["loops_wrong"] + counts["loops_false"] == 1
    assert false_accusations(counts) == ["1 progress loops are wrong"]


def test_the_tables_have_a_row_for_each_kind_of_answer() -> None:
    rows = verdict_score_rows({"a": Counter(loops_shown=2, loops_right=1, BUG=3), "all": Counter()})
    assert rows[1][:2] == ["a", "1/2"]
    assert "0/3" in rows[1]
    assert set(rows[2][1:5]) == {"-"}
    result = Counter({"sure tdr_busy right": 2, "BUG busy wrong": 1, "BUG": 1, "BUG_false": 1})
    said = accusation_rows(result)
    assert said[1] == ["rule tdr_busy", "2", "-", "-", "-", "-", "-"]
    assert said[2][:3] == ["BUG busy", "-", "1"]
    assert len({len(row) for row in said}) == 1
    causes = confusion_rows(Counter({"cause churned block_churn": 4, "right": 4}))
    assert [row[0] for row in causes] == ["zero-step cause", "churned"]
    assert causes[1][causes[0].index("block_churn")] == "4"
