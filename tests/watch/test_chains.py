"""Incremental retry chains equal those of the whole trace, however it is cut into ticks."""

from __future__ import annotations

from collections import Counter
from functools import cache

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.running import SAMPLES
from support.story import story

import tdxtrace
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.tables.events import LOSSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.watch.chains import ChainTracker

# Columns of which a chain over several ticks has those of its last tick: see ChainTracker.
_OF_LAST_TICK = frozenset({"first_seq", "td_id", "n_segments", "identity", "settled_seq"})
_COMPARED = (
    *("source", "last_seq", "leaf", "tid", "tgid", "vp_id", "gpa", "level"),
    *("start_ns", "end_ns", "took_ns", "n_attempts", "n_busy"),
    *("outcome", "final_status", "cut_by"),
)
# A call that completed a request elsewhere is found in the whole only.
_ELSEWHERE = {"resolved_elsewhere": "abandoned"}


def listed(chains: pl.DataFrame) -> Counter[tuple[object, ...]]:
    """Chains as a multiset."""
    plain = chains.with_columns(pl.col("outcome").cast(pl.String).replace(_ELSEWHERE))
    return Counter(plain.select(_COMPARED).iter_rows())


def test_every_column_is_followed_over_ticks_or_named_as_one_that_is_not() -> None:
    new = set(RETRY_CHAINS.schema) ^ {*_COMPARED, *_OF_LAST_TICK}
    assert not new, (
        f"retry_chains: {new}: let ChainTracker (tdxtrace/watch/chains.py) continue it over ticks "
        "and compare it here; or name it in the docstring there and in _OF_LAST_TICK here"
    )


def in_ticks(calls: pl.DataFrame, cuts: list[int]) -> tuple[pl.DataFrame, ChainTracker]:
    """Feed calls in order of return, cut into ticks."""
    chains = ChainTracker()
    ordered = calls.sort("seq")
    ends = [*sorted(min(cut, ordered.height) for cut in cuts), ordered.height]
    parts, begin = [], 0
    for end in ends:
        part = ordered[begin:end]
        now = ordered["end_ns"][:end].max()
        parts.append(chains.feed(part, LOSSES.empty(), now if isinstance(now, int) else None))
        begin = end
    return pl.concat(parts), chains


@cache
def sample(name: str) -> pl.DataFrame:
    return tdxtrace.read_trace(SAMPLES / name).seamcalls


@pytest.mark.parametrize("name", ["contended.txt", "zerostep.txt"])
@given(data=st.data())
@settings(max_examples=8)
def test_cutting_into_ticks_changes_no_chain(name: str, data: st.DataObject) -> None:
    calls = sample(name)
    cuts = data.draw(st.lists(st.integers(0, calls.height), max_size=12))
    ended, chains = in_ticks(calls, cuts)
    whole = retry_chains(calls, LOSSES.empty())
    is_open = (pl.col("cut_by") == "trace_end").fill_null(False)
    # Who left a request may come back to it in a later tick, and who settles it do so.
    is_left = pl.col("outcome").is_in(["abandoned", "resolved_elsewhere"])
    assert listed(ended.filter(~is_left)) == listed(whole.filter(~is_open & ~is_left))
    n_ended, n_left = (listed(rows.filter(is_left)) for rows in (ended, whole))
    assert n_ended <= n_left
    n_open = whole.filter(is_open).height
    assert chains.n_in_flight == n_open + n_left.total() - n_ended.total()
    most = whole.filter(is_open)["n_attempts"].to_list()
    assert chains.max_attempts_in_flight >= max(most, default=0)
    assert chains.n_given_up == 0


def test_a_chain_over_many_ticks() -> None:
    """One call per tick: attempts add up, and only one call is kept."""
    calls = story("B1 B1 B1 B1 S1 S2").seamcalls
    ended, chains = in_ticks(calls, [1, 2, 3, 4])
    assert ended["n_attempts"].to_list() == [5, 1]
    assert ended["n_busy"].to_list() == [4, 0]
    assert ended["start_ns"][0] == calls["start_ns"][0]
    assert chains.n_in_flight == 0


def test_an_endless_chain_is_reported_in_flight() -> None:
    ended, chains = in_ticks(story("B1 B1 B1").seamcalls, [1, 2])
    assert ended.is_empty()
    assert (chains.n_in_flight, chains.max_attempts_in_flight) == (1, 3)


def test_a_fault_continues_after_an_entry_in_another_tick() -> None:
    ended, _ = in_ticks(story("B1 enterS*1 B1 S1").seamcalls, [1, 2, 3])
    assert sorted(ended.select("leaf", "n_attempts").iter_rows()) == [(0, 1), (6, 3)]


def test_two_pages_in_turn_over_ticks() -> None:
    calls = story("B1 B2 B1 B2 S1 S2").seamcalls
    ended, _ = in_ticks(calls, [1, 2, 3, 4, 5])
    assert ended.select("gpa", "n_attempts", "outcome").rows() == [
        (0x1000, 3, "succeeded"),
        (0x2000, 3, "succeeded"),
    ]


def test_a_request_that_was_left_is_abandoned_after_a_minute() -> None:
    ended, chains = in_ticks(story("B1 S2 _61s 2/S3").seamcalls, [1, 2])
    told = ended.select("gpa", "outcome", "cut_by").rows()
    assert told == [
        (0x2000, "succeeded", None),
        (0x3000, "succeeded", None),
        (0x1000, "abandoned", None),
    ]
    assert (chains.n_in_flight, chains.n_given_up) == (0, 0)


def test_a_stale_chain_is_dropped() -> None:
    """The next call, of another thread, is more than a minute later."""
    calls = story("B1 _61s 2/S2").seamcalls
    ended, chains = in_ticks(calls, [1])
    assert ended["n_attempts"].to_list() == [1]
    assert (chains.n_in_flight, chains.n_given_up) == (0, 1)


def test_a_loss_at_the_end_of_a_tick_cuts_chains_in_flight() -> None:
    calls = story("B1 S1").seamcalls.sort("seq")
    chains = ChainTracker()
    lost = story("B1 lost").losses.with_columns(end_ns=pl.lit(None, pl.Int64))
    first = chains.feed(calls[:1], lost, None)
    assert first["outcome"].to_list() == ["cut"]
    second = chains.feed(calls[1:], LOSSES.empty(), None)
    assert second["n_attempts"].to_list() == [1]
