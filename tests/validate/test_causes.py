"""The scorer of causes, on correct and altered findings, and the confusion table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache

import polars as pl
import pytest

from tdxtrace.analysis.causes.busy_causes import busy_causes
from tdxtrace.analysis.causes.evidence import BusyEvidence
from tdxtrace.tables.causes import CAUSES
from tdxtrace.validate import causes as scorer
from tdxtrace.validate.acceptance import (
    Thresholds,
    capture_rows,
    cause_precision,
    cause_recall,
    confusion_table,
    explained_by_capture,
    failures,
)
from tdxtrace.validate.captured import CapturedRun, capture_run
from tdxtrace.validate.cells import OWN_CAPTURE, Cell, Plan
from tdxtrace.validate.decidable import ONE_LEAF, SILENT_CPU, UNSEEN_HOLDER, Decidable
from tdxtrace.validate.matrix import Result, simulated

PLAN = Plan("zero_step_attack", "B", "fixed-64", 1, 4)
CELL = Cell(PLAN, form="trace-cmd", options=("raw", "ns"))


@cache
def _captured() -> CapturedRun:
    made = capture_run(simulated(PLAN), CELL)
    assert made is not None
    return made


def _result(counts: Counter[str]) -> Result:
    return Result(CELL, {"busy_causes": dict(counts)})


def test_a_capture_in_nanoseconds_gets_every_cause_and_holder_right() -> None:
    score = scorer.score_causes(_captured())
    assert score.examples == []
    assert score.counts["given missing"] == score.counts["given extra"] == 0
    assert score.counts["holder right"] == score.counts["holder named"] > 50
    assert score.counts["given host_conflict host_conflict"] > 50
    result = [_result(score.counts)]
    assert cause_precision(result) == cause_recall(result) == 1.0
    assert failures(result, Thresholds()) == []


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"cause": "guest"}, "precision of causes"),
        ({"cause": "kernel_bug"}, "attributed to kernel bugs"),
        ({"cause": "unexplained"}, "recall of causes"),
    ],
)
def test_a_wrong_cause_is_counted_and_fails(
    lie: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Callable[[Iterable[BusyEvidence]], pl.DataFrame] = busy_causes

    def spoilt(evidence: Iterable[BusyEvidence]) -> pl.DataFrame:
        table = found(evidence)
        own = pl.col("cause") == "host_conflict"
        result = pl.when(own).then(pl.lit(lie["cause"])).otherwise(pl.col("cause").cast(pl.String))
        return table.with_columns(cause=result.cast(pl.Enum(CAUSES)))

    monkeypatch.setattr(scorer, "busy_causes", spoilt)
    score = scorer.score_causes(_captured())
    short = failures([_result(score.counts)], Thresholds())
    assert any(said in line for line in short)


def test_a_wrong_holder_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = busy_causes

    def spoilt(evidence: Iterable[BusyEvidence]) -> pl.DataFrame:
        other = pl.col("holder_seq") + 1, pl.col("holder_tid") + 1
        return found(evidence).with_columns(*other)

    monkeypatch.setattr(scorer, "busy_causes", spoilt)
    score = scorer.score_causes(_captured())
    assert score.counts["holder right"] == 0
    assert score.examples[0].startswith("holder not ")


def test_the_confusion_table_counts_every_attempt_once() -> None:
    counts = scorer.score_causes(_captured()).counts
    head, *rows = confusion_table([_result(counts)])
    numbers = [int(n) for row in rows for n in row[4:9] if n != "-"]
    assert len(head) == len(rows[0])
    words = (key.split() for key in counts)
    assert sum(numbers) == sum(counts[" ".join(w)] for w in words if len(w) == 3)


def test_undecidable_answers_are_counted_separately_from_the_recall() -> None:
    """Of 10 answers by armed entries, 3 were met by a host call as well: one was taken for it."""
    counts = Counter(
        {
            "given armed_entry armed_entry": 9,
            "given armed_entry host_conflict": 1,
            "given armed_entry armed_entry undecidable": 2,
            "given armed_entry host_conflict undecidable": 1,
        }
    )
    result = [_result(counts)]
    assert confusion_table(result)[1][9:] == ["0.900", "3", "1.000"]
    assert cause_recall(result) == 1.0
    counts["given armed_entry unexplained"] += 1
    assert cause_recall([_result(counts)]) == 7 / 8


def test_a_guest_is_undecidable_next_to_a_conflicting_host_call() -> None:
    """Judged by the simulated calls: in each of these, a call that takes the tree overlaps too."""
    counts = scorer.score_causes(_captured()).counts
    whole = sum(counts[f"given armed_entry {cause}"] for cause in CAUSES)
    hidden = sum(counts[f"given armed_entry {cause} undecidable"] for cause in CAUSES)
    assert 0 < hidden < whole


def test_a_guest_is_undecidable_if_a_leaf_was_not_probed() -> None:
    """In this run the host calls nothing but BLOCK that takes the lock of an SEPT entry."""
    plan = Plan("host_gives_up", "B", "v1-series", 31415, 60)
    run = simulated(plan)
    made = capture_run(run, Cell(plan, form="trace-cmd", options=("raw", "ns")))
    assert made is not None
    block = next(call for call in run.journal.calls if call.leaf == "TDH.MEM.RANGE.BLOCK")
    decidable = Decidable(made)
    assert decidable.reason(block, "guest") == ONE_LEAF
    assert decidable.reason(block, "kernel_bug") is None
    # Once another leaf was captured, its probes are known to work.
    install = next(call for call in run.journal.calls if call.leaf == "TDH.VP.ENTER")
    install.leaf = "TDH.MEM.PAGE.AUG"
    assert decidable.reason(block, "guest") is None


def test_a_host_call_that_was_not_captured_cannot_be_named() -> None:
    made = _captured()
    call = next(
        one
        for one in made.run.journal.calls
        if one.busy_reason
        if any(id(holder) in made.returns for holder in one.busy_reason.holders)
    )
    assert Decidable(made).reason(call, "host_conflict") is None
    nothing = dataclasses.replace(made, returns={}, entries={}, exits={})
    assert Decidable(nothing).reason(call, "host_conflict") == UNSEEN_HOLDER


def test_calls_after_the_last_line_of_a_cpu_are_decidable_if_losses_are_marked() -> None:
    whole = _captured()
    perf = capture_run(whole.run, Cell(PLAN, form="perf", options=("ns",)))
    assert perf is not None
    first, last = whole.run.journal.calls[0], whole.run.journal.calls[-1]
    for call in (first, last):
        assert Decidable(perf).reason(call, "armed_entry") == SILENT_CPU
        assert Decidable(whole).reason(call, "armed_entry") != SILENT_CPU
    middle = whole.run.journal.calls[len(whole.run.journal.calls) // 2]
    assert Decidable(perf).reason(middle, "armed_entry") != SILENT_CPU


def test_a_host_call_that_held_the_tree_outranks_a_possibly_armed_entry() -> None:
    """Accept storms arm gates by the look of them, and installs meet each other in numbers."""
    plan = Plan("boot_storm", "A", "v1-series", 1, 6)
    made = capture_run(simulated(plan), Cell(plan, form="trace-cmd", options=("raw", "ns")))
    assert made is not None
    counts = scorer.score_causes(made).counts
    assert counts["given host_conflict host_conflict"] > 1000
    assert counts["given host_conflict armed_entry"] == 0


def test_what_capture_explains_is_compared_with_all_probes_of_the_same_runs() -> None:
    other = Plan("balloon", "C", "mainline", 1, 6)
    whole = {"given guest guest": 90, "given guest unexplained": 10}
    part = {"given guest guest": 45, "given guest unexplained": 55}
    results = [
        Result(CELL, {"busy_causes": whole}),
        Result(Cell(PLAN, **OWN_CAPTURE), {"busy_causes": part}),
        Result(Cell(other, **OWN_CAPTURE), {"busy_causes": {"given guest unexplained": 99}}),
    ]
    assert explained_by_capture(results) == 0.5
    assert any("capture's probes" in line for line in failures(results, Thresholds()))
    assert explained_by_capture(results[:1]) is None
    assert capture_rows(results)[1:] == [
        ["all probes", "1", "100", "90", "0.9000"],
        ["as tdxtrace capture records", "1", "100", "45", "0.4500"],
    ]
