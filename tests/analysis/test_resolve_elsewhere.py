"""Abandoned requests that another call settled."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxtrace.analysis.retry_chains import resolve_elsewhere
from tdxtrace.tables.findings import RETRY_CHAINS


def chain(seq: int, outcome: str, **other: Any) -> dict[str, Any]:  # noqa: ANN401
    """A chain on one page of one TD that lasts from 10 seq to 10 seq + 5."""
    row = {
        "source": 0,
        "first_seq": seq,
        "last_seq": seq,
        "leaf": 6,
        "tid": seq,
        "td_id": 0x7D,
        "gpa": 0x1000,
        "level": 0,
        "start_ns": 10 * seq,
        "end_ns": 10 * seq + 5,
        "n_attempts": 1,
        "n_busy": int(outcome == "abandoned"),
        "n_segments": 1,
        "outcome": outcome,
        "identity": "request",
    }
    return row | other


def settled(*rows: dict[str, Any]) -> dict[int, tuple[str, int | None]]:
    frame = pl.DataFrame(rows, schema=RETRY_CHAINS.schema)
    made = RETRY_CHAINS.check(RETRY_CHAINS.conform(resolve_elsewhere(frame)))
    return {
        seq: (outcome, by)
        for seq, outcome, by in made.select("first_seq", "outcome", "settled_seq").rows()
    }


def test_the_first_success_after_it_began_settles_it() -> None:
    assert settled(chain(1, "abandoned"), chain(2, "succeeded"), chain(3, "succeeded"))[1] == (
        "resolved_elsewhere",
        2,
    )


def test_a_success_that_was_under_way_when_it_began_settles_it_too() -> None:
    early = chain(1, "succeeded", end_ns=25)
    assert settled(early, chain(2, "abandoned"))[2] == ("resolved_elsewhere", 1)


def test_a_success_of_its_own_thread_does_not() -> None:
    told = settled(chain(1, "abandoned", tid=7), chain(2, "succeeded", tid=7))
    assert told[1] == ("abandoned", None)


def test_a_success_before_it_began_does_not() -> None:
    assert settled(chain(1, "succeeded"), chain(2, "abandoned"))[2] == ("abandoned", None)


@pytest.mark.parametrize(
    "other",
    [{"gpa": 0x2000}, {"level": 1}, {"leaf": 7}, {"td_id": 0x7E}, {"source": 1}],
)
def test_another_request_settles_nothing(other: dict[str, int]) -> None:
    told = settled(chain(1, "abandoned"), chain(2, "succeeded", **other))
    assert told[1] == ("abandoned", None)


@pytest.mark.parametrize("outcome", ["failed", "abandoned"])
def test_only_a_success_settles(outcome: str) -> None:
    assert settled(chain(1, "abandoned"), chain(2, outcome))[1][0] == "abandoned"


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
def test_other_outcomes_are_unchanged(outcome: str) -> None:
    assert settled(chain(1, outcome), chain(2, "succeeded"))[1] == (outcome, None)


def test_a_cut_chain_stays_cut() -> None:
    told = settled(chain(1, "cut", cut_by="trace_end"), chain(2, "succeeded"))
    assert told[1] == ("cut", None)


def test_without_page_and_td_nothing_is_resolved() -> None:
    nothing = {"td_id": None, "gpa": None, "level": None}
    told = settled(chain(1, "abandoned", **nothing), chain(2, "succeeded", **nothing))
    assert told[1] == ("abandoned", None)


def test_a_page_settles_a_request_whose_td_is_not_known() -> None:
    told = settled(chain(1, "abandoned", td_id=None), chain(2, "succeeded", td_id=None))
    assert told[1] == ("resolved_elsewhere", 2)


def test_an_unknown_page_is_not_page_zero() -> None:
    unknown = {"gpa": None, "level": None}
    told = settled(chain(1, "abandoned", **unknown), chain(2, "succeeded", gpa=0, level=0))
    assert told[1] == ("abandoned", None)


@pytest.mark.parametrize(
    ("known", "unknown", "expected"),
    [
        ({"tid": 5, "tgid": 9}, {"tid": 5}, 0x7D),
        ({"tid": 5, "tgid": 9}, {"tid": 6, "tgid": 9}, 0x7D),
        ({"tid": 5, "tgid": 9}, {"tid": 6, "tgid": 8}, None),
        ({"tid": 5}, {"tid": None}, None),
        ({"tid": None}, {"tid": None}, None),
        ({"tid": 5, "source": 1}, {"tid": 5}, None),
    ],
)
def test_a_missing_td_is_that_of_the_thread_or_of_its_process(
    known: dict[str, int], unknown: dict[str, int], expected: int | None
) -> None:
    rows = [chain(1, "succeeded", **known), chain(2, "succeeded", td_id=None, **unknown)]
    made = resolve_elsewhere(pl.DataFrame(rows, schema=RETRY_CHAINS.schema))
    assert made.filter(first_seq=2)["td_id"].to_list() == [expected]


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["abandoned", "succeeded", "failed"]),
            st.sampled_from([0x1000, 0x2000]),
            st.integers(1, 40),
            st.integers(0, 200),
        ),
        max_size=20,
    )
)
def test_the_result_equals_that_of_testing_every_pair(
    told: list[tuple[str, int, int, int]],
) -> None:
    rows = [
        chain(seq, outcome, gpa=gpa, start_ns=start, end_ns=start + took)
        for seq, (outcome, gpa, start, took) in enumerate(told, 1)
    ]
    expected = {
        row["first_seq"]: any(
            row["outcome"] == "abandoned"
            and other["outcome"] == "succeeded"
            and other["gpa"] == row["gpa"]
            and other["end_ns"] >= row["start_ns"]
            for other in rows
        )
        for row in rows
    }
    found = {seq: outcome == "resolved_elsewhere" for seq, (outcome, _) in settled(*rows).items()}
    assert found == expected
