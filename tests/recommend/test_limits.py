"""Limits that are observed, extrapolated or withheld, and their coverage."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pytest
from bench import coverage, unlike
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.made_chains import chains_of, spaced_chains
from support.story import story

from tdxtrace.analysis.attempts import attempts
from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.errors import QueryError, TableError
from tdxtrace.intervals import exact_interval
from tdxtrace.pipeline import analyze
from tdxtrace.recommend import tail
from tdxtrace.recommend.extrapolate import curve_of
from tdxtrace.recommend.limits import exposure_of, limits, observed_seconds
from tdxtrace.recommend.statements import limit_statements
from tdxtrace.recommend.target import Exposure, Rate, Target, parse_rate
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.events import LOSSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, LIMITS

NO_LOSS = LOSSES.empty()


def row_of(n_busy: list[int] | np.ndarray[Any, Any], target: Target, unit: str = "attempts") -> Any:  # noqa: ANN401
    chains = chains_of(n_busy)
    curve = attempts(chains, coverage.answers_of(chains))
    rows = LIMITS.check(limits(curve, chains, NO_LOSS, 1.0, target))
    return rows.row(
        by_predicate=(pl.col("made_by") == "anyone") & (pl.col("unit") == unit), named=True
    )


def test_the_limit_is_where_the_exact_bound_meets_the_target() -> None:
    row = row_of(spaced_chains([1] * 40 + [2] * 20 + [3] * 5, 10_000), Target(2e-3))
    assert (row["basis"], row["limit"]) == ("observed", 3)
    n = row["n_requests"]
    above = stats.beta.ppf(0.95, 5 + 1, n - 5)
    assert row["exceed_high"] == pytest.approx(above)
    assert above <= 2e-3
    assert row["exceed_ratio"] == pytest.approx(5 / n)
    assert row["estimate"] == 3
    assert row["estimate_low"] <= row["estimate"] <= row["estimate_high"]
    assert (row["n_retried"], row["n_busy"], row["max_seen"]) == (65, 95, 4)
    assert row["reason"] is None


def test_limits_grow_with_confidence_and_rarity() -> None:
    numbers = spaced_chains([1] * 60 + [2] * 30 + [3] * 15 + [4] * 4, 20_000)
    limit = [row_of(numbers, Target(2e-3, sure))["limit"] for sure in (0.6, 0.9, 0.99, 0.9999)]
    assert limit == sorted(limit)
    limit = [row_of(numbers, Target(target))["limit"] for target in (1e-2, 5e-3, 2e-3, 1e-3)]
    assert limit == sorted(limit)


def test_where_nothing_was_busy_the_rule_of_three_bounds_it() -> None:
    enough = row_of([0] * 3000, Target(1e-3))
    assert (enough["basis"], enough["limit"], enough["exceed_ratio"]) == ("nothing_busy", 1, 0.0)
    assert enough["exceed_high"] == pytest.approx(3 / 3000, rel=0.01)
    few = row_of([0] * 2990, Target(1e-3))
    assert (few["basis"], few["limit"]) == ("withheld", None)
    # Half as many again as the rule of three asks for, at 2,990 requests in the second recorded.
    assert few["needed_requests"] == math.ceil(1.5 * -math.log(0.05) / 1e-3) == 4494
    assert few["needed_s"] == pytest.approx(4494 / 2990)
    assert "no busy answers" in few["reason"]


def test_without_busy_answers_the_limit_in_time_is_zero() -> None:
    assert row_of([0] * 3000, Target(1e-3), "ns")["limit"] == 0


def test_few_busy_requests_support_no_tail() -> None:
    row = row_of(spaced_chains([1, 2, 1, 5, 1], 500), Target(1e-4))
    assert (row["basis"], row["limit"]) == ("withheld", None)
    assert row["reason"].startswith("not supported by this trace: too few independent ")
    assert row["needed_requests"] >= 1.5 * 29_957


def test_a_target_far_rarer_than_what_was_counted_is_not_supported() -> None:
    numbers = spaced_chains(list(np.random.default_rng(3).geometric(0.5, 300)), 5_000)
    assert row_of(numbers, Target(2e-4))["basis"] == "extrapolated"
    row = row_of(numbers, Target(1e-4))
    assert row["basis"] == "withheld"
    assert "rarer than one of " in row["reason"]


def test_a_limit_beyond_the_data_is_extrapolated_and_marked() -> None:
    numbers = spaced_chains(list(np.random.default_rng(5).geometric(0.5, 400)), 40_000)
    row = row_of(numbers, Target(4e-5))
    assert (row["basis"], row["model"], row["shape"]) == ("extrapolated", "geometric", 0.0)
    truth = 1 + math.ceil(math.log(4e-5 / 0.01) / math.log(0.5))
    assert max(row["max_seen"], truth) <= row["limit"] <= 3 * truth
    assert row["estimate_low"] <= truth <= row["estimate_high"]
    assert row["estimate"] <= row["limit"]
    assert row["exceed_ratio"] <= 4e-5
    assert row["exceed_high"] is None
    assert row["goodness"] > 0.01
    assert row["reason"].startswith("from a model, if the tail continues as seen")


def test_a_limit_of_a_model_is_not_below_the_most_seen() -> None:
    numbers = [int(n) for n in np.random.default_rng(5).geometric(0.5, 400)]
    row = row_of(spaced_chains([*numbers, 16], 40_000), Target(6e-5))
    assert row["basis"] == "extrapolated"
    assert row["limit"] == row["max_seen"] == 17


def test_one_request_that_does_not_belong_to_the_tail_withholds_the_model() -> None:
    numbers = [int(n) for n in np.random.default_rng(5).geometric(0.5, 400)]
    row = row_of(spaced_chains([*numbers, 40], 40_000), Target(4e-5))
    assert (row["basis"], row["limit"]) == ("withheld", None)
    assert "the largest value, 41, does not fit the tail of the others" in row["reason"]


def test_no_model_goes_beyond_the_policy_that_was_recorded() -> None:
    # TDH.MEM.RANGE.BLOCK, never called more than twice: mainline kicks before the second call.
    chains = chains_of(spaced_chains([1] * 60, 3_000)).with_columns(leaf=pl.lit(7, pl.UInt16))
    curve = attempts(chains, coverage.answers_of(chains))
    for target, limit in ((4e-3, 2), (5e-4, None)):
        row = limits(curve, chains, NO_LOSS, 1.0, Target(target)).row(0, named=True)
        assert row["limit"] == limit
    assert "only with such a kick; no model reaches beyond that" in row["reason"]
    of_aug = chains.with_columns(leaf=pl.lit(6, pl.UInt16))
    curve = attempts(of_aug, coverage.answers_of(of_aug))
    row = limits(curve, of_aug, NO_LOSS, 1.0, Target(5e-4)).row(0, named=True)
    assert row["basis"] == "extrapolated"


def test_a_model_may_go_beyond_a_limit_at_which_requests_were_given_up() -> None:
    made = unlike.KINDS["given up at 16"](3_000, np.random.default_rng(2))
    chains = unlike.chains_of(made)
    curve = attempts(chains, coverage.answers_of(chains))
    row = limits(curve, chains, NO_LOSS, 1.0, Target(1e-3)).row(0, named=True)
    assert (row["basis"], row["recorded_calls"], row["needed_requests"]) == (
        "extrapolated",
        16,
        None,
    )
    assert row["limit"] > 16
    assert made.more(row["limit"]) <= 1e-3
    assert "recorded under a limit of 16 calls" in row["reason"]


def test_bursts_and_requests_lost_from_sight_need_a_longer_recording() -> None:
    alone = row_of(spaced_chains([1] * 30, 1_000), Target(1e-3))
    burst = row_of([n for _ in range(10) for n in (*[0] * 100, 1, 1, 1)], Target(1e-3))
    assert burst["needed_requests"] > 2 * alone["needed_requests"] >= 2 * 4494


def test_a_heavy_tail_is_recognised() -> None:
    u = np.random.default_rng(2).random(3_000)
    heavy = np.ceil(2 * (u**-0.6 - 1) / 0.6)
    row = row_of(spaced_chains([int(max(n, 1)) for n in heavy], 100_000), Target(1e-5))
    assert row["model"] == "generalised_pareto"
    assert row["shape"] == pytest.approx(0.6, abs=0.25)


def test_a_tail_that_fits_no_model_is_withheld() -> None:
    # Most of them once or twice, the others ten to twelve times, and none in between.
    row = row_of(spaced_chains([1, 2, 1, 2, 10, 11, 12] * 80, 50_000), Target(3e-5))
    assert (row["basis"], row["limit"]) == ("withheld", None)
    assert "neither geometric nor generalised Pareto" in row["reason"]


def test_bursts_make_limits_larger_or_withhold_them() -> None:
    numbers = [1] * 100 + [2] * 40 + [3] * 20
    alone = row_of(spaced_chains(numbers, 40_000), Target(1e-3))
    burst = [n for _ in range(16) for n in (*[0] * 2_500, *[1] * 6, *[2] * 3, 3)]
    together = row_of(burst, Target(1e-3))
    assert alone["basis"] == "observed"
    assert together["design_effect"] > 2 * alone["design_effect"]
    assert together["limit"] is None or together["limit"] >= alone["limit"]


def test_abandoned_requests_are_censored() -> None:
    scenario = story(" ".join(f"B{p} B{p} B{p}" if p % 9 == 0 else f"S{p}" for p in range(1, 1200)))
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    curve = attempts(chains, busy_answers(scenario.seamcalls, chains))
    row = limits(curve, chains, scenario.losses, 1.0, Target(0.05)).row(0, named=True)
    assert (row["basis"], row["n_censored"]) == ("withheld", 133)
    assert row["needed_requests"] is None
    assert "recorded under a limit of 3 calls, at which 133 requests were given up" in row["reason"]


def limit_of(text: str, target: Target, unit: str = "attempts") -> dict[str, Any]:
    """The row of anyone's limit that a story gives."""
    scenario = story(text)
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    curve = attempts(chains, busy_answers(scenario.seamcalls, chains))
    rows = LIMITS.check(limits(curve, chains, scenario.losses, 1.0, target))
    return rows.row(
        by_predicate=(pl.col("made_by") == "anyone") & (pl.col("unit") == unit), named=True
    )


