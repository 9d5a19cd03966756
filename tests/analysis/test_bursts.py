"""Bursts of requests, and their effect on confidence intervals."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from bench import coverage, unlike
from hypothesis import given
from hypothesis import strategies as st
from support.made_chains import chains_of

from tdxtrace.analysis.busy_answers import episodes
from tdxtrace.analysis.dependence import effect_of_bursts
from tdxtrace.analysis.loops.bursts import DEEPEST, HALF, count_bursts, count_moments
from tdxtrace.compiler import compiled, interpreted
from tdxtrace.intervals import exact_interval


def moments_of(waits: list[tuple[int, int]]) -> list[int]:
    waits = sorted(waits)
    start, end = (np.array([wait[side] for wait in waits], np.int64) for side in (0, 1))
    begins = np.zeros(len(waits), np.bool_)
    begins[:1] = True
    found = [np.zeros(len(waits), np.int64) for _ in range(2)]
    interpreted(count_moments)(start, end, begins, found[0])
    compiled(count_moments)(start, end, begins, found[1])
    assert found[0].tolist() == found[1].tolist()
    return found[0].tolist()


WAITS = st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda w: (w[0], w[0] + w[1]))


@given(st.lists(WAITS, min_size=1, max_size=12))
def test_requests_of_one_moment_all_wait_at_it_and_moments_are_few(
    waits: list[tuple[int, int]],
) -> None:
    numbers = moments_of(waits)
    ordered = sorted(waits)
    ends = []
    for number in set(numbers):
        own = [wait for wait, at in zip(ordered, numbers, strict=True) if at == number]
        assert max(start for start, _ in own) <= min(end for _, end in own)
        ends.append(min(own, key=lambda wait: wait[1]))
    # As many waits that do not meet: no fewer moments would do.
    ends.sort()
    assert all(one[1] < other[0] for one, other in itertools.pairwise(ends))


def test_waits_that_overlap_one_after_the_other_are_several_bursts() -> None:
    # 0-4 and 3-8 meet, 5-9 meets the second alone.
    assert moments_of([(0, 4), (3, 8), (5, 9), (20, 21)]) == [1, 1, 2, 3]


def test_those_that_wait_for_one_holder_are_one_burst() -> None:
    made = unlike.KINDS["8 tied waiters"](3_000, np.random.default_rng(3))
    sizes = episodes(unlike.chains_of(made)).group_by("episode").len()["len"]
    assert sizes.filter(sizes == 8).len() >= 0.8 * sizes.len()
    # On another TD they wait for another lock.
    chains = chains_of([1] * 8).with_columns(start_ns=0, end_ns=pl.lit(9, pl.Int64))
    assert episodes(chains)["episode"].n_unique() == 1
    tds = chains.with_columns(td_id=pl.int_range(8, dtype=pl.UInt64))
    assert episodes(tds)["episode"].n_unique() == 8


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=20))
def test_sums_over_bursts_are_those_of_their_sizes(requests: list[tuple[int, int]]) -> None:
    key = np.sort([(burst + 1) << HALF | (DEEPEST - depth) for burst, depth in requests])
    sums = np.zeros((3, 5), np.int64)
    interpreted(count_bursts)(key, *sums)
    for depth in range(5):
        sizes = np.bincount([burst for burst, own in requests if own >= depth], minlength=1)
        left = sums[:, depth:].sum(axis=1).tolist()
        assert left == [sizes.sum(), (sizes**2).sum(), np.count_nonzero(sizes)]


@pytest.mark.parametrize("sizes", [[1] * 40, [8] * 11, [3]])
def test_bursts_of_one_size_need_no_factor(sizes: list[int]) -> None:
    assert effect(sizes) == pytest.approx(sizes[0])


def test_few_bursts_of_unlike_sizes_tell_less() -> None:
    few, many = [1] * 6 + [6], [1] * 600 + [6] * 100
    raw = sum(size**2 for size in few) / sum(few)
    assert effect(few) > 1.5 * raw
    assert 1 < effect(many) / raw < 1.1


@pytest.mark.parametrize(("n_bursts", "least"), [(9, 86), (50, 91)])
def test_intervals_of_rare_large_bursts_hold(n_bursts: int, least: int) -> None:
    # A request makes 0.9 others busy: bursts of ten on average, most of them of one.
    chance, n, held = np.random.default_rng(3), 1e5, 0
    for _ in range(200):
        sizes = np.ones(max(chance.poisson(n_bursts), 1), np.int64)
        children = sizes.copy()
        while children.any():
            children = chance.poisson(0.9 * children)
            sizes += children
        trials = np.array([n / effect(sizes.tolist())])
        low, high = exact_interval(np.array([sizes.sum() / n]), trials, 0.95)
        held += low[0] <= 10 * n_bursts / n <= high[0]
    assert held >= 2 * least


def effect(sizes: list[int]) -> float:
    sums = (np.array([float(sum(size**k for size in sizes))]) for k in (1, 2, 0))
    return float(effect_of_bursts(*sums)[0])


@pytest.mark.parametrize(
    ("kind", "least"),
    [("geometric (control)", 90), ("10 TDs", 87), ("6 storms", 90), ("drift", 87)],
)
def test_intervals_hold_what_a_further_unit_shows(kind: str, least: int) -> None:
    held = coverage.unlike(kind, 3_000, (), range(1, 61))
    for within in (1, 2, 5):
        assert 100 * held[f"{within} so"] >= least * held[f"{within} asked"]
    # A drift is found in most short traces, and seldom where there is none.
    assert (held["drifts"] >= 30) if kind == "drift" else (held["drifts"] <= 6)
