"""Events behind others: nothing but the entries before them is written over."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.ingest.memory import ROOM, behind, roomy


@given(st.integers(0, ROOM + 3), st.integers(0, 40), st.sampled_from(["roomy", "whole", "part"]))
def test_whatever_the_arrays_are(n_first: int, n: int, kind: str) -> None:
    first = np.arange(n_first) - n_first
    whole = np.arange(n + 2 * ROOM)
    made = {"roomy": roomy(n, np.int64), "whole": np.empty(n, np.int64), "part": whole[ROOM:-ROOM]}
    values = made[kind]
    values[:] = np.arange(n)
    both = behind(first, values)
    assert both.tolist() == list(range(-n_first, n))
    assert values.tolist() == list(range(n))
    assert whole[:ROOM].tolist() == list(range(ROOM))
    assert np.shares_memory(both, values) == (kind == "roomy" and n_first <= ROOM and n > 0)


def test_numbers_of_another_sign() -> None:
    """A stamp is read without a sign, and is a moment with one."""
    stamps = roomy(3, np.uint64)
    stamps[:] = 7
    moments = stamps.view(np.int64)
    assert behind(np.array([-1]), moments).tolist() == [-1, 7, 7, 7]


def test_a_part_that_begins_elsewhere() -> None:
    long = np.arange(10 + ROOM)
    for values in (long[:10], long[5:15], long[::2][:10]):
        copy = long.copy()
        assert behind(np.array([-1]), values).tolist() == [-1, *values.tolist()]
        assert (long == copy).all()
