"""Attempts of one thread at one request are one chain, with any calls in between."""

import itertools

import pytest

from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.journal import RETRYABLE, Journal, Request
from tdxtrace.simulate.module.abi import HIGH_HALF, OPERAND_BUSY, SUCCESS
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.record.probes import Capture, ProbeRecorder
from tdxtrace.simulate.thread import RandomStream, Thread

PAGE, OTHER = (0x1000, 0), (0x2000, 0)
AUG, ADD, ENTER, WR = "TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD", "TDH.VP.ENTER", "TDH.VP.WR"


class Story:
    """A journal, its threads, and a clock that ticks once for each call."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.threads = [Thread(n, 1, "t", RandomStream(1, n)) for n in range(3)]
        self.now = 0

    def call(self, leaf: str, page: tuple[int, int], status: int = SUCCESS, by: int = 0) -> Request:
        """Make a call by a thread; returns the request that it belongs to."""
        vcpu = by if leaf.startswith("TDH.VP") else -1
        request = self.journal.open_request(leaf, self.threads[by], 0, vcpu, page)
        call = Call(leaf, self.threads[by])
        call.start_ns, call.end_ns, call.status = self.now, self.now + 5, status
        self.now += 10
        add = self.journal.add_entry if leaf == ENTER else self.journal.add_attempt
        add(request, call)
        return request

    def end(self) -> list[tuple[str, int, str]]:
        """Leaf, number of attempts and outcome of each chain."""
        self.journal.truncate(self.now)
        return [(r.leaf, len(r.calls), r.outcome) for r in self.journal.requests]


def test_another_page_does_not_end_a_chain() -> None:
    story = Story()
    for page in (PAGE, OTHER, PAGE, OTHER):
        story.call(AUG, page, OPERAND_BUSY)
    story.call(AUG, PAGE)
    story.call(AUG, OTHER)
    assert story.end() == [(AUG, 3, "succeeded"), (AUG, 3, "succeeded")]


def test_another_leaf_does_not_end_a_chain() -> None:
    story = Story()
    story.call(AUG, PAGE, OPERAND_BUSY)
    story.call(ADD, OTHER)
    story.call(AUG, PAGE)
    story.call(ENTER, (-1, -1), OPERAND_BUSY)
    story.call(WR, (-1, -1))
    story.call(ENTER, (-1, -1))
    assert story.end() == [
        *((AUG, 2, "succeeded"), (ADD, 1, "succeeded")),
        *((ENTER, 2, "succeeded"), (WR, 1, "succeeded")),
    ]


def test_success_ends_a_chain() -> None:
    story = Story()
    story.call(AUG, PAGE, OPERAND_BUSY)
    story.call(AUG, PAGE)
    story.call(AUG, PAGE)
    assert [n for _, n, _ in story.end()] == [2, 1]


def test_another_thread_that_settles_it_in_between_ends_a_chain() -> None:
    story = Story()
    story.call(AUG, PAGE, OPERAND_BUSY)
    story.call(AUG, PAGE, by=1)
    story.call(ADD, OTHER)
    story.call(AUG, PAGE)
    assert story.end() == [
        *((AUG, 1, "resolved_elsewhere"), (AUG, 1, "succeeded")),
        *((ADD, 1, "succeeded"), (AUG, 1, "succeeded")),
    ]


def test_a_caller_that_tries_again_at_once_goes_on_whoever_succeeded() -> None:
    story = Story()
    story.call("TDH.MEM.TRACK", (-1, -1), OPERAND_BUSY)
    story.call("TDH.MEM.TRACK", (-1, -1), by=1)
    story.call("TDH.MEM.TRACK", (-1, -1))
    assert [n for _, n, _ in story.end()] == [2, 1]


def test_what_needs_a_block_ends_where_its_range_is_unblocked() -> None:
    promote, unblock, story = "TDH.MEM.PAGE.PROMOTE", "TDH.MEM.RANGE.UNBLOCK", Story()
    story.call(promote, PAGE, OPERAND_BUSY)
    story.call(unblock, OTHER, by=1)
    story.call(promote, PAGE, OPERAND_BUSY)
    story.call(unblock, PAGE, by=1)
    story.call(promote, PAGE)
    of_promote = [result for result in story.end() if result[0] == promote]
    assert of_promote == [(promote, 2, "abandoned"), (promote, 1, "succeeded")]


def test_what_was_left_is_abandoned_or_cut_by_the_end() -> None:
    story = Story()
    story.call(AUG, PAGE, OPERAND_BUSY)
    story.call(ADD, OTHER)
    story.call(AUG, OTHER, OPERAND_BUSY, by=1)
    story.call(ENTER, (-1, -1), by=1)
    assert [outcome for _, _, outcome in story.end()] == [
        "abandoned",
        "succeeded",
        "cut",
        "succeeded",
    ]


def test_a_thread_that_came_back_after_another_call_may_do_so_again() -> None:
    story = Story()
    for page in (PAGE, OTHER, PAGE):
        story.call(AUG, page, SUCCESS if page == OTHER else OPERAND_BUSY)
    story.call(AUG, (0x3000, 0))
    assert [outcome for _, _, outcome in story.end()] == ["cut", "succeeded", "succeeded"]
    story.call(AUG, (0x4000, 0))
    story.journal.requests[0].outcome = ""
    assert story.end()[0][2] == "abandoned"


def _between(run: Run) -> set[tuple[str, str]]:
    """Leaf of each chain, and of a call that its thread made between two attempts."""
    by_thread: dict[Thread, list[Call]] = {}
    for call in sorted(run.journal.calls, key=lambda c: c.start_ns):
        if call.thread is not None:
            by_thread.setdefault(call.thread, []).append(call)
    place = {id(call): n for calls in by_thread.values() for n, call in enumerate(calls)}
    found = set()
    for request in run.journal.requests:
        calls = by_thread[request.thread]
        at = [place[id(call)] for call in request.calls]
        for first, second in itertools.pairwise(at):
            found |= {(request.leaf, call.leaf) for call in calls[first + 1 : second]}
    return found


def test_requests_are_interrupted_in_every_way_that_the_scenario_is_for() -> None:
    run = engine.run(scenario.named("interrupted_requests"), 1)
    assert _between(run) >= {(AUG, AUG), (AUG, ADD), (AUG, ENTER), (ENTER, WR)}
    for request in run.journal.requests:
        assert all(call.status & HIGH_HALF in RETRYABLE for call in request.calls[:-1])


def test_a_thread_that_only_goes_on_with_what_is_open_may_come_back() -> None:
    story = Story()
    story.call(AUG, PAGE, OPERAND_BUSY)
    story.call(AUG, OTHER, OPERAND_BUSY)
    story.call(AUG, PAGE, OPERAND_BUSY)
    story.call(AUG, OTHER, OPERAND_BUSY)
    # No request was begun after the last attempt at either page.
    assert [outcome for _, _, outcome in story.end()] == ["cut", "cut"]


@pytest.mark.parametrize("probes", ["wrappers", "seamcall"])
def test_a_thread_returns_from_a_call_before_it_begins_the_next(probes: str) -> None:
    run = engine.run(scenario.named("interrupted_requests").with_(duration_ms=3), 1)
    inside: dict[int, int] = {}
    for event in ProbeRecorder(run, Capture(probes)).events():
        if event.spec.kind == "tracepoint" or event.irq or not event.calls:
            continue
        is_entry = event.spec.kind == "entry"
        if is_entry or event.spec.name != "sc":
            inside[event.tid] = inside.get(event.tid, 0) + (1 if is_entry else -1)
        assert inside.get(event.tid, 0) in (0, 1), (event.ts_ns, event.spec.name)
