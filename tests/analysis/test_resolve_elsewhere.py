"""Abandoned requests that another call settled."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.story import Story, story

from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.tables.findings import RETRY_CHAINS


def chains(one: Story) -> pl.DataFrame:
    return RETRY_CHAINS.check(retry_chains(one.seamcalls, one.losses))


def first(text: str) -> tuple[str, int | None]:
    """How the first request ended, and the place of the word that settled it."""
    one = story(text)
    row = chains(one).row(0, named=True)
    places = [call["seq"] for call in one.calls]
    by = row["settled_seq"]
    return row["outcome"], None if by is None else places.index(by)


def test_the_first_success_after_it_began_settles_it() -> None:
    assert first("B1 S9 2/S1 2/S1") == ("resolved_elsewhere", 2)


def test_a_success_that_was_under_way_when_it_began_settles_it_too() -> None:
    one = story("2/(1 B1 S9 2/)S")
    found = chains(one).filter(tid=1, gpa=0x1000).row(0, named=True)
    assert found["outcome"] == "resolved_elsewhere"
    assert found["settled_seq"] == max(call["seq"] for call in one.calls)


def test_a_success_between_its_attempts_settles_it_when_it_is_left() -> None:
    assert first("B1 2/S1 B1 S9") == ("resolved_elsewhere", 1)


def test_a_success_before_it_began_does_not() -> None:
    assert chains(story("2/S1 B1 S9"))["outcome"].to_list()[1] == "abandoned"


def test_a_success_of_its_own_thread_does_not() -> None:
    """Its chain ended with a loss, but the thread goes on with the request."""
    result = chains(story("B1 S9 lost S1"))
    assert result.select("outcome", "settled_seq").row(0) == ("cut", None)


@pytest.mark.parametrize("other", ["2/S2", "2/S1^1", "2/blockS1", "2/S1#1", "2/E1", "2/B1"])
def test_another_request_or_no_success_settles_nothing(other: str) -> None:
    assert first(f"B1 S9 {other}") == ("abandoned", None)


def test_of_another_source_settles_nothing() -> None:
    one = story("B1 S9 2/S1")
    calls = one.seamcalls.with_columns(source=(pl.col("tid") == 2).cast(pl.UInt16))
    assert retry_chains(calls, one.losses)["outcome"].to_list()[0] == "abandoned"


def test_other_outcomes_are_unchanged() -> None:
    assert first("E1 S9 2/S1") == ("failed", None)
    assert first("B1 2/S1") == ("cut", None)


def test_without_page_and_td_nothing_is_resolved() -> None:
    assert first("B~ S~ 2/S~")[0] != "resolved_elsewhere"


def test_a_page_settles_a_request_whose_td_is_not_known() -> None:
    one = story("B1 S9 2/S1")
    calls = one.seamcalls.with_columns(td_id=pl.lit(None, pl.UInt64))
    assert retry_chains(calls, one.losses)["outcome"].to_list()[0] == "resolved_elsewhere"


def test_an_unknown_page_is_not_page_zero() -> None:
    one = story("B1 S9 2/S0^0")
    hidden = pl.when(pl.col("tid") == 2).then("gpa")
    calls = one.seamcalls.with_columns(gpa=hidden, level=pl.lit(0, pl.UInt8))
    assert retry_chains(calls, one.losses)["outcome"].to_list()[0] != "resolved_elsewhere"


@pytest.mark.parametrize(
    ("known", "unknown", "is_known"),
    [
        ((5, 9), (5, 9), True),
        ((5, 9), (6, 9), True),
        ((5, 9), (6, 8), False),
        ((5, None), (5, None), True),
        ((5, None), (None, None), False),
        ((None, None), (None, None), False),
    ],
)
def test_a_missing_td_is_that_of_the_thread_or_of_its_process(
    known: tuple[int | None, int | None], unknown: tuple[int | None, int | None], is_known: bool
) -> None:
    calls = story("S1 2/trackS").seamcalls.sort("seq")
    tids, tgids = zip(known, unknown, strict=True)
    calls = calls.with_columns(
        tid=pl.Series(tids, dtype=pl.Int32),
        tgid=pl.Series(tgids, dtype=pl.Int32),
        td_id=pl.when(pl.int_range(2) == 0).then("td_id"),
    )
    found = retry_chains(calls, story("").losses)["td_id"]
    assert found[1] == (found[0] if is_known else None)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["B1", "B2", "S9", "2/B1", "2/S1", "2/S2", "3/S1", "3/E1"])))
def test_the_result_equals_that_of_testing_every_pair(words: list[str]) -> None:
    one = story(" ".join([*words, "S8", "2/S8", "3/S8"]))
    found = chains(one)
    last = {call["seq"]: call for call in one.calls}
    for row in found.filter(pl.col("outcome").is_in(["abandoned", "resolved_elsewhere"])).rows(
        named=True
    ):
        first_success = next(
            (
                call
                for _, call in sorted(last.items())
                if call["status"] == 0
                and call["gpa"] == row["gpa"]
                and call["end_ns"] >= row["start_ns"]
            ),
            None,
        )
        is_settled = first_success is not None and first_success["tid"] != row["tid"]
        assert (row["outcome"] == "resolved_elsewhere") is is_settled
