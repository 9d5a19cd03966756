"""Chains of calls that go on coming are those of the whole, however the looks cut them."""

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
from tdxtrace.watch.chains import Chains

# What a look can tell of a chain; whether another call settled it is told by the whole only.
_TOLD = ("tid", "leaf", "gpa", "n_attempts", "n_busy", "final_status", "start_ns")
_ELSEWHERE = {"resolved_elsewhere": "abandoned"}


def listed(chains: pl.DataFrame) -> Counter[tuple[object, ...]]:
    """Chains as a bag."""
    plain = chains.with_columns(pl.col("outcome").cast(pl.String).replace(_ELSEWHERE))
    return Counter(plain.select(*_TOLD, "took_ns", "outcome").iter_rows())


def in_looks(calls: pl.DataFrame, cuts: list[int]) -> tuple[pl.DataFrame, Chains]:
    """Feed calls in the order in which they returned, cut into looks."""
    chains = Chains()
    ordered = calls.sort("seq")
    ends = [*sorted(min(cut, ordered.height) for cut in cuts), ordered.height]
    parts, begin = [], 0
    for end in ends:
        look = ordered[begin:end]
        now = ordered["end_ns"][:end].max()
        parts.append(chains.feed(look, LOSSES.empty(), now if isinstance(now, int) else None))
        begin = end
    return pl.concat(parts), chains


@cache
def sample(name: str) -> pl.DataFrame:
    return tdxtrace.read_trace(SAMPLES / name).seamcalls


@pytest.mark.parametrize("name", ["contended.txt", "zerostep.txt"])
@given(data=st.data())
@settings(max_examples=8)
def test_looks_change_no_chain(name: str, data: st.DataObject) -> None:
    calls = sample(name)
    cuts = data.draw(st.lists(st.integers(0, calls.height), max_size=12))
    ended, chains = in_looks(calls, cuts)
    whole = retry_chains(calls, LOSSES.empty())
    flying = (pl.col("cut_by") == "trace_end").fill_null(False)
    assert listed(ended) == listed(whole.filter(~flying))
    assert chains.n_in_flight == whole.filter(flying).height
    assert chains.most_in_flight == (whole.filter(flying)["n_attempts"].max() or 0)
    assert chains.n_given_up == 0


def test_a_chain_of_many_looks() -> None:
    """One call each: attempts add up, and only one call is kept."""
    calls = story("B1 B1 B1 B1 S1 S2").seamcalls
    ended, chains = in_looks(calls, [1, 2, 3, 4])
    assert ended["n_attempts"].to_list() == [5, 1]
    assert ended["n_busy"].to_list() == [4, 0]
    assert ended["start_ns"][0] == calls["start_ns"][0]
    assert chains.n_in_flight == 0


def test_an_endless_chain_is_seen_before_it_ends() -> None:
    ended, chains = in_looks(story("B1 B1 B1").seamcalls, [1, 2])
    assert ended.is_empty()
    assert (chains.n_in_flight, chains.most_in_flight) == (1, 3)


def test_a_fault_goes_on_after_an_entry_in_another_look() -> None:
    ended, _ = in_looks(story("B1 enterS*1 B1 S1").seamcalls, [1, 2, 3])
    assert sorted(ended.select("leaf", "n_attempts").iter_rows()) == [(0, 1), (6, 3)]


def test_what_is_not_heard_of_is_given_up() -> None:
    """More than a minute later, of another thread."""
    calls = story("B1 _61s 2/S2").seamcalls
    ended, chains = in_looks(calls, [1])
    assert ended["n_attempts"].to_list() == [1]
    assert (chains.n_in_flight, chains.n_given_up) == (0, 1)


def test_a_loss_at_the_end_of_a_look_ends_what_is_in_flight() -> None:
    calls = story("B1 S1").seamcalls.sort("seq")
    chains = Chains()
    lost = story("B1 lost").losses.with_columns(end_ns=pl.lit(None, pl.Int64))
    first = chains.feed(calls[:1], lost, None)
    assert first["outcome"].to_list() == ["cut"]
    second = chains.feed(calls[1:], LOSSES.empty(), None)
    assert second["n_attempts"].to_list() == [1]