def test_a_request_without_an_answer_is_not_done_at_once() -> None:
    # Returns are not probed: nothing is known, however many calls there are.
    row = limit_of(" ".join(f"U{p}" for p in range(1, 400)), Target(0.02))
    assert (row["basis"], row["limit"], row["n_unanswered"]) == ("withheld", None, 399)
    assert "399 of 399 requests are left out: no answer was recorded" in row["reason"]
    # Where a third of them is known, that third is the number of trials.
    third = " ".join(f"{p}/{'S' if p % 3 else 'U'}{p}" for p in range(1, 400))
    row = limit_of(third, Target(0.02))
    assert (row["basis"], row["limit"], row["n_unanswered"]) == ("nothing_busy", 1, 133)
    assert row["exceed_high"] == pytest.approx(3 / 266, rel=0.01)
    assert "133 of 399 requests are left out: no answer" in row["reason"]


# The policy that was recorded.


def test_the_limit_of_the_recorded_kernel_is_no_chance() -> None:
    # Five of 61 are given up at the third call, none elsewhere: no more of it helps.
    text = " ".join(f"B{p} B{p} B{p}" if p % 12 == 0 else f"B{p} S{p}" for p in range(1, 62))
    row = limit_of(text, Target(0.01))
    assert (row["basis"], row["recorded_calls"], row["needed_requests"]) == ("withheld", 3, None)
    assert "recorded under a limit of 3 calls, at which 5 requests were given up" in row["reason"]
    assert "never under this policy" in row["reason"]
    # What it does count is counted.
    assert limit_of(text, Target(0.3))["limit"] == 2


