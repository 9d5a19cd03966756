"""Limits computed from counts equal those computed from the requests."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tdxtrace.recommend.counted import counted_attempts
from tdxtrace.report.histogram_text import limit_lines
from tdxtrace.tables.attempt_cells import EXACT_LIMITS
from tdxtrace.tables.histograms import COUNTED_ATTEMPTS, COUNTED_OUTCOMES, REQUEST_COUNTS

Request = tuple[int, str, int]
requests = st.tuples(
    st.sampled_from([6, 7]), st.sampled_from(COUNTED_OUTCOMES), st.integers(1, 3000)
)


def counts_of(drawn: list[Request]) -> pl.DataFrame:
    rows = [
        (1, 0, 1, 7, leaf, outcome, n if n <= 64 else max(65, 1 << n.bit_length() - 1), 1)
        for leaf, outcome, n in drawn
    ]
    frame = pl.DataFrame(rows, schema=REQUEST_COUNTS.schema, orient="row")
    keys = [name for name in frame.columns if name != "n_requests"]
    return frame.group_by(keys, maintain_order=True).agg(pl.col("n_requests").sum())


def needs_more(request: Request, limit: int) -> bool | None:
    _, outcome, n = request
    if outcome in ("succeeded", "failed"):
        return n > limit
    return True if n >= limit else None


@given(st.lists(requests, max_size=40), st.sampled_from(EXACT_LIMITS))
@example([(6, "open", 5), (6, "failed", 5)], 5)
@example([(6, "succeeded", 127), (6, "succeeded", 128), (6, "abandoned", 200)], 127)
def test_counts_give_the_same_shares_as_the_requests(drawn: list[Request], limit: int) -> None:
    table = COUNTED_ATTEMPTS.check(counted_attempts(counts_of(drawn), [limit]))
    for leaf in {request[0] for request in drawn}:
        answers = [needs_more(request, limit) for request in drawn if request[0] == leaf]
        row = table.row(by_predicate=pl.col("leaf") == leaf, named=True)
        assert row["n_exceeding"] == answers.count(True)
        assert row["n_unknown"] == answers.count(None)
        assert row["n_requests"] == len(answers) - answers.count(None)
        assert row["exceeding"] <= row["exceeding_high"] <= 1


def test_rows_end_at_the_first_limit_that_none_exceeds() -> None:
    table = counted_attempts(counts_of([(6, "succeeded", 1), (6, "succeeded", 3)]))
    assert table.select("max_attempts", "n_exceeding").rows() == [(1, 1), (2, 1), (3, 0)]


def test_no_hit_among_n_is_the_rule_of_three() -> None:
    table = counted_attempts(counts_of([(6, "succeeded", 1)] * 1000))
    assert table["exceeding_high"][0] == pytest.approx(3 / 1000, rel=0.01)


def test_a_limit_among_numbers_counted_together_is_refused() -> None:
    with pytest.raises(ValueError, match="lies inside a bucket"):
        counted_attempts(counts_of([(6, "succeeded", 1)]), [100])


def test_a_limit_is_given_where_counting_supports_it_and_not_else() -> None:
    table = counted_attempts(counts_of([(6, "succeeded", 1)] * 995 + [(6, "succeeded", 4)] * 5))
    assert "TDH.MEM.PAGE.AUG: 4 attempts: exceeded by 0 of 1,000" in limit_lines(table, 4e-3)
    assert "no limit: 1,000 requests support 0.003, not 1e-06" in limit_lines(table, 1e-6)
    assert "does not show bursts" in limit_lines(table, 1e-6)
