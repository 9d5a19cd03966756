"""Attempts at the same request: loops against their definition, compiled and interpreted."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.referee import referee
from support.story import story

from tdxtrace.analysis import retry_chains as module
from tdxtrace.analysis.loops.linking import NONE
from tdxtrace.analysis.retry_chains import chains_and_answers, number_answers, retry_chains
from tdxtrace.tdx.status import is_retryable

few = settings(max_examples=20, deadline=None)
words = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["", "", "2/"]),
    st.sampled_from(["", "", "sept", "block", "track", "enter"]),
    st.sampled_from("BBSEJ"),
    st.sampled_from("123"),
    st.sampled_from(["", "", "#1", "^1"]),
)
stories = st.lists(words, max_size=60).map(" ".join)
vague = st.lists(
    st.one_of(words, words, st.sampled_from(["B~", "S~", "septB~", "U1"])), max_size=60
)


@few
@given(stories)
def test_chains_are_those_of_the_definition(text: str) -> None:
    """Same thread, same request, previous answer retryable, not settled by another thread."""
    scenario = story(text)
    found = retry_chains(scenario.seamcalls, scenario.losses).sort("first_seq")
    open_: dict[tuple[object, ...], list[int]] = {}
    expected: list[list[int]] = []
    last_of: dict[int, int] = {}
    done: list[tuple[tuple[object, ...], int, int]] = []
    for row in scenario.calls:
        what = tuple(row.get(c) for c in ("leaf", "td_id", "gpa", "level", "vp_id"))
        mine = (row["tid"], *what)
        chain = open_.get(mine)
        goes_on = chain is not None and (chain[-1] == last_of[row["tid"]] or row["leaf"] == 0)
        settled = (seq for w, tid, seq in done if w == what and tid != row["tid"])
        if chain is not None and not goes_on and any(seq > chain[-1] for seq in settled):
            chain = None
        if chain is None:
            chain = []
            expected.append(chain)
        chain.append(row["seq"])
        open_[mine] = chain
        if row["status"] is not None and row["status"] >> 56 != 0x80:
            del open_[mine]
        if row["status"] == 0:
            done.append((what, row["tid"], row["seq"]))
        last_of[row["tid"]] = row["seq"]
    assert found.select("first_seq", "last_seq", "n_attempts").rows() == [
        (chain[0], chain[-1], len(chain)) for chain in expected
    ]


@few
@given(vague.map(" ".join))
def test_the_loops_do_the_same_when_they_are_compiled(text: str) -> None:
    scenario = story(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose", lambda _: referee)
        checked = retry_chains(scenario.seamcalls, scenario.losses)
    assert checked.equals(retry_chains(scenario.seamcalls, scenario.losses))


@few
@given(vague.map(" ".join), st.sampled_from(["", "lost", "lost@1"]))
def test_answers_are_numbered_within_their_chains(text: str, loss: str) -> None:
    """When chains are found, and anew from chains that are given."""
    scenario = story(" ".join([*text.split()[:20], loss, *text.split()[20:]]))
    chains, found = chains_and_answers(scenario.seamcalls, scenario.losses)
    retryable = scenario.seamcalls.filter(is_retryable(pl.col("status")))
    assert found.sort("seq").equals(number_answers(retryable, chains).sort("seq"))
    assert found["seq"].sort().to_list() == retryable["seq"].sort().to_list()
    counted = found.group_by("source", "first_seq").agg(
        n=pl.len().cast(pl.UInt32), numbers=pl.col("number").sort()
    )
    both = chains.join(counted, on=["source", "first_seq"])
    assert both["n_busy"].to_list() == both["n"].to_list()
    assert both.height == (chains["n_busy"] > 0).sum()
    assert both["numbers"].to_list() == [list(range(1, n + 1)) for n in both["n"]]
    ends = retryable.select("seq", "end_ns").join(found, on="seq")
    ends = ends.join(chains.select("first_seq", "start_ns"), on="first_seq")
    assert (ends["waited_ns"] == ends["end_ns"] - ends["start_ns"]).all()


@few
@given(stories)
def test_requests_that_share_a_slot_are_kept_apart(text: str) -> None:
    """Tables of a single slot: all requests, threads and keys want it."""
    scenario = story(text)
    expected = retry_chains(scenario.seamcalls, scenario.losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_heads", lambda _: np.full(1, NONE, np.int32))
        assert retry_chains(scenario.seamcalls, scenario.losses).equals(expected)