@pytest.mark.parametrize("text", ["B1 B1 S2 B3 B3 S4", "B1 B1 S2 B3 S4 B5 S6", "B1 B1 B1 S1 B2 S4"])
def test_requests_abandoned_at_random_reveal_no_recorded_limit(text: str) -> None:
    assert limit_of(text, Target(0.3))["recorded_policy"] is None


def test_a_limit_recorded_with_a_kick_says_so() -> None:
    zaps = " ".join(f"block{'B' if p % 9 == 0 else 'S'}{p} blockS{p}" for p in range(1, 60))
    row = limit_of(zaps, Target(0.08))
    assert (row["limit"], row["recorded_calls"]) == (2, 2)
    assert "numbers for 2 are valid only with such a kick" in row["reason"]
    # A third call shows that nobody kicks.
    row = limit_of(zaps + " blockB99 blockB99 blockS99", Target(0.3))
    assert (row["recorded_calls"], row["recorded_policy"]) == (None, None)


def test_no_number_tells_a_target_from_a_share_that_equals_it() -> None:
    text = " ".join(f"B{p} B{p} B{p}" if p % 20 == 0 else f"S{p}" for p in range(1, 401))
    row = limit_of(text, Target(float(np.nextafter(0.05, 1))))
    assert (row["basis"], row["needed_requests"]) == ("withheld", None)


