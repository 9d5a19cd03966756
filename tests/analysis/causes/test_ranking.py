"""Ranking of candidates and causes, against the rules applied to one candidate at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.referee import referee

from tdxtrace.analysis.loops import ranking as r

candidate = st.tuples(
    st.integers(0, 3),  # attempt
    st.integers(0, 2),  # grade
    st.integers(0, 4),  # miss_ns
    st.booleans(),  # is_armed
    st.integers(0, 2),  # begins
    st.integers(1, 7),  # mask
    st.integers(-3, 20),  # overlap_ns
    st.integers(0, 2),  # lock
    st.booleans(),  # is_proven
)
_N_ATTEMPTS = 4


def _cause(rows: list[Any], bit: int, slack: int, *, observed: bool, entries: bool) -> int:
    """The cause in one generation, said as the rules say it."""
    rows = [row for row in rows if row[5] & bit]
    if not rows or rows[0][1] == r.BOUNDS_UNKNOWN:
        return r.NO_CANDIDATE
    _, _, least, armed, _, _, overlap, lock, proven = rows[0]
    kinds = {row[3] for row in rows if row[2] <= least + 2 * slack}
    nobody_else = lock == r.OTHER_LOCK or (lock == r.TREE_LOCK and entries)
    if not (proven or (len(kinds) == 1 and nobody_else)):
        return r.CLOCK_TOO_COARSE
    rivals = [row for row in rows if not row[3] and row[7] == r.TREE_LOCK]
    if armed and (
        not observed or overlap < 0 or any(row[6] >= r.MISS_RATIO * row[2] for row in rivals)
    ):
        return r.CLOCK_TOO_COARSE
    return r.ARMED_ENTRY if armed else r.HOST_CONFLICT


@settings(max_examples=30)
@given(st.lists(candidate, max_size=12), st.integers(0, 7), st.integers(0, 1), st.booleans())
def test_causes_follow_from_the_candidates_in_order(
    rows: list[Any], possible: int, slack: int, flag: bool
) -> None:
    rows = [(*row[:8], row[8] and not row[3]) for row in rows]
    columns = list(zip(*rows, strict=True)) if rows else [()] * 9
    kinds = [np.int64, np.uint8, np.int64, np.bool_, np.int64]
    arrays: list[Any] = [
        np.array(column, kind) for column, kind in zip(columns, kinds, strict=False)
    ]
    attempt, grade, miss, armed, begins = arrays
    holder = np.arange(len(rows), dtype=np.uint32)
    first, order = np.zeros(_N_ATTEMPTS + 1, np.int64), np.zeros(len(rows), np.int64)
    referee(r.order_candidates)(attempt, grade, miss, armed, begins, holder, first, order)
    ordered = [
        sorted(
            (row for row in range(len(rows)) if rows[row][0] == number),
            key=lambda row: (rows[row][1] == r.BOUNDS_UNKNOWN, *_key(rows[row]), row),
        )
        for number in range(_N_ATTEMPTS)
    ]
    assert order.tolist() == [row for part in ordered for row in part]
    assert np.diff(first).tolist() == [len(part) for part in ordered]

    ranked = [rows[row] for row in order]
    result = list(zip(*ranked, strict=True)) if ranked else [()] * 9
    of_candidate: list[Any] = [
        np.array(result[at], kind)
        for at, kind in (
            *((5, np.uint8), (1, np.uint8), (6, np.int64), (2, np.int64)),
            *((3, np.bool_), (8, np.bool_), (7, np.uint8)),
        )
    ]
    observed = np.array([flag, True, True, True])
    cause, n_tied = np.zeros(_N_ATTEMPTS, np.uint8), np.zeros(_N_ATTEMPTS, np.uint32)
    is_only = np.zeros(_N_ATTEMPTS, np.bool_)
    masks = np.full(_N_ATTEMPTS, possible, np.uint8)
    decide: Any = referee(r.decide_causes)
    how = slack, flag, True
    decide(first, masks, observed, *of_candidate, *how, cause, n_tied, is_only)
    for number, part in enumerate(ordered):
        own = [rows[row] for row in part]
        causes = {
            _cause(own, bit, slack, observed=bool(observed[number]), entries=flag)
            for bit in (1, 2, 4)
            if possible & bit
        }
        agreed = causes.pop() if len(causes) == 1 else r.GENERATIONS_DISAGREE
        assert cause[number] == (agreed if possible else r.NO_CANDIDATE)
        same = [row for row in own if (row[1], row[3]) == (own[0][1], own[0][3])]
        assert n_tied[number] == sum(row[2] <= own[0][2] + slack for row in same)


def _key(row: Any) -> tuple[int, bool, int, int]:  # noqa: ANN401 - a drawn tuple
    return row[2], row[3], row[1], row[4]
