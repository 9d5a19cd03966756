"""``tdxtrace capture`` records enough to explain what a capture of all probes explains."""

from __future__ import annotations

from collections import Counter

import pytest

from tdxtrace.analysis.causes.busy_causes import busy_causes
from tdxtrace.analysis.causes.conflicts import mask_of
from tdxtrace.analysis.causes.evidence import gather_evidence
from tdxtrace.simulate import scenario
from tdxtrace.simulate.module.state import Call
from tdxtrace.validate.captured import CapturedRun, capture_run
from tdxtrace.validate.causes import _truth
from tdxtrace.validate.cells import FULL_CAPTURE, OWN_CAPTURE, Cell, Plan
from tdxtrace.validate.matrix import simulated

RUNS = (("zero_step_attack", "B"), ("zero_step_attack", "C"), ("hostile_guest", "C"))
SEEDS = (31, 32, 33)


def found(made: CapturedRun) -> list[tuple[Call, str, str]]:
    """Each captured busy answer with its true cause and the one that is found."""
    table = busy_causes(
        gather_evidence(made.trace, mask=mask_of(made.run.scenario.generation))
    ).filter(rank=1)
    causes = dict(table.select("seq", "cause").iter_rows())
    return [(call, true, causes[line]) for line, call, true in _truth(made)]


def is_beside_a_host_call(made: CapturedRun, attempt: Call) -> bool:
    """Whether a host call, which may hold the same tree, lasts for half of the attempt."""
    half = (attempt.end_ns - attempt.start_ns) / 2
    return any(
        min(call.end_ns, attempt.end_ns) - max(call.start_ns, attempt.start_ns) > half
        for call in made.run.journal.calls
        if call.leaf != "TDH.VP.ENTER" and call.thread is not attempt.thread
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "generation"), RUNS)
def test_causes_are_found_in_what_capture_records(name: str, generation: str, seed: int) -> None:
    own = scenario.named(name)
    run = simulated(Plan(name, generation, own.policy, seed, 4, own.kernel))
    explained: Counter[str] = Counter()
    for capture in (FULL_CAPTURE, OWN_CAPTURE):
        cell = Cell(Plan(name, generation, own.policy, seed, 4, own.kernel), **capture)
        made = capture_run(run, cell)
        assert made is not None
        answers = found(made)
        explained[cell.probes] = sum(cause != "unexplained" for _, _, cause in answers)
        for attempt, true, cause in answers:
            if cause == "armed_entry":
                assert true == "armed_entry"
            elif true == "armed_entry":
                # Which of the two it met no capture shows; nor, at its end, whether all is there.
                at_the_edge = attempt.end_ns > 0.9 * run.end_ns
                assert at_the_edge or is_beside_a_host_call(made, attempt)
    assert explained["wrappers"] > 0
    assert explained["capture"] >= 0.95 * explained["wrappers"]
