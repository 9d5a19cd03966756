"""Score of the busy causes: counts of true and found causes, and of correct holders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tdxtrace.analysis.causes.busy_causes import busy_causes
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, mask_of
from tdxtrace.analysis.causes.evidence import gather_evidence
from tdxtrace.simulate.journal import RETRYABLE
from tdxtrace.simulate.module.abi import HIGH_HALF, LEAF, OPERAND_BUSY, PREVIOUS_TLB_EPOCH_BUSY
from tdxtrace.simulate.module.state import Call
from tdxtrace.validate.captured import CapturedRun, Score, row_of
from tdxtrace.validate.decidable import Decidable
from tdxtrace.validate.truth import Truth

# Locks on which a correct kernel never gets a busy answer.
_BUG_LOCKS: Final = ("TDR", "TDVPR", "PREVIOUS_EPOCH")
_BUSY: Final = (OPERAND_BUSY, PREVIOUS_TLB_EPOCH_BUSY)
GENERATION_GIVEN, GENERATION_OPEN = "given", "open"
"""Names in counts: the module's generation was given, or had to be inferred or left open."""


def score_causes(captured: CapturedRun) -> Score:
    """Compare the cause of every captured busy attempt with the true one.

    The analysis runs twice: with the module's generation given, and without.  ``kernel_bug`` is
    right if that call broke the named rule.  A holder is right if it is one of the calls that
    truly held the lock; if several candidates are tied, only the cause is scored.  Undecidable
    answers caused by an armed entry or a guest (:class:`~.decidable.Decidable`) are counted a
    second time as ``undecidable``.
    """
    score = Score()
    happened, decidable = Truth(captured), Decidable(captured)
    truth = list(_truth(captured))
    for how, mask in (
        (GENERATION_GIVEN, mask_of(captured.run.scenario.generation)),
        (GENERATION_OPEN, ALL_GENERATIONS),
    ):
        table = busy_causes(gather_evidence(captured.trace, mask=mask))
        found = {row["seq"]: row for row in table.filter(rank=1).iter_rows(named=True)}
        for line, call, held_by in truth:
            cause = held_by
            row = found.get(line)
            if row is None:
                score.counts[f"{how} missing"] += 1
                continue
            if row["cause"] == "kernel_bug" and happened.breaks(row["rule"], line):
                cause = "kernel_bug"
            score.counts[f"{how} {cause} {row['cause']}"] += 1
            if decidable.reason(call, held_by) is not None and cause == held_by:
                score.counts[f"{how} {cause} {row['cause']} undecidable"] += 1
            if row["cause"] not in (cause, "unexplained"):
                _example(score, f"{how}: {cause}, found", row, call)
            elif row["cause"] == cause and how == GENERATION_GIVEN:
                _judge_holder(score, captured, row, call)
        score.counts[f"{how} extra"] += len(found.keys() - {line for line, _, _ in truth})
    return score


def _truth(captured: CapturedRun) -> Iterator[tuple[int, Call, str]]:
    """Yield line, call and true cause of each busy answer in the capture."""
    for request in captured.run.journal.requests:
        last = {call.wrapper_call or id(call): call for call in request.calls}
        calls = request.calls if captured.cell.probes_seamcalls else list(last.values())
        for call in calls:
            line = captured.returns.get(id(call))
            shown = line is not None and line != captured.partial_line
            if shown and line is not None and call.status & HIGH_HALF in _BUSY:
                yield line, call, true_cause(call)


def true_cause(call: Call) -> str:
    """Return the true cause of a busy call, from the state of the simulated module."""
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


def _judge_holder(score: Score, captured: CapturedRun, row: dict[str, Any], call: Call) -> None:
    busy_reason = call.busy_reason
    if row["holder_seq"] is None or busy_reason is None or row["n_tied"] > 1:
        return
    holders = [h for h in busy_reason.holders if isinstance(h, Call) and h.thread is not None]
    if not holders:
        return
    is_right = any(_is_holder(captured, row, holder) for holder in holders)
    score.counts["holder named"] += 1
    score.counts["holder right"] += is_right
    if not is_right:
        known = [f"{holder.leaf} of {holder.thread.tid}" for holder in holders if holder.thread]
        _example(score, f"holder not {', '.join(known)}, but", row, call)


def _is_holder(captured: CapturedRun, row: dict[str, Any], holder: Call) -> bool:
    assert holder.thread is not None
    same_thread = bool(row["holder_tid"] == holder.thread.tid)
    if holder.guest:
        return same_thread
    named = row["holder_seq"] == row_of(captured, holder)
    return named or (same_thread and row["holder_leaf"] == LEAF[holder.leaf])


def _example(score: Score, what: str, row: dict[str, Any], call: Call) -> None:
    columns = ("seq", "cause", "confidence", "holder_seq", "holder_leaf", "overlap_ns", "lock")
    shown = {name: row[name] for name in columns}
    busy_reason = call.busy_reason
    held = [getattr(h, "leaf", "?") for h in busy_reason.holders] if busy_reason else []
    score.add_example(f"{what} {shown}; {call.leaf} {call.status:#x} held by {held}")