def test_more_is_needed_to_tell_the_target_from_a_share_that_was_given_up() -> None:
    text = " ".join(f"B{p} B{p} B{p}" if p % 20 == 0 else f"S{p}" for p in range(1, 400))
    scenario = story(text)
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    curve = attempts(chains, busy_answers(scenario.seamcalls, chains)).filter(
        by="leaf", unit="attempts"
    )
    needed = []
    for target in (0.3, 0.06, 0.052):
        given = {"n_requests": 399, "target": target, "confidence": 0.95}
        needed.append(curve_of(curve, "attempts", given).needed or 0)
    # 4.8 % were given up: 0.3 is far from that, 0.052 near.
    assert 0 < needed[0] < 100
    assert 2_000 < needed[1] < needed[2] / 5


# By who made it busy.


def by_maker(text: str, causes: dict[str, str], target: Target) -> dict[str, dict[str, Any]]:
    scenario = story(text)
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    answers = busy_answers(scenario.seamcalls, chains)
    caused = answers.join(scenario.seamcalls, on=["source", "seq"]).with_columns(
        cause=(pl.col("status") % 256).cast(pl.String).replace_strict(causes), rank=pl.lit(1)
    )
    missing = [name for name in BUSY_CAUSES.schema if name not in caused.columns]
    caused = caused.with_columns(pl.lit(None).alias(name) for name in missing)
    table = caused.select(BUSY_CAUSES.schema.names()).cast(BUSY_CAUSES.schema)
    curve = ATTEMPTS.check(attempts(chains, answers, table))
    rows = LIMITS.check(limits(curve, chains, scenario.losses, 1.0, target))
    attempted = rows.filter(pl.col("unit") == "attempts")
    return {row["made_by"]: row for row in attempted.iter_rows(named=True)}


_WHO = {"146": "host_conflict", "1": "guest"}  # the SEPT tree 0x92, the SEPT entry
_MIXED = " ".join(f"B{p} B{p} K{p} S{p}" if p % 40 == 0 else f"S{p}" for p in range(1, 1600))


def test_host_and_guest_get_limits_of_their_own() -> None:
    rows = by_maker(_MIXED, _WHO, Target(0.01, 0.9))
    assert {name: row["limit"] for name, row in rows.items()} == {
        "anyone": 4,
        "host": 3,
        "guest": 2,
    }
    assert {name: row["n_busy"] for name, row in rows.items()} == {
        "anyone": 117,
        "host": 78,
        "guest": 39,
    }


def test_unexplained_answers_count_for_host_and_guest() -> None:
    rows = by_maker(_MIXED, {"146": "unexplained", "1": "armed_entry"}, Target(0.01, 0.9))
    assert {name: row["limit"] for name, row in rows.items()} == {
        "anyone": 4,
        "host": 3,
        "guest": 4,
    }


def test_a_guest_that_made_nothing_busy_has_the_rule_of_three() -> None:
    rows = by_maker(_MIXED, {"146": "host_conflict", "1": "kernel_bug"}, Target(0.01, 0.9))
    assert (rows["guest"]["basis"], rows["guest"]["limit"]) == ("nothing_busy", 1)


def test_a_request_last_seen_busy_with_the_guest_says_nothing_of_the_host() -> None:
    text = " ".join(f"K{p}" if p % 4 == 0 else f"S{p}" for p in range(1, 401))
    rows = by_maker(text, _WHO, Target(0.05, 0.9))
    assert (rows["host"]["limit"], rows["host"]["n_unanswered"]) == (1, 100)
    assert rows["host"]["exceed_high"] == pytest.approx(2.3 / 300, rel=0.01)
    assert "last seen busy because of others" in rows["host"]["reason"]
    assert (rows["guest"]["n_unanswered"], rows["guest"]["n_censored"]) == (0, 100)


def test_without_causes_the_split_is_withheld_with_the_reason() -> None:
    chains = chains_of([0, 1, 0])
    rows = limits(attempts(chains, coverage.answers_of(chains)), chains, NO_LOSS, 1.0)
    split = rows.filter(pl.col("made_by") != "anyone")
    assert split["basis"].unique().to_list() == ["withheld"]
    assert split["reason"].str.contains("causes of busy answers unknown").all()


def test_limits_from_few_bursts_say_so() -> None:
    few, enough = (row_of(spaced_chains([1] * n, 10_000), Target(0.01)) for n in (9, 10))
    assert few["basis"] == "observed"
    assert few["reason"].startswith("fewer than 10 bursts were seen (")
    assert enough["reason"] is None


