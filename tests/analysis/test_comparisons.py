"""Two traces compared."""

from __future__ import annotations

import polars as pl
import pytest
from support.story import story

import tdxtrace
from tdxtrace.tables.limits import COMPARISONS


def compared(before: str, after: str) -> pl.DataFrame:
    rows = tdxtrace.compare(*(tdxtrace.analyze(story(text).trace) for text in (before, after)))
    return COMPARISONS.check(rows)


def many(n: int, busy: int) -> str:
    """So many requests, the first ones busy once, each an episode of its own."""
    return " ".join(f"B{i} S{i} _20ms" if i <= busy else f"S{i} _" for i in range(1, n + 1))


def first(rows: pl.DataFrame) -> dict[str, object]:
    return rows.row(
        by_predicate=(pl.col("unit") == "attempts") & (pl.col("within") == 1), named=True
    )


def test_a_change_is_reported() -> None:
    row = first(compared(many(60, 30), many(60, 0)))
    assert (row["more_before"], row["more_after"]) == (pytest.approx(0.5), 0.0)
    assert row["change"] == "fewer"
    assert first(compared(many(60, 0), many(60, 30)))["change"] == "more"


def test_a_difference_within_chance_is_not_reported() -> None:
    assert first(compared(many(60, 3), many(60, 4)))["change"] == "not_told"
    assert first(compared(many(2, 2), many(2, 0)))["change"] == "not_told"


def test_swapping_the_traces_negates_the_difference() -> None:
    there, back = compared(many(60, 30), many(50, 2)), compared(many(50, 2), many(60, 30))
    assert there["difference"].to_list() == pytest.approx((-back["difference"]).to_list())
    assert there["difference_low"].to_list() == pytest.approx((-back["difference_high"]).to_list())


def test_a_leaf_of_only_one_trace_is_marked() -> None:
    rows = compared("S1 trackS", "S1")
    assert set(rows.filter(pl.col("leaf") == 38)["change"]) == {"only_before"}
    assert set(rows.filter(pl.col("leaf") == 6)["change"]) == {"not_told"}
    assert set(compared("", "S1")["change"]) == {"only_after"}
    assert compared("", "").is_empty()


def test_more_than_n_counts_what_needed_more_than_n() -> None:
    rows = compared("B1 B1 S1 S2 S3 S4", "S1 S2 S3 S4").filter(unit="attempts")
    more = dict(rows.select("within", "more_before").rows())
    assert more == {1: 0.25, 2: 0.25, 5: 0.0, 16: 0.0}


def test_requests_last_seen_busy_are_not_evidence_beyond_their_last_attempt() -> None:
    given_up = " ".join(f"B{i} B{i} _20ms" for i in range(101, 131))
    rows = compared(f"{many(60, 0)} {given_up}", many(90, 0)).filter(unit="attempts")
    change = dict(rows.select("within", "change").rows())
    # Nobody knows how many of them needed more than five.
    assert change == {1: "fewer", 2: "fewer", 5: "not_told", 16: "not_told"}
