"""Retry chains are the same however a capture is cut into segments, and need bounded memory."""

from __future__ import annotations

from functools import cache

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.running import SAMPLES
from support.story import Story, story

import tdxtrace
from tdxtrace.analysis import retry_chains as module
from tdxtrace.analysis.retry_chains import (
    ChainState,
    evict_old,
    finish,
    retry_chains,
    start,
    step,
    survey,
)
from tdxtrace.tables.events import LOSSES

calls = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["", "", "2/"]),
    st.sampled_from(["", "", "sept", "track", "enter"]),
    st.sampled_from("BBSEU"),
    st.sampled_from("12"),
    st.sampled_from(["", "", "#1", "@1", "~"]),
).filter(lambda word: not ("U" in word and "~" in word))
others = st.sampled_from(["lost", "lost@1", "midway", "2/(1", "2/)S", "2/)B", "B~", "_1s"])
stories = st.lists(st.one_of(calls, calls, calls, others), max_size=40).map(" ".join)


def parsed_story(text: str) -> Story:
    """A story in which thread 2 enters only a call that it returns from, one at a time."""
    is_open, words = False, []
    for word in text.split():
        if word[:3] in ("2/(", "2/)"):
            if (word == "2/(1") == is_open:
                continue
            is_open = not is_open
        words.append(word)
    return story(" ".join(words))


def in_segments(
    seamcalls: pl.DataFrame, losses: pl.DataFrame, cuts: list[int], state: ChainState
) -> pl.DataFrame:
    """Chains of calls that are cut after some of them, in the order of their begins."""
    ordered = seamcalls.sort(pl.coalesce("start_ns", "end_ns"), "seq")
    ends = [*sorted(min(cut, ordered.height) for cut in cuts), ordered.height]
    parts = [
        step(state, ordered[begin:end], losses if not begin else None)
        for begin, end in zip([0, *ends], ends, strict=False)
    ]
    return pl.concat([*parts, finish(state)]).sort("source", "first_seq")


@settings(max_examples=20, deadline=None)
@given(stories, st.data())
def test_cuts_change_no_chain(text: str, data: st.DataObject) -> None:
    """Cuts inside chains, between a loss and what it cuts, and while calls are in flight."""
    one = parsed_story(text)
    seamcalls, losses = one.seamcalls, one.losses
    cuts = data.draw(st.lists(st.integers(0, seamcalls.height), max_size=7))
    cut = in_segments(seamcalls, LOSSES.empty(), cuts, start(survey(seamcalls, losses)))
    assert cut.equals(retry_chains(seamcalls, losses))


def test_a_chain_waits_for_the_calls_that_tell_whether_a_loss_cuts_it() -> None:
    """That a thread comes back after two calls of a leaf is seen last."""
    one = parsed_story("S1 lost S2 S3 S4 S5 B6 S7 S8 S6 S9")
    known = survey(one.seamcalls, one.losses)
    cut = in_segments(one.seamcalls, LOSSES.empty(), list(range(1, 10)), start(known))
    assert cut.equals(retry_chains(one.seamcalls, one.losses))
    # Twice as many calls may lie between as were seen.
    assert cut.filter(outcome="cut")["gpa"].to_list() == [0x2000, 0x3000, 0x4000, 0x5000, 0x6000]


@cache
def sample(name: str) -> tdxtrace.Trace:
    return tdxtrace.read_trace(SAMPLES / name)


@pytest.mark.parametrize("n", [7, 60])
@pytest.mark.parametrize("name", ["contended.txt", "lost.txt.xz"])
def test_segments_of_a_recording_change_no_chain(name: str, n: int) -> None:
    trace = sample(name)
    seamcalls = trace.seamcalls[300:360]
    cuts = [seamcalls.height * place // n for place in range(1, n)]
    state = start(survey(seamcalls, trace.losses))
    cut = in_segments(seamcalls, LOSSES.empty(), cuts, state)
    assert cut.equals(retry_chains(seamcalls, trace.losses))


def test_without_a_survey_complete_calls_give_the_same_chains() -> None:
    one = story("B1 2/B2 B1 trackD 2/S2 S1 lost B1 S1 2/B2 2/S3")
    cut = in_segments(one.seamcalls, one.losses, [1, 3, 4], start())
    assert cut.equals(retry_chains(one.seamcalls, one.losses))


def evicted(text: str, cuts: list[int]) -> tuple[list[tuple[int, str, int]], ChainState]:
    """Chains of a capture without an end: page, outcome and attempts."""
    one, state, parts, begin = story(text), start(), [], 0
    for end in [*cuts, len(one.calls)]:
        part = one.seamcalls.sort("seq")[begin:end]
        now = part.select(pl.col("end_ns").max()).item()
        parts += [step(state, part), evict_old(state, now - 60 * 10**9)]
        begin = end
    found = pl.concat(parts).with_columns(pl.col("outcome").cast(pl.String))
    return found.select("gpa", "outcome", "n_attempts").rows(), state


def test_an_endless_chain_is_in_flight() -> None:
    found, state = evicted("B1 B1 B1", [1, 2])
    assert (found, state.n_in_flight, state.max_attempts_in_flight) == ([], 1, 3)


def test_an_unfinished_request_is_abandoned_after_a_minute() -> None:
    found, state = evicted("B1 S2 _61s 2/S3", [1, 2])
    assert sorted(found) == [
        (0x1000, "abandoned", 1),
        (0x2000, "succeeded", 1),
        (0x3000, "succeeded", 1),
    ]
    assert (state.n_in_flight, state.n_dropped) == (0, 0)


def test_a_request_of_a_silent_thread_is_dropped_and_counted() -> None:
    found, state = evicted("B1 _61s 2/S2", [1])
    assert found == [(0x2000, "succeeded", 1)]
    assert (state.n_in_flight, state.n_dropped) == (0, 1)


def test_a_call_without_operands_cuts_only_chains_open_at_the_time() -> None:
    """What may continue it is forgotten with it."""
    found, _ = evicted("S1 B2 S3 _61s 2/S5 S1~ B4 S4", [3, 4])
    assert {outcome for gpa, outcome, _ in found if gpa != 0x2000} == {"succeeded"}
    assert (0x2000, "abandoned", 1) in found


def test_unique_threads_and_requests_are_evicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each thread leaves requests open and calls another leaf; the limit is 16, not 65,536."""
    monkeypatch.setattr(module, "_MAX_ROWS", 16)
    state = start()
    for number in range(10, 40):
        words = " ".join(f"{number}/B{number}{n} {number}/trackS#{n}" for n in range(4))
        step(state, story(words).seamcalls.sort("seq"))
        evict_old(state, 0)
    (one,) = state.sources.values()
    assert len(one.chains) <= 16
    assert len(one.owners) <= 16 + 16
    assert len(one.pairs) <= 4 * 16
    assert state.n_dropped > 0


def test_old_losses_are_kept_as_one_of_each_cpu() -> None:
    """A thread that was silent meanwhile is cut by any of them."""
    one = story("3/B1@1 2/S1@2 S1@1 lost@1 S2@1 lost@1 S3@1 lost@2 2/S4@2 _61s")
    state = start()
    calls = one.seamcalls.sort("seq")
    step(state, calls, one.losses)
    evict_old(state, one.now)
    assert state.known.losses.height == 2
    later = story("3/S9@1").seamcalls.with_columns(pl.col("start_ns", "end_ns") + 70 * 10**9)
    assert step(state, later)["cut_by"].to_list() == ["lost_events"]
