"""The scorers of chains and episodes, on correct and altered findings."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import polars as pl
import pytest

from tdxtrace.validate.acceptance import Thresholds, failures, figures, table
from tdxtrace.validate.captured import CapturedRun, capture_run
from tdxtrace.validate.cells import Cell, Plan
from tdxtrace.validate.matrix import Result, simulated
from tdxtrace.validate.scores import score_chains, score_episodes

PLAN = Plan("zero_step_attack", "B", "fixed-64", 1, 4)


@cache
def _captured(**changes: Any) -> CapturedRun:  # noqa: ANN401 - fields of a cell
    made = capture_run(simulated(PLAN), dataclasses.replace(Cell(PLAN), **changes))
    assert made is not None
    return made


def _with(table_name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> CapturedRun:
    made = _captured()
    frame: Any = change(getattr(made.findings, table_name))
    if table_name in made.findings._analyses:
        computed = made.findings._computed | {table_name: frame}
        findings = dataclasses.replace(made.findings, _computed=computed)
    else:
        findings = dataclasses.replace(made.findings, **{table_name: frame})
    return dataclasses.replace(made, findings=findings)


def _row(frame: pl.DataFrame, **where: object) -> pl.Expr:
    place = int(frame.with_row_index().filter(**where)["index"][0])
    here: pl.Expr = pl.int_range(pl.len()).eq(place)
    return here


def test_the_analysis_gets_the_best_score() -> None:
    score = score_chains(_captured())
    n = score.counts["requests"]
    assert n > 1000
    assert score.counts == {"requests": n, "exact": n, "extra": 0}
    assert score.examples == []


@pytest.mark.parametrize(
    ("column", "value"), [("n_attempts", 7), ("n_busy", 1), ("outcome", "failed"), ("last_seq", 1)]
)
def test_a_wrong_chain_that_is_not_marked_counts_as_wrong(column: str, value: object) -> None:
    def spoil(chains: pl.DataFrame) -> pl.DataFrame:
        here = _row(chains, outcome="succeeded", n_attempts=1)
        dtype = chains.schema[column]
        lie = pl.when(here).then(pl.lit(value).cast(dtype)).otherwise(column)
        return chains.with_columns(lie.alias(column))

    score = score_chains(_with("retry_chains", spoil))
    assert score.counts["wrong"] == 1
    assert score.examples[0].startswith("wrong: ")


def test_a_chain_that_is_left_out_is_missing() -> None:
    spoilt = _with("retry_chains", lambda chains: chains.filter(~_row(chains, n_attempts=1)))
    assert score_chains(spoilt).counts["missing"] == 1


def test_a_chain_without_a_request_is_extra() -> None:
    def spoil(chains: pl.DataFrame) -> pl.DataFrame:
        made_up = chains.head(1).with_columns(first_seq=pl.lit(10**9, pl.UInt64))
        return pl.concat([chains, made_up])

    assert score_chains(_with("retry_chains", spoil)).counts["extra"] == 1


def test_a_complete_chain_that_is_marked_counts_as_needless() -> None:
    def spoil(chains: pl.DataFrame) -> pl.DataFrame:
        here = _row(chains, outcome="succeeded", n_attempts=1)
        cut = pl.when(here).then(pl.lit("cut").cast(chains.schema["outcome"])).otherwise("outcome")
        return chains.with_columns(cut.alias("outcome"))

    counts = score_chains(_with("retry_chains", spoil)).counts
    assert (counts["marked"], counts["needless"], counts["wrong"]) == (1, 1, 0)


def test_a_false_episode_lowers_precision() -> None:
    def spoil(steps: pl.DataFrame) -> pl.DataFrame:
        elsewhere = steps.head(1).with_columns(tid=pl.lit(1, pl.Int32))
        return pl.concat([steps, elsewhere])

    counts = score_episodes(_with("zero_steps", spoil)).counts
    assert counts["proof_found"] == counts["proof_true"] + 1


def test_a_missing_episode_lowers_recall() -> None:
    whole = score_episodes(_captured()).counts
    assert whole["shown"] == whole["found_surely"] > 0
    counts = score_episodes(_with("zero_steps", lambda steps: steps.tail(-1))).counts
    assert counts["found_surely"] < counts["shown"] == whole["shown"]


def test_an_episode_before_any_sign_of_progress_is_at_the_edge() -> None:
    made = _captured(vp_enter=False)
    (source,) = made.trace.provenance.sources
    known = dataclasses.replace(source, clock="mono")
    provenance = dataclasses.replace(made.trace.provenance, sources=(known,))
    by_mono = dataclasses.replace(
        made, trace=dataclasses.replace(made.trace, provenance=provenance)
    )
    counts = score_episodes(by_mono).counts
    assert counts["at_the_edge"] > 0
    assert counts["strong_found"] == counts["strong_true"]
    # By clocks that may differ a TRACK may have met each of them: they are counted apart.
    unnamed = score_episodes(made).counts
    assert (unnamed["at_the_edge"], unnamed["shown"]) == (0, 0)
    assert unnamed["undecidable"] > counts["undecidable"]


def _result(**chains: int) -> Result:
    return Result(Cell(PLAN), {"retry_chains": chains, "zero_steps": {}})


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (_result(exact=99, wrong=1), "exact chains: 0.990000, below the threshold of 1"),
        (_result(exact=1, needless=2), "2 complete chains are marked"),
        (
            Result(Cell(PLAN), {"zero_steps": {"proof_found": 2, "proof_true": 1}}),
            "zero-step precision: 0.5",
        ),
        (
            Result(Cell(PLAN), {"zero_steps": {"shown": 100, "found_surely": 98}}),
            "zero-step recall: 0.98",
        ),
        (Result(Cell(PLAN), unparsed=3), "3 lines were not parsed"),
    ],
)
def test_every_missed_threshold_is_reported(result: Result, says: str) -> None:
    assert any(line.startswith(says) for line in failures([result], Thresholds()))


def test_empty_counts_fail_no_threshold() -> None:
    assert failures([Result(Cell(PLAN))], Thresholds()) == []
    assert figures([Result(Cell(PLAN))]).exact is None


def test_the_table_adds_up() -> None:
    rows = table([_result(exact=3), _result(exact=4, marked=1)])
    assert rows[-1][:4] == ["all", "2", "7", "1"]
