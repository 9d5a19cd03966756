"""Counters per leaf."""

from __future__ import annotations

import math

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.story import story

from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.analysis.stats import leaf_stats
from tdxtrace.errors import TableError
from tdxtrace.tables.findings import LEAF_STATS, OUTCOMES, RETRY_CHAINS


def stats_of(text: str) -> pl.DataFrame:
    scenario = story(text)
    return LEAF_STATS.check(leaf_stats(retry_chains(scenario.seamcalls, scenario.losses)))


def test_requests_attempts_and_outcomes_are_counted() -> None:
    row = stats_of("S1 B2 B2 S2 B3 E3 B4 2/S4 S5 B6").row(0, named=True)
    counted = {name: row[name] for name in ("n_requests", "n_seamcalls", "n_busy")}
    assert counted == {"n_requests": 7, "n_seamcalls": 10, "n_busy": 5}
    assert row["retried_seamcalls"] == 4
    assert {name: row[name] for name in OUTCOMES} == {
        "succeeded": 4,
        "failed": 1,
        "resolved_elsewhere": 1,
        "abandoned": 0,
        "cut": 1,
    }


def test_a_request_counts_as_retried_once_however_often_it_was_busy() -> None:
    assert stats_of("B B B B S")["retried_seamcalls"].to_list() == [1]


def test_the_leaf_with_most_retried_requests_comes_first() -> None:
    text = "blockS1 trackS trackS B1 S1 B2 S2 septB1 septS1 septS2"
    assert stats_of(text)["leaf"].to_list() == [6, 3, 38, 7]


def test_cut_chains_count_for_the_maximum_and_not_for_quantiles() -> None:
    row = stats_of("S1 S2 S3 B4 B4 B4 B4").row(0, named=True)
    assert (row["p50_attempts"], row["p99_attempts"], row["max_attempts"]) == (1, 1, 4)
    assert row["max_ns"] > row["p99_ns"]


def test_where_every_chain_was_cut_there_are_no_quantiles() -> None:
    row = stats_of("B B B").row(0, named=True)
    quantiles = ("p50_attempts", "p99_attempts", "p99_ns")
    assert [row[name] for name in quantiles] == [None, None, None]
    assert row["max_attempts"] == 3


def _request(page: int, attempts: int) -> str:
    return f"{f'B{page} ' * (attempts - 1)}S{page}"


@pytest.mark.parametrize(
    ("attempts", "p50", "p99"),
    [
        ([1], 1, 1),
        ([1, 3], 1, 3),
        ([1, 2, 3], 2, 3),
        ([1, 2, 3, 4], 2, 4),
        ([*99 * [1], 9], 1, 1),
        ([*98 * [1], 9, 9], 1, 9),
    ],
)
def test_a_quantile_is_the_smallest_number_that_so_many_did_not_exceed(
    attempts: list[int], p50: int, p99: int
) -> None:
    text = " ".join(_request(page, n) for page, n in enumerate(attempts, 1))
    row = stats_of(text).row(0, named=True)
    assert (row["p50_attempts"], row["p99_attempts"]) == (p50, p99)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_quantiles_satisfy_their_definition(attempts: list[int]) -> None:
    row = stats_of(" ".join(_request(p, n) for p, n in enumerate(attempts, 1))).row(0, named=True)
    ranked = sorted(attempts)
    for share, name in ((0.5, "p50_attempts"), (0.99, "p99_attempts")):
        assert row[name] == ranked[math.ceil(share * len(ranked)) - 1]
    assert row["max_attempts"] == max(attempts)


def test_the_longest_time_ignores_calls_without_start_or_end() -> None:
    scenario = story("S1 B2~ S2 S3")
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    row = leaf_stats(chains).row(0, named=True)
    assert row["max_ns"] == chains["took_ns"].max() == 10_000


def test_sources_are_kept_apart() -> None:
    scenario = story("B1 S1")
    calls = pl.concat(
        [scenario.seamcalls.with_columns(source=pl.lit(n, pl.UInt16)) for n in (1, 0)]
    )
    rows = leaf_stats(retry_chains(calls, scenario.losses)).select("source", "n_requests").rows()
    assert rows == [(0, 1), (1, 1)]


def test_empty_input_gives_an_empty_table() -> None:
    nothing = leaf_stats(RETRY_CHAINS.empty())
    assert nothing.is_empty()
    assert nothing.schema == LEAF_STATS.schema


def test_columns_that_are_missing_are_named() -> None:
    with pytest.raises(TableError, match="took_ns"):
        leaf_stats(RETRY_CHAINS.empty().drop("took_ns"))
