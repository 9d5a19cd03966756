"""Score of the verdicts, of zero-step causes and of progress loops: no false accusation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import polars as pl

from tdxtrace.simulate.journal import Request
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import Call
from tdxtrace.validate.captured import CapturedRun, Score
from tdxtrace.validate.causes import true_cause

_LOOPS: Final = {
    abi.INTERRUPTED_RESUMABLE: "resumable",
    abi.INTERRUPTED_RESTARTABLE: "restartable",
    abi.INTERRUPTED_BUSY: "interrupted",
    abi.RND_NO_ENTROPY: "entropy",
}
_BUSY: Final = (abi.OPERAND_BUSY, abi.PREVIOUS_TLB_EPOCH_BUSY)
ACCUSATIONS: Final = ("BUG", "HOSTILE")


def score_verdicts(made: CapturedRun) -> Score:
    """Compare causes of zero-steps, progress loops and accusations with the truth of the run.

    The cause of an episode is right if the run can cause it at all (a run has few causes);
    which of them did is tested on small scenarios.  HOSTILE is right if the simulated host
    refuses faults; BUG, if the calls it is about truly broke a rule, or the policy gave
    requests up.
    """
    score = Score()
    _score_causes(score, made)
    _score_loops(score, made)
    _score_accusations(score, made)
    return score


def _score_causes(score: Score, made: CapturedRun) -> None:
    possible = _possible(made)
    for row in made.findings.zero_step_causes.iter_rows(named=True):
        cause = row["cause"]
        score.counts["causes_found"] += 1
        score.counts["causes_unknown"] += cause == "unknown"
        score.counts["causes_right"] += cause in possible
        if cause not in possible and cause != "unknown":
            score.add_example(f"cause {cause} of {row['first_seq']}, possible are {possible}")


def _possible(made: CapturedRun) -> set[str]:
    """Causes of zero-steps that the scenario, policy and module of the run can have."""
    possible = set()
    run = made.run
    for td in run.scenario.tds:
        kinds = {work.kind for work in td.workers}
        makes = {
            "memory_fault_ignored": td.ignored_faults > 0,
            "block_churn": "churn_blocks" in kinds,
            "many_pages": td.guest.program == "string-copy",
            "pending_page": td.pending_ve_disable or run.scenario.generation != "C",
            "frozen_spte": "prefault" in kinds or td.guest.program == "contend",
            "invalidation": bool(kinds & {"zap", "delete_slot", "split"}),
            "memslot_change": "delete_slot" in kinds,
        }
        possible |= {cause for cause, made_here in makes.items() if made_here}
    # The host enters again while the page is busy: by policy, or for an event.
    leaves = any(action.action == "leave_loop" for action in run.journal.actions)
    if leaves or not all(vm.policy.local_loop for vm in run.vms):
        possible.add("left_loop")
    return possible


def _score_loops(score: Score, made: CapturedRun) -> None:
    """Compare the loops of the capture with those found, by line."""
    truth: dict[int, tuple[Request, str, int]] = {}
    for request in made.run.journal.requests:
        shown = _answers(made, request)
        for loop in set(shown.values()):
            first = min(shown)
            truth[first] = (request, loop, sum(other == loop for other in shown.values()))
    score.counts["loops_shown"] += len(truth)
    rows = made.findings.progress_loops.filter(pl.col("loop") != "local_retry")
    lines = {
        line: first for first, (request, _, _) in truth.items() for line in _lines(made, request)
    }
    for row in rows.iter_rows(named=True):
        _score_loop(score, row, truth.get(lines.get(row["first_seq"], 0)), made.cell.is_clean)


def _lines(made: CapturedRun, request: Request) -> list[int]:
    return [made.returns[id(call)] for call in request.calls if id(call) in made.returns] + [
        made.entries[id(call)] for call in request.calls if id(call) in made.entries
    ]


def _answers(made: CapturedRun, request: Request) -> dict[int, str]:
    """Line and kind of each answer of a request that makes a loop and can be read."""
    last: dict[int, Call] = {}
    for call in request.calls:
        line = made.returns.get(id(call))
        if line is not None and line != made.partial_line:
            last[line] = call
    return {
        line: _LOOPS[call.status & abi.HIGH_HALF]
        for line, call in last.items()
        if call.status & abi.HIGH_HALF in _LOOPS
    }


def _score_loop(
    score: Score,
    row: dict[str, Any],
    true: tuple[Request, str, int] | None,
    is_clean: bool,
) -> None:
    score.counts["loops_found"] += 1
    if true is None:
        score.counts["loops_false"] += 1
        score.add_example(f"no such loop: {row}")
        return
    request, loop, n = true
    seen = request.outcome in ("succeeded", "resolved_elsewhere")
    wrong = (row["progress"] == "seen") != seen and row["progress"] != "unknown"
    # Where lines are lost a chain is cut, and shows part of the answers.
    wrong |= row["loop"] != loop or (is_clean and row["n_repeats"] != n)
    score.counts["loops_wrong"] += wrong
    score.counts["loops_right"] += not wrong
    if wrong:
        score.add_example(f"loop {row}, truly {loop} x {n}, {request.outcome}")


def _score_accusations(score: Score, made: CapturedRun) -> None:
    hostile = any(td.refuses_faults for td in made.run.scenario.tds)
    sure = made.findings.zero_steps.filter(pl.col("strength") != "weak").height
    given = made.findings.verdicts
    for row in given.iter_rows(named=True):
        score.counts[f"{row['verdict']}"] += 1
        if row["verdict"] not in ACCUSATIONS:
            continue
        right = hostile if row["verdict"] == "HOSTILE" else _is_bug(made, row)
        score.counts[f"{row['verdict']}_false"] += not right
        if not right:
            score.add_example(f"accused: {row['sentence']} ({row['evidence']})")
    if hostile and sure:
        score.counts["hostile_shown"] += 1
        score.counts["hostile_named"] += "HOSTILE" in given["verdict"]


def _is_bug(made: CapturedRun, row: dict[str, Any]) -> bool:
    """Whether the run truly has the bug that a verdict names."""
    journal = made.run.journal
    if any(action.action == "give_up" for action in journal.actions):
        return True
    evidence = {int(seq) for seq in row["evidence"].split()}
    if row["rule"] == "mmu_lock_excludes":
        return _overlaps_all(made, evidence)
    return any(
        abi.LEAF[call.leaf] == row["leaf"]
        and call.status & abi.HIGH_HALF in _BUSY
        and made.returns.get(id(call)) in evidence
        and true_cause(call) == "kernel_bug"
        for request in journal.requests
        for call in request.calls
    )


# Leaves that KVM calls with mmu_lock held, and those of them that it holds for writing over.
_EXCLUDING: Final = ("TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE")
_UNDER_MMU_LOCK: Final = (*_EXCLUDING, "TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD")


def _overlaps_all(made: CapturedRun, evidence: set[int]) -> bool:
    """Whether each call truly overlapped one of its TD that mmu_lock keeps away from it."""
    calls = [
        call
        for request in made.run.journal.requests
        for call in request.calls
        if call.leaf in _UNDER_MMU_LOCK
    ]
    found = [call for call in calls if made.returns.get(id(call)) in evidence]
    return len(found) == len(evidence) and all(
        any(
            other.td is call.td
            and other.thread is not call.thread
            and (other.leaf in _EXCLUDING or call.leaf in _EXCLUDING)
            and other.start_ns < call.end_ns
            and call.start_ns < other.end_ns
            for other in calls
        )
        for call in found
    )


def false_accusations(counts: Counter[str]) -> list[str]:
    """Return a line for each kind of wrong verdict; none if all are right.

    Args:
        counts: Sums of the counts of :func:`score_verdicts`.
    """
    wrong = [
        f"{counts[f'{verdict}_false']} verdicts {verdict} are false"
        for verdict in ACCUSATIONS
        if counts[f"{verdict}_false"]
    ]
    named = counts["causes_found"] - counts["causes_unknown"]
    if counts["causes_right"] < named:
        wrong.append(f"{named - counts['causes_right']} of {named} zero-step causes are wrong")
    if counts["loops_wrong"] + counts["loops_false"]:
        wrong.append(f"{counts['loops_wrong'] + counts['loops_false']} progress loops are wrong")
    return wrong


_SHOWN: Final = (
    ("causes right", "causes_right", "causes_found"),
    ("causes unknown", "causes_unknown", "causes_found"),
    ("loops right", "loops_right", "loops_shown"),
    ("hostile named", "hostile_named", "hostile_shown"),
)


def verdict_score_rows(parts: dict[str, Counter[str]]) -> Sequence[list[str]]:
    """Return table rows for display: a heading, then one row per scenario.

    Args:
        parts: Sums of the counts by scenario.
    """
    head = ["verdicts", *(title for title, _, _ in _SHOWN), "BUG false", "HOSTILE false"]
    head += ["UNDECIDED", "EXPECTED"]
    rows = [head]
    for name, counts in parts.items():
        shares = [f"{counts[n]}/{counts[of]}" if counts[of] else "-" for _, n, of in _SHOWN]
        accused = [f"{counts[f'{v}_false']}/{counts[v]}" if counts[v] else "-" for v in ACCUSATIONS]
        rows.append([name, *shares, *accused, *(str(counts[v]) for v in ("UNDECIDED", "EXPECTED"))])
    return rows