def test_findings_have_limits_by_maker() -> None:
    found = analyze(story("B1 S1 K2 S2").trace)
    assert {"cause", "maker"} <= set(found.attempts["by"])
    split = found.limits.filter(pl.col("made_by") != "anyone")
    assert not split["reason"].str.contains("causes of busy answers unknown").any()


def test_the_number_of_unexplained_answers_is_in_the_reason() -> None:
    rows = by_maker(_MIXED, {"146": "unexplained", "1": "guest"}, Target(0.01, 0.9))
    result = "78 busy answers are unexplained and count for both host and guest"
    assert rows["anyone"]["reason"] is None
    assert rows["host"]["reason"] == rows["guest"]["reason"] == result


def test_a_maker_without_a_limit_of_its_own_has_that_of_all() -> None:
    # The host in the first half and the guest in the second: neither share holds at all times.
    busy = {p: "B" if p < 600 else "K" for p in range(10, 1200, 10)}
    text = " ".join(f"{busy[p]}{p} S{p}" if p in busy else f"S{p}" for p in range(1, 1200))
    rows = by_maker(text, _WHO, Target(0.01, 0.9))
    assert [row["limit"] for row in rows.values()] == [2, 2, 2]
    assert rows["anyone"]["reason"] is None
    assert rows["host"]["reason"].startswith("same limit as for anyone")
    assert rows["guest"]["reason"].startswith("same limit as for anyone")


# What is alike.


@pytest.mark.parametrize(
    ("kind", "unit", "within"),
    [
        ("geometric (control)", None, 1),
        ("8 tied waiters", "burst", 1),
        ("saturated, in blocks", "burst", 5),
        ("saturated, no times", "period", 5),
        ("10 TDs", "td", 1),
        # Each input has one TD.
        ("10 inputs", "td", 1),
        ("6 storms", "period", 1),
        ("drift", "period", 2),
    ],
)
def test_the_widest_unit_of_dependence_counts(kind: str, unit: str | None, within: int) -> None:
    made = unlike.KINDS[kind](20_000, np.random.default_rng(6))
    chains = unlike.chains_of(made)
    curve = ATTEMPTS.check(attempts(chains, coverage.answers_of(chains)))
    row = curve.filter(pl.col("by") == "leaf", pl.col("within") == within).row(0, named=True)
    if unit is None:
        assert row["design_effect"] < 2.5
    else:
        assert row["unit_of_dependence"] == unit
        assert row["design_effect"] > 4
    assert curve.filter(pl.col("by") == "leaf")["drifts"].any() == (kind == "drift")
    # A new TD or the end of the drift is within the interval too.
    assert row["done_low"] <= 1 - made.more(within) <= row["done_high"]


def test_two_tds_that_differ_support_no_limit_for_a_third() -> None:
    numbers = [n for _ in range(400) for n in (0, 1, 0, 0)]
    made = unlike.Made(np.array(numbers), lambda _: 0.5, np.arange(1600) % 2)
    chains = unlike.chains_of(made)
    curve = attempts(chains, coverage.answers_of(chains))
    row = limits(curve, chains, NO_LOSS, 1.0, Target(0.3)).row(0, named=True)
    assert (row["basis"], row["unit_of_dependence"]) == ("withheld", "td")
    assert "record more of them, not more requests" in row["reason"]
    assert row["needed_requests"] is None
    assert (row["worst_td"], row["worst_td_ratio"]) == (1, 0.5)


def test_no_limit_is_given_where_the_share_changes_over_the_recording() -> None:
    made = unlike.drift(20_000, np.random.default_rng(4))
    chains = unlike.chains_of(made)
    curve = attempts(chains, coverage.answers_of(chains))
    rows = limits(curve, chains, LOSSES.empty(), 1.0, Target(0.01)).filter(made_by="anyone")
    assert rows["basis"].to_list() == ["withheld", "withheld"]
    assert "rises or falls over the recording" in rows["reason"][0]
    said = limit_statements(curve, chains)
    assert said["drifts"].all()


def test_a_model_is_not_asked_for_what_the_counts_may_already_keep() -> None:
    # The share is within the target, but the storms that differ leave its interval above.
    made = unlike.six_storms(3_000, np.random.default_rng(65))
    chains = unlike.chains_of(made)
    curve = attempts(chains, coverage.answers_of(chains))
    row = limits(curve, chains, NO_LOSS, 1.0, Target(0.03)).row(0, named=True)
    assert row["basis"] == "withheld"
    assert "the share seen is within the target, but not surely" in row["reason"]


