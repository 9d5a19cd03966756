"""Replayed intervals against runs of the policies, on a few seeds."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from tdxtrace.errors import QueryError
from tdxtrace.simulate.journal import Request
from tdxtrace.simulate.kvm.policies import policy_named
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.thread import RandomStream, Thread
from tdxtrace.validate import replays
from tdxtrace.validate.cells import Plan
from tdxtrace.validate.matrix import simulated
from tdxtrace.validate.replays import Comparison, compare, has_stopped, share_held, table

FEW = (("hostile_guest", "C", 5), ("boot_storm", "A", 1))


@cache
def _compared() -> list[Comparison]:
    return compare((1, 2), FEW, jobs=1)


def test_the_interval_contains_the_result_of_the_policy_itself() -> None:
    compared = _compared()
    assert len(compared) > 20
    assert {c.recorded for c in compared} == {"endless", "mainline"}
    held = share_held(compared)
    assert held is not None
    assert held >= replays.MIN_HELD


def test_mainline_does_not_give_up_requests_that_a_kick_completes() -> None:
    zaps = [
        c
        for c in _compared()
        if c.policy == "mainline" and c.leaf in ("TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE")
    ]
    assert zaps
    assert all(c.n_stopped == 0 and c.low == 0.0 for c in zaps)
    assert any(c.ratio is None for c in zaps)


def test_an_interval_that_misses_is_not_held() -> None:
    one = next(c for c in _compared() if c.n_stopped)
    above = dataclasses.replace(one, low=one.truth + 0.01)
    below = dataclasses.replace(one, high=one.truth - 0.01)
    assert (above.is_held, below.is_held) == (False, False)
    assert share_held([above, below, one, one]) == 0.5
    assert share_held([]) is None


@pytest.mark.parametrize("policy", ["fixed-1", "fixed-2"])
def test_a_policy_has_stopped_where_it_says_that_it_gave_up(policy: str) -> None:
    run = simulated(Plan("hostile_guest", "C", policy, 1, 8))
    given_up: dict[str, int] = {}
    for action in run.journal.actions:
        if action.action == "give_up":
            given_up[action.leaf] = given_up.get(action.leaf, 0) + 1
    stopped: dict[str, int] = {}
    for request in run.journal.requests:
        if has_stopped(request, policy_named(policy)) and request.leaf in given_up:
            stopped[request.leaf] = stopped.get(request.leaf, 0) + 1
    # A request that is taken up again is one request, and may be given up again.
    assert stopped.keys() == given_up.keys() != set()
    assert all(0 < stopped[leaf] <= given_up[leaf] for leaf in stopped)


def _request(policy: str, leaf: str, *statuses: int) -> bool:
    request = Request(0, leaf, Thread(1, 1, "qemu", RandomStream(1, 1)), 0, -1, 0, 0, [])
    for status in statuses:
        call = Call(leaf)
        call.status = status
        request.calls.append(call)
    return has_stopped(request, policy_named(policy))


TREE = abi.OPERAND_BUSY | abi.OPERAND["SEPT_TREE"]
ENTRY = abi.OPERAND_BUSY | abi.OPERAND["RCX"]


@pytest.mark.parametrize(
    ("policy", "leaf", "statuses", "stopped"),
    [
        ("mainline", "TDH.MEM.PAGE.AUG", [ENTRY] * 9, False),
        ("mainline", "TDH.MEM.RANGE.BLOCK", [ENTRY, 0], False),
        ("mainline", "TDH.MEM.RANGE.BLOCK", [ENTRY, ENTRY], True),
        ("v1-series", "TDH.MEM.RANGE.BLOCK", [TREE] * 16 + [0], False),
        ("v1-series", "TDH.MEM.RANGE.BLOCK", [TREE] * 17, True),
        ("v1-series", "TDH.MEM.RANGE.BLOCK", [ENTRY], True),
        ("v1-series", "TDH.MEM.TRACK", [ENTRY] * 40, False),
        ("seed-loop", "TDH.MEM.RANGE.BLOCK", [ENTRY] * 1023, False),
        ("seed-loop", "TDH.MEM.RANGE.BLOCK", [ENTRY] * 1024, True),
        ("endless", "TDH.MEM.RANGE.BLOCK", [ENTRY] * 40, False),
    ],
)
def test_each_policy_stops_where_it_is_defined_to(
    policy: str, leaf: str, statuses: list[int], stopped: bool
) -> None:
    assert _request(policy, leaf, *statuses) == stopped


def test_the_table_shows_policy_truth_interval_and_seeds() -> None:
    head, *rows = table(_compared())
    assert head[-4:] == ["truth", "replayed", "withheld", "held"]
    assert rows[-1][0] == "all"
    assert {row[2] for row in rows[:-1]} == {f"{name} {generation}" for name, generation, _ in FEW}
    assert all(len(row) == len(head) for row in rows)


def test_scenarios_with_workers_of_another_policy_are_not_compared() -> None:
    with pytest.raises(QueryError, match="no replay of scenario 'string_copy'"):
        replays.select_scenarios(["string_copy"])
    assert len(replays.select_scenarios([])) >= 5
