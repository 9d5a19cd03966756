"""Pairs of entries and returns, against a simple stack."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.referee import referee
from support.texts import aug, aug_ret, is_accounted_for, line, read_text

from tdxtrace.ingest.decode.calls import MAX_CONTEXTS
from tdxtrace.ingest.decode.events import number_threads
from tdxtrace.ingest.loops import pairing as loop

Event = tuple[int, int, bool]
Paired = tuple[list[tuple[int, int]], list[int], list[int], list[int]]


def paired(events: list[Event], depth: int = MAX_CONTEXTS) -> Paired:
    """Pairs, entries given up, returns without entry, entries still open."""
    number, n_threads = number_threads(np.array([e[0] for e in events], np.int32), referee)
    # Each function has two kinds of events: 2 n enters it, 2 n + 1 returns from it.
    kind = np.array([2 * e[1] + e[2] for e in events], np.int32)
    function, is_return = np.arange(512, dtype=np.int32) // 2, np.arange(512) % 2 == 1
    top, below = np.full(n_threads, -1, np.int64), np.empty(len(events), np.int64)
    partner, fate = np.full(len(events), -1, np.int64), np.empty(len(events), np.uint8)
    result = number, kind, function, is_return
    referee(loop.pair)(*result, depth, top, below, partner, fate)
    at = {what: np.flatnonzero(fate == what).tolist() for what in range(5)}
    assert sorted(partner[partner >= 0].tolist()) == at[loop.ENTRY_OF_PAIR]
    pairs = [(int(partner[end]), end) for end in at[loop.RETURN_OF_PAIR]]
    return pairs, at[loop.GIVEN_UP], at[loop.ORPHAN], at[loop.OPEN]


def by_stack(events: list[Event], depth: int) -> Paired:
    """The rule, one event after the other."""
    stacks: dict[int, list[tuple[int, int]]] = {}
    pairs: list[tuple[int, int]] = []
    given_up: list[int] = []
    orphans: list[int] = []
    for at, (thread, function, back) in enumerate(events):
        stack = stacks.setdefault(thread, [])
        mine = [place for place, (what, _) in enumerate(stack) if what == function]
        if not back:
            if len(mine) == depth:
                given_up.append(stack.pop(mine[0])[1])
            stack.append((function, at))
        elif mine:
            given_up += [position for _, position in stack[mine[-1] + 1 :]]
            del stack[mine[-1] + 1 :]
            pairs.append((stack.pop()[1], at))
        else:
            orphans.append(at)
    still = sorted(at for stack in stacks.values() for _, at in stack)
    return sorted(pairs, key=lambda p: p[1]), sorted(given_up), orphans, still


def tell(text: str) -> list[Event]:
    """``"a) a( 2b("``: function, ``(`` entry or ``)`` return, after the thread if not 1."""
    return [(int(w[:-2] or 1), ord(w[-2]), w[-1] == ")") for w in text.split()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ([], [], [], [])),
        ("a( a)", ([(0, 1)], [], [], [])),
        ("a( a) a( a)", ([(0, 1), (2, 3)], [], [], [])),
        # Nested.
        ("a( b( b) a)", ([(1, 2), (0, 3)], [], [], [])),
        ("a( b( c( c) b) a)", ([(2, 3), (1, 4), (0, 5)], [], [], [])),
        ("a( a( a) a)", ([(1, 2), (0, 3)], [], [], [])),
        # An entry whose return is missing: still open, or passed over by a later return.
        ("a(", ([], [], [], [0])),
        ("a( b( a)", ([(0, 2)], [1], [], [])),
        ("a( a( a)", ([(1, 2)], [], [], [0])),
        # A return whose entry is missing.
        ("a)", ([], [], [0], [])),
        ("a( b) a)", ([(0, 2)], [], [1], [])),
        ("a) a( a)", ([(1, 2)], [], [0], [])),
        # Threads between each other.
        ("a( 2a( a) 2a)", ([(0, 2), (1, 3)], [], [], [])),
        ("a( 2a)", ([], [], [1], [0])),
    ],
)
def test_the_last_open_call_of_the_thread_returns_first(text: str, expected: Paired) -> None:
    assert paired(tell(text)) == expected


def test_more_open_calls_than_contexts_means_that_the_oldest_lost_its_return() -> None:
    assert paired(tell("a( " * 5 + "a)")) == ([(4, 5)], [0], [], [1, 2, 3])
    assert paired(tell("a( a( a)"), depth=1) == ([(1, 2)], [0], [], [])
    assert paired(tell("a( a( a) a)"), depth=1) == ([(1, 2)], [0], [3], [])


events = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans()), max_size=60)


@given(events, st.integers(1, 4))
def test_pairing_is_that_of_a_stack_per_thread(drawn: list[Event], depth: int) -> None:
    assert paired(drawn, depth) == by_stack(drawn, depth)


# Many events of which few are odd: what a real trace looks like.
calls = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 19)), max_size=60)


@given(calls, st.integers(1, 4))
def test_pairing_of_mostly_sound_traces_is_that_of_a_stack(
    drawn: list[tuple[int, int, int]], depth: int
) -> None:
    found: list[Event] = []
    for thread, function, luck in drawn:
        found += [(thread, function, False)] * (luck != 0)
        found += [(thread, function, True)] * (luck != 1)
    assert paired(found, depth) == by_stack(found, depth)


@given(events)
def test_every_event_is_in_exactly_one_place(drawn: list[Event]) -> None:
    pairs, given_up, orphans, still = paired(drawn)
    places = [*(at for both in pairs for at in both), *given_up, *orphans, *still]
    assert sorted(places) == list(range(len(drawn)))
    assert all(begin < end for begin, end in pairs)


# In whole files.


def columns(text: str, *names: str) -> list[tuple[Any, ...]]:
    trace = read_text(text)
    trace.check()
    assert is_accounted_for(trace)
    return trace.seamcalls.select(names).rows()


def test_a_call_may_return_on_another_cpu() -> None:
    text = aug("1.000001", cpu=3) + aug_ret("1.000005", cpu=12)
    assert columns(text, "seq", "start_ns", "end_ns", "start_cpu", "cpu", "n_lines") == [
        (2, 1_000_001_000, 1_000_005_000, 3, 12, 2),
    ]


def test_threads_on_one_cpu_do_not_mix() -> None:
    text = "".join(
        [
            aug("1.000001", "gpa=0x1000", task="a-7"),
            aug("1.000002", "gpa=0x2000", task="b-8"),
            aug_ret("1.000003", "ret=0x1", task="a-7"),
            aug_ret("1.000004", "ret=0x2", task="b-8"),
        ]
    )
    assert columns(text, "tid", "gpa", "status") == [(7, 0x1000, 1), (8, 0x2000, 2)]


def test_calls_nest() -> None:
    track = "(0x1) td=0x7d000"
    text = "".join(
        [
            aug("1.000001"),
            line("1.000002", f"tdh_mem_track_in: {track}"),
            line("1.000003", "tdh_mem_track_out: (0x1 <- 0x2) ret=0x0"),
            aug_ret("1.000004"),
        ]
    )
    assert columns(text, "leaf", "start_ns") == [(38, 1_000_002_000), (6, 1_000_001_000)]


def test_an_entry_without_return_is_a_call_that_was_seen_to_start() -> None:
    trace = read_text(aug("1.000001", "gpa=0x1000") + aug("1.000005") + aug_ret("1.000007"))
    trace.check()
    names = ("seq", "start_ns", "end_ns", "gpa", "status", "n_lines")
    assert trace.seamcalls.sort("seq").select(names).rows() == [
        (1, 1_000_001_000, None, 0x1000, None, 1),
        (3, 1_000_005_000, 1_000_007_000, 0x8000_0000, 0, 2),
    ]
    result = trace.losses.select("kind", "n_events", "n_lines").rows()
    assert ("unpaired_entry", 1, 0) in result


def test_a_return_without_entry_is_a_call_that_was_seen_to_end() -> None:
    trace = read_text(aug_ret("1.000001", "ret=0x5") + aug("1.000005") + aug_ret("1.000007"))
    trace.check()
    names = ("seq", "start_ns", "end_ns", "status", "n_lines")
    assert trace.seamcalls.sort("seq").select(names).rows() == [
        (1, None, 1_000_001_000, 5, 1),
        (3, 1_000_005_000, 1_000_007_000, 0, 2),
    ]
    result = trace.losses.select("kind", "n_events", "n_lines").rows()
    assert ("unpaired_return", 1, 0) in result


def test_without_thread_numbers_calls_pair_by_cpu() -> None:
    """perf script -F cpu,time,event,trace prints no thread."""
    text = "".join(
        f"    [{cpu:03}]  1.{micros:06}: tdx:aug{side}\n"
        for cpu, micros, side in [
            (1, 1, "_in: (5646) gpa=0x1000"),
            (2, 2, "_in: (5646) gpa=0x2000"),
            (1, 3, "_out: (5646 <- 5647) ret=0x1"),
            (2, 4, "_out: (5646 <- 5647) ret=0x2"),
        ]
    )
    assert columns(text, "tid", "cpu", "gpa", "status") == [
        (None, 1, 0x1000, 1),
        (None, 2, 0x2000, 2),
    ]


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pairs_are_found_across_batches(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch leaves open waits for the next one."""
    from tdxtrace.ingest.decode import decoder as decode

    texts = []
    for k in range(40):
        texts += [
            aug(f"1.{k:06}", f"gpa={k << 12:#x}", task=f"a-{1 + k % 3}"),
            line(f"1.{k:06}", "sched_switch: x"),
            aug_ret(f"1.{k:06}", f"ret={k:#x}", task=f"a-{1 + k % 3}"),
        ]
    whole = read_text("".join(texts))
    monkeypatch.setattr(decode, "BATCH_EVENTS", n)
    parts = read_text("".join(texts))
    assert parts.seamcalls.sort("seq").equals(whole.seamcalls.sort("seq"))
    assert whole.seamcalls.filter(pl.col("gpa") != pl.col("status") * 0x1000).is_empty()
    assert whole.seamcalls.height == 40