# Merging.


@settings(max_examples=8)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30), min_size=2, max_size=3))
def test_merging_traces_is_analysing_them_together(traces: list[list[int]]) -> None:
    texts = [" ".join(f"B{p} " * n + f"S{p}" for p, n in enumerate(t, 1)) for t in traces]
    result = [
        story(text).seamcalls.with_columns(source=pl.lit(place, pl.UInt16))
        for place, text in enumerate(texts)
    ]
    together = pl.concat(result)
    chains = retry_chains(together, NO_LOSS)
    answers = busy_answers(together, chains)
    apart_ = [retry_chains(calls, NO_LOSS) for calls in result]
    merged = pl.concat(apart_)
    of_each = [busy_answers(calls, own) for calls, own in zip(result, apart_, strict=True)]
    target = Target(0.2, 0.8)
    one = limits(attempts(chains, answers), chains, NO_LOSS, 1.0, target)
    other = limits(
        attempts(merged[::-1], pl.concat(of_each[::-1])), merged[::-1], NO_LOSS, 1.0, target
    )
    assert one.equals(other)


def test_limits_are_reproducible() -> None:
    numbers = spaced_chains(list(np.random.default_rng(5).geometric(0.5, 400)), 40_000)
    assert row_of(numbers, Target(1e-6)) == row_of(numbers, Target(1e-6))


# Wishes.


def test_a_rate_is_shared_out_among_the_leaves() -> None:
    target = Target(rate=parse_rate("1 VM per hour"))
    hour = Exposure(3600.0, 1800.0, 0)
    # 3600 requests of a leaf in an hour, two leaves: half a request of each may exceed.
    assert target.for_leaf(3600, 2, hour) == pytest.approx(0.5 / 3600)
    assert target.for_leaf(3600, 2, Exposure(None, None, 0)) is None
    assert target.for_leaf(1, 1, Exposure(1e9, 1e9, 0)) == 0.5
    assert Target(1e-4).for_leaf(5, 3, hour) == 1e-4
    # In that hour the VMs ran for half an hour.
    of_vms = Target(rate=parse_rate("1 per VM-hour"))
    assert of_vms.for_leaf(3600, 2, hour) == pytest.approx(0.25 / 3600)


def test_a_boot_of_4_gb_adds_a_million_pages() -> None:
    target = Target(rate=parse_rate("1 in 1000 boots"))
    boot = Exposure(None, None, 1_048_576)
    assert target.for_leaf(1_048_576, 1, boot) == pytest.approx(1e-3 / 1_048_576)
    # Of a leaf that is called once for 100 pages, 100 times as many may exceed.
    assert target.for_leaf(10_486, 1, boot) == pytest.approx(1e-3 / 10_486)
    larger = Target(rate=parse_rate("1 in 1,000 boots of 16 GB"))
    assert larger.for_leaf(1_048_576, 1, boot) == pytest.approx(0.25e-3 / 1_048_576)
    assert target.for_leaf(5, 1, Exposure(1.0, 1.0, 0)) is None


def test_a_rate_of_vms_counts_only_calls_that_lose_one() -> None:
    scenario = story(" ".join(f"B{p} S{p} blockS{p}" for p in range(1, 40)))
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    curve = attempts(chains, busy_answers(scenario.seamcalls, chains))
    for words, basis in (("1 VM per year", "no_vm_lost"), ("1 per year", "withheld")):
        rate = parse_rate(words)
        rows = LIMITS.check(limits(curve, chains, NO_LOSS, 1.0, Target(rate=rate)))
        of_aug = rows.filter(leaf=6, made_by="anyone", unit="attempts").row(0, named=True)
        of_block = rows.filter(leaf=7, made_by="anyone", unit="attempts").row(0, named=True)
        assert of_aug["basis"] == basis
        # A block that is busy at last kills the VM: all of the rate is left for it.
        n_sharing = 1 if rate.counts_vms else 2
        assert of_block["basis"] == "withheld"
        assert of_block["target"] == pytest.approx(rate.allowed / n_sharing / 39)
        assert of_block["confidence"] == pytest.approx(1 - 0.05 / n_sharing)
        if rate.counts_vms:
            assert of_aug["limit"] == 1
            assert "the guest's fault is taken again" in of_aug["reason"]


