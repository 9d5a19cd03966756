"""Counts can be added in any order, and subtracted."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support.story import Story, story

from tdxtrace.analysis.attempts import AttemptCounts, attempts, count_attempts, curves_of
from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.fleet.merge import added, added_totals, subtracted

# Requests of two TDs, busy, settled by another thread, given up and cut.
_WORDS = (
    *("S{p}", "B{p} S{p}", "B{p} B{p} B{p} S{p}", "K{p} S{p}", "B{p} B{p} 2/S{p}"),
    *("B{p} K{p} S{p}", "S{p}#1", "B{p}#2 B{p}#2 S{p}#2", "E{p}", "B{p}"),
)


def scenario_of(words: list[int]) -> Story:
    return story(" ".join(_WORDS[word].format(p=page) for page, word in enumerate(words, 1)))


def of_inputs(stories: list[Story]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The chains and busy answers of stories that are read together."""
    calls = pl.concat(
        one.seamcalls.with_columns(source=pl.lit(number, pl.UInt16))
        for number, one in enumerate(stories)
    )
    chains = retry_chains(calls, stories[0].losses)
    return chains, busy_answers(calls, chains)


def counted(one: Story, number: int) -> AttemptCounts:
    calls = one.seamcalls.with_columns(source=pl.lit(number, pl.UInt16))
    chains = retry_chains(calls, one.losses)
    return count_attempts(chains, busy_answers(calls, chains))


def plus(one: AttemptCounts, other: AttemptCounts) -> AttemptCounts:
    return AttemptCounts(
        added(pl.concat([one.steps, other.steps])),
        added_totals(pl.concat([one.totals, other.totals])),
        has_makers=one.has_makers,
    )


inputs = st.lists(
    st.lists(st.integers(0, len(_WORDS) - 1), min_size=1, max_size=25), min_size=2, max_size=5
)


@settings(max_examples=12)
@given(inputs, st.randoms(use_true_random=False))
def test_counts_of_inputs_add_in_any_order_and_tree(
    words: list[list[int]], chance: st.DataObject
) -> None:
    stories = list(map(scenario_of, words))
    parts = [counted(one, number) for number, one in enumerate(stories)]
    while len(parts) > 1:
        chance.shuffle(parts)  # type: ignore[attr-defined]
        parts.append(plus(parts.pop(), parts.pop()))
    assert_frame_equal(curves_of(parts[0]), attempts(*of_inputs(stories)), check_exact=True)


@settings(max_examples=8)
@given(inputs)
def test_an_input_is_left_out_by_subtraction(words: list[list[int]]) -> None:
    stories = list(map(scenario_of, words))
    parts = [counted(one, number) for number, one in enumerate(stories)]
    whole = reduce(plus, parts)
    rest = curves_of(subtracted(whole, parts[-1]))
    assert_frame_equal(rest, attempts(*of_inputs(stories[:-1])), check_exact=True)


def test_requests_of_unknown_tds_are_clusters_of_their_own_input() -> None:
    # Without TD the requests of two inputs are no more alike than those of two TDs.
    one = counted(story("B1 S1 S2 B3 S3"), 0)
    both = plus(one, counted(story("B1 S1 S2"), 1))
    leaf = both.totals.filter(pl.col("td_id").is_null(), pl.col("source").is_null())
    assert leaf.select("n_all", "source_clusters", "source_sizes").row(0) == (5, 2, 9 + 4)
    assert leaf["td_sizes"].item() == 9 + 4


@pytest.mark.parametrize("column", ["squares", "n_censored", "td_products"])
def test_a_curve_depends_on_what_is_counted(column: str) -> None:
    # A guard of the laws above: counts that were changed give other curves.
    text = " ".join(f"B{p} B{p} S{p}" if p % 2 else f"B{p} S{p}#1" for p in range(1, 60))
    given_counts = counted(story(text + " 3/B70 3/B70"), 0)
    more = given_counts.steps.with_columns(pl.col(column) * 5 + 50)
    changed = curves_of(replace(given_counts, steps=more))
    assert not changed.equals(curves_of(given_counts))
