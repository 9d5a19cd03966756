"""The attempts curve, against scipy and manual counts."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.story import Story, story

from tdxtrace.analysis.attempts import attempts
from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.errors import TableError
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, BUSY_ANSWERS, TIMES_NS


def curve_of(scenario: Story, by: str = "leaf", unit: str = "attempts") -> pl.DataFrame:
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    rows = ATTEMPTS.check(attempts(chains, busy_answers(scenario.seamcalls, chains)))
    return rows.filter(pl.col("by") == by, pl.col("unit") == unit)


def request(page: int, n_busy: int, end: str = "S") -> str:
    """Busy answers of thread ``page`` and what ends them: U leaves it in sight, X out of it."""
    calls = f"{page}/B{page} " * n_busy
    return calls + (f"{page}/{end}{page} " if end != "cut" else "")


def test_shares_of_uncensored_requests_are_plain_ratios() -> None:
    rows = curve_of(story("S1 S2 B3 S3 B4 B4 B4 S4"))
    assert rows.select("within", "done_ratio", "n_at_risk", "n_done").rows() == [
        (1, 0.5, 4, 2),
        (2, 0.75, 2, 1),
        (4, 1.0, 1, 1),
    ]


def test_an_error_ends_the_retrying_too() -> None:
    rows = curve_of(story("B1 E1 S2"))
    assert rows.select("within", "done_ratio").rows() == [(1, 0.5), (2, 1.0)]


def test_a_cut_request_is_censored() -> None:
    # Thread 2 is still busy when the trace ends: it needed more than three.
    rows = curve_of(story("S1 B3 B3 B3 B3 B3 S3 2/B2 2/B2 2/B2"))
    assert rows.select("within", "n_done", "n_censored", "done_ratio").rows() == [
        (1, 1, 0, pytest.approx(1 / 3)),
        (3, 0, 1, pytest.approx(1 / 3)),
        (6, 1, 0, 1.0),
    ]


def test_an_abandoned_or_resolved_request_is_censored() -> None:
    given_up = curve_of(story("B1 B1 S2"))
    assert given_up.select("within", "n_censored").rows() == [(1, 0), (2, 1)]
    assert given_up["done_ratio"].to_list() == [0.5, 0.5]
    resolve_elsewhere = curve_of(story("B1 B1 S2 2/S1"))
    assert resolve_elsewhere["done_ratio"].to_list() == [pytest.approx(2 / 3)] * 2


def test_a_request_settled_elsewhere_may_have_needed_any_number() -> None:
    # Of 40 requests ten are settled by another thread after two busy answers.
    text = " ".join(f"B{p} B{p} 2/S{p}" if p % 4 == 0 else f"B{p} B{p} S{p}" for p in range(1, 41))
    rows = curve_of(story(text))
    second = rows.filter(pl.col("within") == 2).row(0, named=True)
    third = rows.filter(pl.col("within") == 3).row(0, named=True)
    # Ten of the fifty at risk may have been done by the second attempt; all are by the third.
    assert (second["done_ratio"], third["done_ratio"]) == (pytest.approx(10 / 50), 1.0)
    assert second["done_high"] > stats.binomtest(20, 50).proportion_ci(0.95).high - 0.02
    assert second["done_low"] <= 10 / 50


def test_requests_whose_beginning_may_be_lost_are_left_out() -> None:
    # Of pages 2 and 4 only the end was seen, whether or not they were busy then.
    rows = curve_of(story("B1 S1 lost B2 B2 S2 lost S4 S5 B6 S6"))
    assert rows.select("within", "n_at_risk", "n_done", "n_censored").rows() == [
        (1, 3, 1, 0),
        (2, 2, 2, 0),
    ]
    assert rows["n_requests"].to_list() == [5, 5]


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30))
def test_the_curve_is_the_kaplan_meier_estimate(requests: list[tuple[int, bool]]) -> None:
    text = " ".join(
        request(page, n, "S" if done else "cut") for page, (n, done) in enumerate(requests, 1)
    )
    rows = curve_of(story(text))
    seen = [(n, done) for n, done in requests if done or n > 0]
    if not any(done for _, done in seen):
        return
    data = stats.CensoredData(
        uncensored=[n + 1 for n, done in seen if done],
        right=[n + 0.5 for n, done in seen if not done],
    )
    theirs = stats.ecdf(data).sf
    for within, done in rows.select("within", "done_ratio").rows():
        assert 1 - done == pytest.approx(float(theirs.evaluate(within)), abs=1e-12)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_counts_at_each_step_add_up(n_busy: list[int]) -> None:
    rows = curve_of(story(" ".join(request(p, n) for p, n in enumerate(n_busy, 1))))
    at_risk, done = rows["n_at_risk"].to_list(), rows["n_done"].to_list()
    assert at_risk[0] == rows["n_requests"][0] == len(n_busy)
    assert at_risk[1:] == [a - d for a, d in zip(at_risk, done, strict=True)][:-1]
    assert rows["done_ratio"].is_sorted()
    assert rows["done_ratio"][-1] == 1.0


def test_isolated_requests_have_no_design_effect() -> None:
    chance = np.random.default_rng(1)
    scenario = story(" ".join(request(1, int(busy)) for busy in chance.random(1200) < 0.03))
    row = curve_of(scenario).row(0, named=True)
    assert 1 <= row["design_effect"] < 1.5
    done, n = row["n_done"], row["n_requests"]
    exact = stats.binomtest(done, n).proportion_ci(0.95)
    assert row["done_low"] <= exact.low + 0.002
    assert row["done_high"] >= exact.high - 0.002


def test_bursts_reduce_the_effective_number() -> None:
    burst = " ".join(request(1, 1) for _ in range(10))
    quiet = " ".join(request(1, 0) for _ in range(90))
    row = curve_of(story(" ".join([burst, quiet] * 12))).row(0, named=True)
    assert row["n_episodes"] == 12
    assert row["design_effect"] == pytest.approx(10, rel=0.4)
    assert row["n_effective"] == pytest.approx(1200 / row["design_effect"], rel=0.01)


def test_time_ends_at_the_last_busy_answer_and_is_rounded_up() -> None:
    # Three busies of 10 us with 10 us between: the third returns 50 us after the first call.
    rows = curve_of(story("S1 B2 B2 B2 S2"), unit="ns")
    assert rows.select("within", "n_done").rows() == [(0, 1), (50_000, 1)]
    rows = curve_of(story("S1 B2 _1us B2 B2 S2"), unit="ns")
    assert rows["within"].to_list() == [0, 63_000]


def test_steps_of_time_are_preferred_numbers_in_order() -> None:
    assert (np.diff(TIMES_NS) > 0).all()
    assert TIMES_NS[1] == 100
    assert all(ns % 10 == 0 for ns in TIMES_NS[11:])
    assert TIMES_NS[-1] == 8_000_000_000_000


def test_each_resource_has_a_curve_over_all_requests() -> None:
    rows = curve_of(story("S1 B2 K2 K2 S2"), by="resource")
    found = rows.filter(pl.col("within") > 1).select("kind", "within", "n_requests").rows()
    assert found == [("SEPT entry", 3, 2), ("SEPT tree", 2, 2)]


def test_each_vm_has_a_curve() -> None:
    rows = curve_of(story("S1#1 B2#2 S2#2 S3#2"), by="td")
    assert rows.select("td_id", "within", "done_ratio").rows() == [
        (0x7D001, 1, 1.0),
        (0x7D002, 1, 0.5),
        (0x7D002, 2, 1.0),
    ]


def test_several_sources_are_taken_together() -> None:
    first, second = (story(text) for text in ("B1 S1 S2", "B1 B1 S1 S2 S3"))
    calls = pl.concat([first.seamcalls, second.seamcalls.with_columns(source=pl.lit(1, pl.UInt16))])
    chains = retry_chains(calls, first.losses)
    rows = attempts(chains, busy_answers(calls, chains))
    whole = rows.filter(pl.col("by") == "leaf", pl.col("unit") == "attempts")
    assert whole.select("within", "n_done").rows() == [(1, 3), (2, 1), (3, 1)]


def test_empty_input_gives_an_empty_table() -> None:
    assert attempts(RETRY_CHAINS.empty(), BUSY_ANSWERS.empty()).equals(ATTEMPTS.empty())


def test_columns_that_are_missing_are_named() -> None:
    with pytest.raises(TableError, match="episode"):
        attempts(RETRY_CHAINS.empty(), BUSY_ANSWERS.empty().drop("episode"))


# Busy answers, which the curve rests on.


def answers_of(text: str) -> pl.DataFrame:
    scenario = story(text)
    return BUSY_ANSWERS.check(
        busy_answers(scenario.seamcalls, retry_chains(scenario.seamcalls, scenario.losses))
    )


def test_busy_answers_are_counted_within_their_request() -> None:
    rows = answers_of("B1 2/B5 B1 2/B5 S1 2/B5 B1 S1 2/S5")
    first = rows.filter(pl.col("first_seq") == 2)
    assert first.select("number", "waited_ns").rows() == [(1, 10_000), (2, 50_000)]
    assert rows["number"].to_list() == [1, 1, 2, 2, 3, 1]


def test_a_fault_retried_across_entries_is_one_request() -> None:
    rows = answers_of("B1 enterX B1 enterB enterX S1")
    assert rows.select("leaf", "number").rows() == [(6, 1), (6, 2), (0, 1)]


def test_calls_in_interrupt_context_go_by_cpu() -> None:
    rows = answers_of("flushB!@1 flushB!@2 flushB!@1 flushS!@1 flushS!@2")
    assert rows.select("number", "first_seq").rows() == [(1, 2), (1, 4), (2, 2)]


def test_busy_answers_do_not_depend_on_the_order_of_rows() -> None:
    scenario = story(" ".join(request(page, page % 3) for page in range(1, 30)))
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    mixed = busy_answers(
        scenario.seamcalls.sample(fraction=1, shuffle=True, seed=1),
        chains.sample(fraction=1, shuffle=True, seed=2),
    )
    found = busy_answers(scenario.seamcalls, chains)
    assert found.height == 30
    assert mixed.equals(found)


def test_tables_of_different_traces_are_refused() -> None:
    scenario, other = story("B1 S1"), story("B1 B1 S1")
    with pytest.raises(TableError, match="from different traces"):
        busy_answers(scenario.seamcalls, retry_chains(other.seamcalls, other.losses))


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("123"),
            st.sampled_from(["", "track", "enter"]),
            st.sampled_from("BBS"),
            st.sampled_from("12"),
        ),
        max_size=60,
    )
)
def test_a_chain_has_as_many_answers_as_it_says(calls: list[tuple[str, str, str, str]]) -> None:
    scenario = story(" ".join(f"{thread}/{leaf}{end}{page}" for thread, leaf, end, page in calls))
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    rows = busy_answers(scenario.seamcalls, chains)
    counted = rows.group_by("source", "first_seq", "leaf").agg(
        n=pl.len(), numbers=pl.col("number").sort(), last=pl.col("seq").max()
    )
    joined = chains.filter(pl.col("n_busy") > 0).join(
        counted, on=["source", "first_seq", "leaf"], how="left"
    )
    for row in joined.iter_rows(named=True):
        assert row["numbers"] == list(range(1, row["n_busy"] + 1))
        assert row["first_seq"] <= row["last"] <= row["last_seq"]