def test_the_worst_input_is_named() -> None:
    made = unlike.Made(
        np.array([0, 0, 0, 1] * 100),
        lambda _: 0.5,
        td=np.arange(400) % 4,
        source=np.arange(400) % 2,
    )
    chains = unlike.chains_of(made)
    curve = attempts(chains, coverage.answers_of(chains))
    row = limits(curve, chains, NO_LOSS, 1.0, Target(0.3)).row(0, named=True)
    assert (row["worst_source"], row["worst_source_ratio"]) == (1, 0.5)
    assert (row["worst_td"], row["worst_td_ratio"]) == (3, 1.0)
    alone = chains.with_columns(source=pl.lit(0, pl.UInt16))
    curve = attempts(alone, coverage.answers_of(alone))
    row = limits(curve, alone, NO_LOSS, 1.0, Target(0.3)).row(0, named=True)
    assert (row["worst_source"], row["worst_source_ratio"]) == (None, None)


def test_what_was_recorded_is_hosts_time_vms_time_and_pages() -> None:
    scenario = story("S1 _2s S2 S3#2 K4 B5^1 S6^1")
    seen = exposure_of(retry_chains(scenario.seamcalls, scenario.losses), 7.0)
    assert seen.host_s == 7.0
    assert seen.vm_s == pytest.approx(2.0, rel=0.1)
    assert seen.n_pages == 3 + 512
    assert exposure_of(retry_chains(scenario.seamcalls, scenario.losses), None).vm_s is None


def test_all_limits_for_a_rate_hold_together() -> None:
    scenario = story(" ".join(f"S{p} addS{p}" for p in range(1, 30)))
    found = analyze(scenario.trace)
    many = found.retry_chains["leaf"].n_unique()
    assert many == 2
    rows = limits(
        found.attempts, found.retry_chains, NO_LOSS, 1.0, Target(rate=parse_rate("9 per hour"))
    )
    assert rows["confidence"].unique().to_list() == [pytest.approx(0.975)]
    alone = limits(found.attempts, found.retry_chains, NO_LOSS, 1.0, Target(0.2))
    assert alone["confidence"].unique().to_list() == [0.95]


def test_a_limit_in_time_is_given_in_attempts_of_a_bare_kernel() -> None:
    chains = chains_of(spaced_chains([1] * 40 + [9] * 5, 2_000))
    chains = chains.with_columns(took_ns=2_000 * pl.col("n_attempts").cast(pl.Int64))
    curve = attempts(chains, coverage.answers_of(chains))
    rows = limits(curve, chains, NO_LOSS, 1.0, Target(6e-3), pace_ns=500.0)
    rows = LIMITS.check(rows).filter(made_by="anyone")
    of_time, of_attempts = rows.row(1, named=True), rows.row(0, named=True)
    assert (of_time["pace_ns"], of_attempts["pace_ns"]) == (2_000.0, 2_000.0)
    # Each attempt takes 2 us here and 0.5 us there: as much time is more attempts.
    assert of_time["bare_attempts"] == math.ceil(of_time["limit"] / 500) + 1
    assert of_attempts["bare_attempts"] is None
    result = limits(curve, chains, NO_LOSS, 1.0, Target(6e-3))
    assert result["bare_attempts"].null_count() == result.height


def test_without_a_clock_a_rate_is_withheld() -> None:
    chains = chains_of([0] * 100)
    curve = attempts(chains, coverage.answers_of(chains))
    for rate, said in (
        ("1 per hour", "length of the recording unknown"),
        ("1 per VM-hour", "length of"),
    ):
        rows = limits(curve, chains, NO_LOSS, None, Target(rate=parse_rate(rate)))
        assert said in rows.filter(made_by="anyone")["reason"][0]
    rows = limits(curve, chains, NO_LOSS, 1.0, Target(rate=parse_rate("1 per VM-hour")))
    assert "no TD was identified" in rows.filter(made_by="anyone")["reason"][0]


