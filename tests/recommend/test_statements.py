"""Shares that a trace supports without a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from bench import coverage
from scipy import stats
from support.made_chains import chains_of, spaced_chains
from support.story import story

from tdxtrace.analysis.attempts import attempts
from tdxtrace.pipeline import analyze
from tdxtrace.recommend.limits import limits
from tdxtrace.recommend.statements import limit_statements, round_up
from tdxtrace.recommend.target import Target
from tdxtrace.report.limits_text import supported_line
from tdxtrace.tables.events import LOSSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, LIMIT_STATEMENTS


def rows_of(n_busy: list[int] | np.ndarray[Any, Any], unit: str = "attempts") -> pl.DataFrame:
    chains = chains_of(n_busy)
    rows = limit_statements(attempts(chains, coverage.answers_of(chains)), chains)
    return LIMIT_STATEMENTS.check(rows).filter(unit=unit)


def high(rows: pl.DataFrame, within: int) -> float:
    return float(rows.filter(kind="asked", within=within)["more_high"].item())


def test_a_share_is_the_upper_end_of_the_exact_interval() -> None:
    rows = rows_of(spaced_chains([1] * 40 + [4] * 20 + [30] * 5, 10_000))
    n = rows["n_requests"][0]
    for within, more in ((1, 65), (2, 25), (5, 5), (16, 5), (64, 0), (1024, 0)):
        exact = stats.beta.ppf(0.95, more + 1, n - more)
        assert exact * 0.999 <= high(rows, within) <= exact * 1.4
        row = rows.filter(kind="asked", within=within)
        assert row["more_ratio"].item() == pytest.approx(more / n)


def test_the_smallest_share_is_the_target_that_a_limit_keeps_and_none_below_it() -> None:
    numbers = spaced_chains([1] * 60 + [2] * 30 + [3] * 15 + [9] * 4, 5_000)
    smallest = rows_of(numbers).filter(kind="smallest").row(0, named=True)
    chains = chains_of(numbers)
    curve = attempts(chains, coverage.answers_of(chains))
    for target, basis in (
        (smallest["more_high"], {"observed"}),
        (smallest["more_high"] * 0.9, {"withheld", "extrapolated"}),
    ):
        row = limits(curve, chains, LOSSES.empty(), 1.0, Target(target)).row(0, named=True)
        assert row["basis"] in basis
        if row["basis"] == "observed":
            assert row["limit"] == smallest["within"]


def test_where_the_longest_requests_were_abandoned_larger_limits_are_no_better() -> None:
    scenario = story(" ".join(f"B{p} B{p} B{p}" if p % 9 == 0 else f"S{p}" for p in range(1, 200)))
    rows = analyze(scenario.trace).limit_statements.filter(unit="attempts", kind="asked")
    assert high(rows, 5) == high(rows, 1024) > 22 / 199
    assert rows["more_ratio"].to_list() == pytest.approx([22 / 199] * 6)


def test_a_statement_is_never_stronger_than_one_for_a_larger_number() -> None:
    # Of 40 requests half were lost from sight at the first answer, which leaves few for the others.
    text = " ".join(f"B{p}" if p % 2 else f"B{p} B{p} B{p} S{p}" for p in range(1, 40))
    for unit in ("attempts", "ns"):
        rows = analyze(story(text).trace).limit_statements.filter(unit=unit, kind="asked")
        assert rows["more_high"].is_sorted(descending=True)


def test_a_leaf_that_was_never_busy_has_the_rule_of_three() -> None:
    rows = rows_of([0] * 3000)
    assert high(rows, 1) == pytest.approx(3 / 3000, rel=0.01)
    smallest = rows.filter(kind="smallest").row(0, named=True)
    assert (smallest["within"], smallest["more_high"]) == (1, 0.001)


def test_times_before_the_first_step_support_nothing() -> None:
    rows = rows_of([9] * 30, "ns")
    assert high(rows, 10_000) < 0.2
    assert rows_of([30] * 30, "ns").filter(within=10_000)["more_high"].item() == 1.0


@pytest.mark.parametrize(
    ("share", "rounded"),
    [(0.0, 0.0), (0.02431, 0.025), (0.01, 0.01), (0.0999, 0.1), (0.997, 1.0), (1.0, 1.0)],
)
def test_shares_are_rounded_up_to_two_digits(share: float, rounded: float) -> None:
    assert round_up(share) == rounded


def test_one_line_says_what_the_leaf_retried_most_supports() -> None:
    text = " ".join(f"B{p} B{p} S{p}" if p % 8 == 0 else f"S{p}" for p in range(1, 300))
    assert supported_line(analyze(story(text).trace)) == (
        "limit: PAGE.AUG at most 1 % need over 31.5 us, 1 % over 3 attempts (95 %)"
    )
    assert supported_line(analyze(story("S1 S2 S3").trace)) == (
        "limit: PAGE.AUG at most 64 % need a second attempt, none did (95 %)"
    )
    assert supported_line(analyze(story("B1").trace)) == (
        "limit: none, the trace has too few requests"
    )
    assert supported_line(analyze(story("").trace)) == "limit: none, the trace has no requests"


def test_without_requests_there_are_no_statements() -> None:
    empty = limit_statements(ATTEMPTS.empty(), RETRY_CHAINS.empty())
    assert empty.equals(LIMIT_STATEMENTS.empty())
