"""The interval join: the same pairs as trying every one, without trying every one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.analysis.causes.overlaps import Spans, meetings

interval = st.tuples(st.integers(0, 2), st.integers(-50, 50), st.integers(0, 70))
intervals = st.lists(interval, max_size=12)


def spans(rows: list[tuple[int, int, int]]) -> Spans:
    key, start, length = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    return Spans(key, start, start + length)


def pairs(asked: Spans, held: Spans, slack: int) -> list[tuple[int, int]]:
    return sorted(
        (int(i), int(j))
        for part in meetings(asked, held, slack)
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
    assert pairs(spans(asked), spans(held), slack) == expected


@pytest.mark.parametrize("n", [1, 40_000])
def test_one_long_interval_costs_nothing_but_itself(n: int) -> None:
    short = spans([(0, 100 * i, 10) for i in range(n)])
    held = spans([(0, 0, 100 * n), *((0, 100 * i + 50, 10) for i in range(n))])
    looked_at = 0
    for i, j in meetings(short, held):
        looked_at += len(i)
        assert (j == 0).all()
    assert looked_at == n
