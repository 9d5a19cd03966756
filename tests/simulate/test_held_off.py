"""While a zap holds vCPUs off, tdx_vcpu_run returns the status of the entry before."""

import pytest

from tdxtrace.simulate import engine, scenario, truth
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.module.abi import OPERAND_BUSY
from tdxtrace.simulate.record.probes import Capture, ProbeRecorder

BUSY_TREE = OPERAND_BUSY | 0x92


@pytest.fixture(scope="module")
def run() -> Run:
    return engine.run(scenario.named("held_off"), 1)


def test_a_stale_return_shows_the_status_of_the_entry_before(run: Run) -> None:
    entries = sorted(
        (call for call in run.journal.calls if call.leaf == "TDH.VP.ENTER"), key=lambda c: c.end_ns
    )
    assert {call.status for call in run.journal.stale_returns} >= {BUSY_TREE, 1}
    for stale in run.journal.stale_returns:
        before = [c for c in entries if c.thread is stale.thread and c.end_ns < stale.start_ns]
        assert before[-1].status == stale.status


def test_a_stale_return_is_no_attempt(run: Run) -> None:
    attempts = {id(call) for request in run.journal.requests for call in request.calls}
    assert not attempts & {id(call) for call in run.journal.stale_returns}
    # One refused entry is followed by a hundred returns and more in a large VM.
    runs = [len(r.calls) for r in run.journal.requests if r.leaf == "TDH.VP.ENTER"]
    assert len(run.journal.stale_returns) > 20 * max(runs)


def test_a_probe_on_tdx_vcpu_run_sees_it_and_kvm_does_not(run: Run) -> None:
    events = ProbeRecorder(run, Capture()).events()
    kinds = {
        name: sum(event.spec.name == name for event in events)
        for name in ("kvm_entry", "kvm_exit", "vpenter_in", "vpenter")
    }
    n = len(run.journal.stale_returns)
    assert n > 100
    assert kinds["vpenter"] == kinds["kvm_exit"] + n
    assert kinds["vpenter_in"] == kinds["kvm_entry"] + n


def test_stale_returns_are_in_the_truth(run: Run) -> None:
    rows = truth.rows_of(run)["truth_stale_returns"]
    assert len(rows) == len(run.journal.stale_returns)
    assert {row[-1] for row in rows} >= {BUSY_TREE, 1}
