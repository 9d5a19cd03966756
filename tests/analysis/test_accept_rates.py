"""Rates of memory acceptance, and the part of the vCPUs' time that limits them."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from support.logs import WORDS
from support.story import Story, story, without

from tdxtrace.analysis.accept_rates import accept_rates
from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.analysis.slices import slice_width
from tdxtrace.tables.lifecycle import ACCEPT_RATES


def of(scenario: Story, calls: pl.DataFrame | None = None) -> pl.DataFrame:
    calls = scenario.seamcalls if calls is None else calls
    chains = retry_chains(calls, scenario.losses)
    rows = accept_rates(calls, scenario.vm_entries, chains, busy_answers(calls, chains))
    return ACCEPT_RATES.check(rows)


def whole(text: str) -> dict[str, object]:
    (row,) = of(story(text)).filter(pl.col("tid").is_null()).to_dicts()
    return row


def test_pages_and_times_of_a_slice() -> None:
    row = whole("enterX S1 enterX S2 enterX S3 enterX")
    assert (row["n_pages"], row["n_faults"], row["n_vcpus"]) == (3, 3, 1)
    # From the first AUG's start to the last one's end; each call takes 10 us, as each pause.
    assert row["end_ns"] - row["start_ns"] == 90_001  # type: ignore[operator]
    assert (row["call_ns"], row["guest_ns"], row["retry_ns"]) == (30_000, 20_000, 0)
    assert row["host_ns"] == 40_001
    assert row["page_ns"] == pytest.approx(90_001 / 3)
    assert row["pages_per_s"] == pytest.approx(3e9 / 90_001)
    assert row["limited_by"] == "host"


def test_a_2m_page_is_512_pages() -> None:
    assert whole("enterX S1^1")["n_pages"] == 512


def test_a_page_of_the_secure_ept_is_no_page_of_the_guest() -> None:
    row = whole("enterX septS1 S1")
    assert (row["n_pages"], row["n_faults"], row["call_ns"]) == (1, 1, 20_000)


def test_the_time_of_two_vcpus_is_twice_that_of_the_slice() -> None:
    row = whole("enterX 2/enterX S1 2/S2")
    assert row["page_ns"] == pytest.approx(30_001)


def test_each_vcpu_has_its_rows_beside_those_of_the_td() -> None:
    rows = of(story("enterX 2/enterX S1 2/S2 2/S3"))
    assert rows.select("tid", "n_pages", "n_vcpus").rows() == [(None, 3, 2), (1, 1, 1), (2, 2, 1)]


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("enterX S1", "seamcalls"),
        ("enterX B1 B1 B1 S1", "lock_contention"),
        ("enterX S1 enter(  _100us )X S2 _10us", "guest"),
        ("enterX S1 _100us S2", "host"),
        ("enterX S1 enter( _100us )D S2", "refused_entries"),
    ],
)
def test_the_largest_part_limits(text: str, limit: str) -> None:
    assert whole(text)["limited_by"] == limit


def test_busy_answers_are_counted_by_what_was_busy() -> None:
    row = whole("enterX B1 K1 K1 W1 S1 enterD enterX")
    assert (row["n_busy_tree"], row["n_busy_entry"], row["n_busy_other"]) == (1, 2, 1)
    assert whole("enterX S1 enterD S2")["n_refused"] == 1


def test_the_guest_runs_between_attempts_is_no_wait() -> None:
    row = whole("enterX B1 enter( _800us )X S1")
    assert row["retry_ns"] == 10_000
    assert row["guest_ns"] == 810_000


def test_a_slice_in_which_all_was_busy_has_no_page_and_a_limit() -> None:
    rows = of(story("enterX " + "B1 " * 60 + "_1ms S1")).filter(pl.col("tid").is_null())
    assert rows.select("n_pages", "page_ns", "limited_by").row(0) == (0, None, "lock_contention")
    assert rows["n_pages"].sum() == 1


def test_pages_that_no_vcpu_asked_for_are_left_out() -> None:
    assert whole("enterX S1 2/S2 2/S3")["n_pages"] == 1


def test_without_entries_no_limit_is_named() -> None:
    (row,) = of(story("S1")).filter(pl.col("tid").is_null()).to_dicts()
    assert (row["limited_by"], row["guest_ns"], row["n_pages"]) == (None, None, 1)
    assert "kvm_entry" in row["withheld"]


def test_without_starts_of_calls_no_limit_is_named() -> None:
    scenario = story(">X S1 >X S2")
    calls = without(scenario.seamcalls, "start_ns")
    rows = of(scenario, calls).filter(pl.col("tid").is_null())
    assert rows["limited_by"].to_list() == [None]
    assert "starts of the calls" in rows["withheld"][0]
    assert rows["n_pages"].to_list() == [2]


def test_calls_of_unknown_threads_count_for_the_td_only() -> None:
    scenario = story("enterX S1 2/enterX 2/S2")
    unknown = pl.when(pl.col("tid") != 1).then("tid").alias("tid")
    calls, entries = (t.with_columns(unknown) for t in (scenario.seamcalls, scenario.vm_entries))
    chains = retry_chains(calls, scenario.losses)
    rows = ACCEPT_RATES.check(accept_rates(calls, entries, chains, busy_answers(calls, chains)))
    assert rows.select("tid", "n_pages").rows() == [(None, 2), (2, 1)]
    row = rows.row(0, named=True)
    assert (row["page_ns"], row["host_ns"], row["limited_by"]) == (None, None, None)
    assert "threads of some calls" in row["withheld"]


def test_exits_of_kvm_stand_for_entries_that_were_not_probed() -> None:
    row = whole(">X S1 >X S2 >F >X S3")
    assert (row["n_refused"], row["guest_ns"]) == (1, 20_000)


def test_slices_cover_a_long_time_in_few_rows() -> None:
    rows = of(story("enterX " + "S1 S2 enterX _1s " * 100)).filter(pl.col("tid").is_null())
    assert rows["n_pages"].sum() == 200
    assert 39 <= rows.height <= 61
    assert ((rows["start_ns"] - rows["start_ns"].min()) % slice_width(99 * 10**9) == 0).all()


@given(WORDS)
def test_parts_are_the_whole(words: list[str]) -> None:
    rows = of(story(" ".join(words)))
    td = rows.filter(pl.col("tid").is_null())
    own = rows.filter(pl.col("tid").is_not_null())
    for name in ("n_pages", "n_faults", "call_ns", "retry_ns", "n_busy_tree"):
        assert td[name].sum() == own[name].sum()
    assert td["n_vcpus"].sum() == own.height
    times = pl.sum_horizontal("call_ns", "retry_ns", "refused_ns", "guest_ns", "host_ns")
    known = rows.filter(pl.col("host_ns").is_not_null())
    length = (pl.col("end_ns") - pl.col("start_ns")) * pl.col("n_vcpus")
    assert known.filter(times < length).is_empty()


def test_an_attempt_that_ends_after_the_last_page_is_in_no_slice() -> None:
    row = whole("enterX 2/enterX B1 2/B2 2/(2 S1 2/)B")
    assert (row["n_pages"], row["n_busy_tree"]) == (1, 2)
