"""The interval join, against a test of every pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.referee import referee

from tdxtrace.analysis.causes import overlaps
from tdxtrace.analysis.causes.overlaps import Intervals, overlapping_pairs

interval = st.tuples(st.integers(0, 2), st.integers(-50, 50), st.integers(0, 70))
intervals = st.lists(interval, max_size=12)


def intervals_of(rows: list[tuple[int, int, int]]) -> Intervals:
    key, start, length = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    return Intervals(start, start + length, key)


def pairs(asked: Intervals, held: Intervals, slack: int) -> list[tuple[int, int]]:
    i, j = overlapping_pairs(asked, held, slack)
    return sorted(zip(i.tolist(), j.tolist(), strict=True))


@given(intervals, intervals, st.integers(0, 5))
def test_the_pairs_are_those_that_overlap(
    asked: list[tuple[int, int, int]], held: list[tuple[int, int, int]], slack: int
) -> None:
    expected = [
        (i, j)
        for i, (key, start, length) in enumerate(asked)
        for j, (other, begin, lasts) in enumerate(held)
        if key == other and begin <= start + length + slack and begin + lasts >= start - slack
    ]
    assert pairs(intervals_of(asked), intervals_of(held), slack) == expected


def test_a_long_interval_pairs_with_all_that_it_covers() -> None:
    n = 3_000
    short = intervals_of([(0, 100 * i, 10) for i in range(n)])
    held = intervals_of([(0, 0, 100 * n), *((0, 100 * i + 50, 10) for i in range(n))])
    assert pairs(short, held, 0) == [(i, 0) for i in range(n)]


def test_calls_of_one_thread_and_kinds_without_conflict_form_no_pair() -> None:
    start, end = np.array([0, 5]), np.array([10, 9])
    key, rows, kind = np.zeros(2, np.int64), np.arange(2), np.array([0, 1], np.uint16)
    both = Intervals(start, end, key, rows, np.array([7, 7], np.int32), kind)
    of_two = Intervals(start, end, key, rows, np.array([7, 8], np.int32), kind)
    may_conflict = np.array([[1, 1], [0, 1]], np.uint8)
    assert len(overlapping_pairs(both, both, may_conflict=may_conflict)[0]) == 0
    i, j = overlapping_pairs(of_two, of_two, may_conflict=may_conflict)
    assert (i.tolist(), j.tolist()) == ([0], [1])


@pytest.mark.parametrize("slack", [0, 3])
def test_the_compiled_loop_over_intervals_gives_the_same_pairs(
    slack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlaps, "choose", lambda _: referee)
    chance = np.random.default_rng(1)
    start = chance.integers(0, 2_000, 300)
    end, key = start + chance.integers(-2, 60, 300), chance.integers(-1, 3, 300)
    owner = chance.integers(0, 5, 300).astype(np.int32)
    drawn = Intervals(start, end, key, owner=owner)
    i, j = overlapping_pairs(drawn, drawn, slack)
    assert len(i) > 100
    assert (owner[i] != owner[j]).all()
