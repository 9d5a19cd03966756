"""Score of the busy causes: a confusion table of true and found causes, and the holders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tdxtrace.analysis.causes.busy_causes import busy_causes
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, mask_of
from tdxtrace.analysis.causes.evidence import gather_evidence
from tdxtrace.simulate.journal import RETRYABLE
from tdxtrace.simulate.module.abi import HIGH_HALF, LEAF, OPERAND_BUSY, PREVIOUS_TLB_EPOCH_BUSY
from tdxtrace.simulate.module.state import Call
from tdxtrace.validate.captured import Captured, row_of

# A kernel that keeps its rules never meets these, whoever holds them.
_BUG_LOCKS: Final = ("TDR", "TDVPR", "PREVIOUS_EPOCH")
_BUSY: Final = (OPERAND_BUSY, PREVIOUS_TLB_EPOCH_BUSY)
TOLD, UNTOLD = "told", "untold"
"""Whether the module's generation was said, or had to be found or left open."""


@dataclass(slots=True)
class CauseScore:
    """Counts by ``told true-cause found-cause``, of holders named and right, and examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


def score_causes(made: Captured) -> CauseScore:
    """Hold the cause of every busy attempt that the capture shows against the true one.

    The analysis runs twice: with the module's generation said, and without.  A holder is
    right if it is the call that truly held the lock; where the module counts several holders,
    or the analysis says that several fit as well, its cause alone is judged.
    """
    score = CauseScore()
    truth = list(_truth(made))
    for how, mask in ((TOLD, mask_of(made.run.scenario.generation)), (UNTOLD, ALL_GENERATIONS)):
        table = busy_causes(gather_evidence(made.trace, mask=mask))
        found = {row["seq"]: row for row in table.filter(rank=1).iter_rows(named=True)}
        for line, call, cause in truth:
            row = found.get(line)
            if row is None:
                score.counts[f"{how} missing"] += 1
                continue
            score.counts[f"{how} {cause} {row['cause']}"] += 1
            if row["cause"] not in (cause, "unexplained"):
                _example(score, f"{how}: {cause}, found", row, call)
            elif row["cause"] == cause and how == TOLD:
                _judge_holder(score, made, row, call)
        score.counts[f"{how} extra"] += len(found.keys() - {line for line, _, _ in truth})
    return score


def _truth(made: Captured) -> Iterator[tuple[int, Call, str]]:
    """Line, call and true cause of each busy answer that the capture shows."""
    for request in made.run.journal.requests:
        last = {call.wrapper_call or id(call): call for call in request.calls}
        calls = request.calls if made.cell.probes == "seamcall" else list(last.values())
        for call in calls:
            line = made.returns.get(id(call))
            shown = line is not None and line != made.partial_line
            if shown and line is not None and call.status & HIGH_HALF in _BUSY:
                yield line, call, true_cause(call)


def true_cause(call: Call) -> str:
    """Who made a call busy, by what the simulated module knows."""
    assert call.status & HIGH_HALF in RETRYABLE
    busy_reason = call.busy_reason
    assert busy_reason is not None
    holder = busy_reason.holders[0] if busy_reason.holders else None
    if busy_reason.resource in _BUG_LOCKS:
        return "kernel_bug"
    assert isinstance(holder, Call)
    if holder.guest:
        return "guest"
    return "armed_entry" if busy_reason.resource == "TREE" and holder.armed else "host_conflict"


def _judge_holder(score: CauseScore, made: Captured, row: dict[str, Any], call: Call) -> None:
    busy_reason = call.busy_reason
    if row["holder_seq"] is None or busy_reason is None or len(busy_reason.holders) != 1:
        return
    holder = busy_reason.holders[0]
    if row["n_tied"] > 1 or not isinstance(holder, Call) or holder.thread is None:
        return
    score.counts["holder named"] += 1
    if holder.guest:
        is_right = row["holder_tid"] == holder.thread.tid
    else:
        is_right = row["holder_seq"] == row_of(made, holder) or (
            row["holder_tid"] == holder.thread.tid and row["holder_leaf"] == LEAF[holder.leaf]
        )
    score.counts["holder right"] += is_right
    if not is_right:
        _example(score, f"holder not {holder.leaf} of {holder.thread.tid}, but", row, call)


def _example(score: CauseScore, what: str, row: dict[str, Any], call: Call) -> None:
    if len(score.examples) < 6:
        kept = ("seq", "cause", "confidence", "holder_seq", "holder_leaf", "overlap_ns", "lock")
        told = {name: row[name] for name in kept}
        busy_reason = call.busy_reason
        held = [getattr(h, "leaf", "?") for h in busy_reason.holders] if busy_reason else []
        score.examples.append(f"{what} {told}; {call.leaf} {call.status:#x} held by {held}")
