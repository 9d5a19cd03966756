"""Each policy reacts to a busy answer as its source does."""

import pytest

from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.kvm.policies import policy_named
from tdxtrace.simulate.module.abi import OPERAND_BUSY

BUSY_TREE = OPERAND_BUSY | 0x92
AUG = "TDH.MEM.PAGE.AUG"


def _run(name: str, seed: int = 1, **changes: object) -> Run:
    return engine.run(scenario.named(name).with_(**changes), seed)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_v1_series_dies_of_a_busy_answer_that_names_no_tree(seed: int) -> None:
    run = _run("hostile_guest", seed, policy="v1-series", duration_ms=10)
    bugs = [action for action in run.journal.actions if action.action == "bug"]
    assert [bug.detail for bug in bugs] == [OPERAND_BUSY | 0x01]
    assert run.vms[0].dead
    fatal = next(c for c in run.journal.calls if c.status == OPERAND_BUSY | 0x01)
    later = [c for c in run.journal.calls if c.thread is fatal.thread and c.start_ns > fatal.end_ns]
    assert not later


def test_the_v1_series_makes_seventeen_calls_on_the_tree_and_then_enters_the_guest() -> None:
    run = _run("interrupted_requests", generation="A", policy="v1-series", duration_ms=3)
    long = [r for r in run.journal.requests if r.leaf == AUG and len(r.calls) > 17]
    assert long
    for request in long:
        assert {c.status for c in request.calls[:-1]} == {BUSY_TREE}
        assert request.segments > 1
        assert len(request.calls) <= 17 * request.segments
    assert max(len(r.calls) / r.segments for r in long) > 16
    assert not run.vms[0].dead


def test_the_v1_series_repeats_remove_and_track_without_limit_but_not_block() -> None:
    policy = policy_named("v1-series")
    assert (policy.zap_calls, policy.remove_calls, policy.track_calls) == (17, 0, 0)
    assert policy.last_resort == "bug"
    assert not policy.local_loop


def test_a_prefault_repeats_its_page_until_it_is_mapped() -> None:
    """kvm_tdp_map_page: while RET_PF_RETRY, whatever the policy; then the next page."""
    run = _run("prefault_race", generation="A", duration_ms=2)
    workers = {r.thread for r in run.journal.requests if r.thread.comm == "worker"}
    assert workers
    for thread in workers:
        own = [r for r in run.journal.requests if r.thread is thread and r.leaf == AUG]
        assert any(len(r.calls) > 1 for r in own)
        # No page is left for the next one: only the last of a run can be open.
        assert {r.outcome for r in own[:-1]} <= {"succeeded", "resolved_elsewhere"}