@pytest.mark.parametrize("target", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_a_target_outside_0_to_1_is_refused(target: float) -> None:
    with pytest.raises(QueryError, match="choose one above 0 and below 1"):
        Target(target)


@pytest.mark.parametrize("confidence", [0.0, 0.4, 1.0, 2.0, 95.0, math.nan])
def test_a_confidence_outside_its_range_is_refused(confidence: float) -> None:
    with pytest.raises(QueryError, match=r"choose one from 0.5 to below 1, such as 0.95"):
        Target(confidence=confidence)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 VM per yaer", "unknown word 'yaer'.*nearest: year"),
        ("1 VN per year", "unknown word 'vn'.*nearest: VM"),
        ("1 VM pre year", "unknown word 'pre'.*nearest: per"),
        ("one VM per year", "not a rate"),
        ("0 VM per year", "can never be kept"),
        ("", "not a rate"),
        ("1 in 0 boots", "can never be kept"),
        ("1 in 1000 boats", "unknown word 'boat'.*nearest: boot"),
        ("1 per guest-hour", "unknown word 'guest'"),
        ("1 per VM-boot", "not a rate"),
        ("1 per year of 4 GB", "not a rate"),
        ("1 in 5 boots of 4 MB", "unknown word 'mb'.*nearest: GB"),
    ],
)
def test_a_malformed_rate_is_refused(text: str, said: str) -> None:
    with pytest.raises(QueryError, match=said):
        parse_rate(text)


def test_periods_are_those_of_the_calendar() -> None:
    assert parse_rate("2 VMs per day").allowed == pytest.approx(2 / 86_400)
    assert parse_rate("1 vm per week").allowed == pytest.approx(1 / 604_800)
    assert parse_rate("12 VMs per year").allowed == parse_rate("1 VM per month").allowed
    assert parse_rate("1 per host-year").allowed == parse_rate("1 VM per year").allowed
    assert not parse_rate("1 per host-year").counts_vms
    assert parse_rate("1 per 1000 VM-hours") == Rate(1 / 3.6e6, "vm")
    assert parse_rate("2 VMs in 1,000 boots of 16 GB") == Rate(0.002, "boot", 16.0, counts_vms=True)


def test_time_recorded_is_known_only_if_the_clock_has_a_unit() -> None:
    provenance = story("B1 S1 _7s S2").trace.provenance
    assert observed_seconds(provenance) == pytest.approx(7.00005)


# The parts.


def test_the_exact_interval_equals_that_of_scipy() -> None:
    for met, n in ((0, 10), (3, 10), (10, 10), (1, 100_000)):
        low, high = exact_interval(np.array([met / n]), np.array([float(n)]), 0.95)
        theirs = stats.binomtest(met, n).proportion_ci(0.95)
        assert (low[0], high[0]) == pytest.approx((theirs.low, theirs.high))


def test_a_tails_bounds_hold_its_quantile_between_them() -> None:
    chance = np.random.default_rng(1)
    counts = np.bincount(chance.geometric(0.4, 500))[1:].astype(float)
    at = np.arange(1, len(counts) + 1, dtype=float) + 1
    seen = tail.TailSample(1.0, at - 1, at, counts, np.zeros_like(counts), 0.05, 10_000.0, 1.0)
    fitted = tail.fit(seen)
    quantile = fitted.quantile(1e-5)
    ends = [fitted.bound(1e-5, z, 1e6) for z in (0.001, 0.2, 0.8, 0.999)]
    assert ends == sorted(ends)
    assert ends[1] < quantile < ends[2]
    assert fitted.exceedance(quantile) == pytest.approx(1e-5)
    assert fitted.scale == pytest.approx(-1 / math.log(0.6), rel=0.2)
    # Half as much weight is as half as many requests: wider.
    half = tail.fit(
        tail.TailSample(1.0, at - 1, at, counts, np.zeros_like(counts), 0.05, 5_000.0, 0.5)
    )
    assert half.bound(1e-5, 0.95, 1e6) > fitted.bound(1e-5, 0.95, 1e6)


@pytest.mark.parametrize(
    "cell", [coverage.Cell(False, 4_000, False), coverage.Cell(True, 4_000, True)]
)
def test_intervals_have_about_their_nominal_coverage(cell: coverage.Cell) -> None:
    held = sum((coverage.one(cell, seed) for seed in range(20)), start=Counter[str]())
    assert held["within 1 asked"] == 20
    assert held["within 1 so"] >= 16
    assert held["within 99.9 % so"] >= 16
    for name in ("counted", "far"):
        assert held[f"{name} kept"] >= 0.8 * held[f"{name} limits"]


def test_empty_input_gives_an_empty_table() -> None:
    assert limits(ATTEMPTS.empty(), RETRY_CHAINS.empty(), NO_LOSS).equals(LIMITS.empty())


def test_columns_that_are_missing_are_named() -> None:
    with pytest.raises(TableError, match="done_ratio"):
        limits(ATTEMPTS.empty().drop("done_ratio"), RETRY_CHAINS.empty(), NO_LOSS)
