"""The interval join, against a test of every pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.analysis.causes.overlaps import Intervals, overlapping_pairs

interval = st.tuples(st.integers(0, 2), st.integers(-50, 50), st.integers(0, 70))
intervals = st.lists(interval, max_size=12)


def intervals_of(rows: list[tuple[int, int, int]]) -> Intervals:
    key, start, length = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    return Intervals(key, start, start + length)


def pairs(asked: Intervals, held: Intervals, slack: int) -> list[tuple[int, int]]:
    return sorted(
        (int(i), int(j))
        for part in overlapping_pairs(asked, held, slack)
        for i, j in zip(*part, strict=True)
    )


@given(intervals, intervals, st.integers(0, 5), st.sampled_from([0, 2**61]))
def test_the_pairs_are_those_that_overlap(
    asked: list[tuple[int, int, int]], held: list[tuple[int, int, int]], slack: int, late: int
) -> None:
    # A time so far away that key and time do not fit one number takes another way.
    held = held + [(9, late, 0)] * bool(late)
    expected = [
        (i, j)
        for i, (key, start, length) in enumerate(asked)
        for j, (other, begin, lasts) in enumerate(held)
        if key == other and begin <= start + length + slack and begin + lasts >= start - slack
    ]
    assert pairs(intervals_of(asked), intervals_of(held), slack) == expected


@pytest.mark.parametrize("n", [1, 40_000])
def test_a_long_interval_does_not_slow_the_join(n: int) -> None:
    short = intervals_of([(0, 100 * i, 10) for i in range(n)])
    held = intervals_of([(0, 0, 100 * n), *((0, 100 * i + 50, 10) for i in range(n))])
    n_pairs = 0
    for i, j in overlapping_pairs(short, held):
        n_pairs += len(i)
        assert (j == 0).all()
    assert n_pairs == n
