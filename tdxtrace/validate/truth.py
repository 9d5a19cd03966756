"""Simulated truth by row of a capture: the call, the rules that it broke, and the actors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final

from tdxtrace.simulate.journal import Actor, BrokenRule, Episode, Request
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.true_causes import true_step_cause
from tdxtrace.simulate.true_rules import true_rules
from tdxtrace.validate.captured import CapturedRun

# TDX_TLB_TRACKING_NOT_DONE: intel/tdx-module error codes, 0xC0000B08.
_TLB_TRACKING_NOT_DONE: Final = 0xC000_0B08 << 32
_CHANGES_OF_SIZE: Final = ("TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE")
# Changes of size that prove churning: a split, a merge, and the same split again.
_A_TURN: Final = 3
_BUSY_SEPT: Final = abi.OPERAND_BUSY | abi.OPERAND["SEPT_TREE"]


class Truth:
    """Truth of a run, by the rows of one of its captures.

    Args:
        captured: The capture.
    """

    def __init__(self, captured: CapturedRun) -> None:
        self._captured = captured

    @cached_property
    def _calls(self) -> dict[int, Call]:
        """Last call represented by each row of seamcalls or vm_entries, by line."""
        by_id = {id(call): call for call in self._captured.run.journal.calls}
        places = (self._captured.exits, self._captured.entries, self._captured.returns)
        return {line: by_id[key] for found in places for key, line in found.items() if key in by_id}

    @cached_property
    def requests(self) -> dict[int, Request]:
        """The request of each call, by id of the call."""
        journal = self._captured.run.journal
        return {id(call): request for request in journal.requests for call in request.calls}

    @cached_property
    def actors(self) -> dict[tuple[int, str], Actor]:
        """Actors by thread and side."""
        return {(actor.tid, actor.side): actor for actor in self._captured.run.journal.actors}

    @cached_property
    def broken(self) -> list[BrokenRule]:
        """Every broken rule of the run."""
        return [*true_rules(self._captured.run), *self._dropped_blocks()]

    @cached_property
    def _broken_by_call(self) -> dict[int, list[BrokenRule]]:
        found: dict[int, list[BrokenRule]] = {}
        for broken in self.broken:
            for call in (broken.call, broken.evidence):
                if call is not None:
                    found.setdefault(id(call), []).append(broken)
        return found

    def _dropped_blocks(self) -> Iterator[BrokenRule]:
        """Yield calls that failed because the last BLOCK of their page was busy and not retried."""
        blocks: dict[tuple[object, int], Call] = {}
        for call in sorted(self._captured.run.journal.calls, key=lambda call: call.end_ns):
            page = call.td, call.gpa
            if call.leaf == "TDH.MEM.RANGE.BLOCK":
                blocks[page] = call
            elif call.status & abi.HIGH_HALF == _TLB_TRACKING_NOT_DONE:
                block = blocks.get(page)
                if block is not None and abi.is_busy(block.status):
                    yield BrokenRule("dropped_block", call, block)

    def call_at(self, seq: int) -> Call | None:
        """Return the call of a seamcalls row; None if the row represents no call."""
        return self._calls.get(seq)

    def breaks(self, rule: str, seq: int, evidence_seq: int | None = None) -> bool:
        """Return whether the call at a row broke a rule, and whether the evidence is right.

        If a pair of calls breaks the rule, either may be named first; any holder of the lock that
        made the call busy is evidence.

        Args:
            rule: Name of the rule.
            seq: Row of the call.
            evidence_seq: Row of the evidence; None: not checked.
        """
        call = self.call_at(seq)
        found = [b for b in self._broken_by_call.get(id(call), ()) if b.rule == rule]
        if evidence_seq is None:
            return bool(found)
        other = self.call_at(evidence_seq)
        if other is None:
            return False
        pair = {id(call), id(other)}
        return any(
            {id(b.call), id(b.evidence)} == pair
            or (b.call is call and (other in _holders(call) or self._was_in_epoch(other, call)))
            for b in found
        )

    def _was_in_epoch(self, entry: Call, track: Call) -> bool:
        """Return whether an entry belonged to the epoch that a busy TRACK waited for.

        The simulator names only the entries that are still inside when TRACK returns; an entry may
        have left between TRACK's test and its return.
        """
        if entry.leaf != "TDH.VP.ENTER" or track.leaf != "TDH.MEM.TRACK":
            return False
        before = [
            call.end_ns
            for call in self._captured.run.journal.calls
            if call.leaf == track.leaf and call.td is track.td
            if call.status == abi.SUCCESS and call.end_ns <= track.end_ns
        ]
        same = entry.td is track.td and entry.end_ns > track.start_ns
        return same and bool(before) and entry.start_ns < max(before)

    def guest_attacks(self, seq: int) -> bool:
        """Return whether a hostile guest held the lock that the call at a row needed."""
        call = self.call_at(seq)
        return call is not None and any(
            holder.guest
            and holder.thread is not None
            and self._conduct(holder.thread.tid, "guest") == "hostile"
            for holder in _holders(call)
        )

    def _conduct(self, tid: int, side: str) -> str:
        actor = self.actors.get((tid, side))
        return actor.conduct if actor is not None else ""

    @cached_property
    def _kept_out(self) -> dict[int, list[tuple[int, Episode]]]:
        """Line and episode of every entry that zero-step mitigation kept out, by thread."""
        captured = self._captured
        found: dict[int, list[tuple[int, Episode]]] = {}
        by_thread: dict[int, list[Episode]] = {}
        for episode in captured.run.journal.episodes:
            by_thread.setdefault(episode.thread.tid, []).append(episode)
        for call in captured.run.journal.calls:
            if call.leaf != "TDH.VP.ENTER" or call.thread is None or not _is_kept_out(call):
                continue
            tid = call.thread.tid
            lines = (captured.returns.get(id(call)), captured.exits.get(id(call)))
            for episode in by_thread.get(tid, ()):
                ends = (
                    episode.cleared_ns
                    if episode.cleared_ns is not None
                    else captured.run.end_ns + 1
                )
                if episode.armed_ns <= call.start_ns < ends:
                    places = ((line, episode) for line in lines if line is not None)
                    found.setdefault(tid, []).extend(places)
        return found

    def episode_of(self, row: dict[str, Any]) -> Episode | None:
        """Return the simulated episode of a zero_steps row: that of its first refused entry."""
        kept_out = self._kept_out.get(row["tid"], ())
        inside = [
            (line, episode.armed_ns, episode)
            for line, episode in kept_out
            if row["first_seq"] <= line <= row["last_seq"]
        ]
        return min(inside, key=lambda place: place[:2])[2] if inside else None

    def step_cause(self, episode: Episode) -> tuple[Any, ...]:
        """Return the columns of ``truth_zero_steps`` from ``cause`` on."""
        return true_step_cause(episode, self.actors)

    def shows_no_turns(self, episode: Episode) -> bool:
        """Return whether the ranges that kept a vCPU out were split or merged without repetition.

        The first split of a host that splits and merges a range endlessly looks like a legitimate
        one; only a repetition of the same change in the capture distinguishes the two.
        """
        ranges = {
            (id(block.td), block.gpa, block.level)
            for fault in episode.faults
            if (block := fault.blocked_by) is not None
        }
        return any(self._n_changes.get(place) for place in ranges) and all(
            self._n_changes.get(place, 0) < _A_TURN for place in ranges
        )

    @cached_property
    def _n_changes(self) -> Counter[tuple[int, int, int]]:
        """Number of successful splits and merges in the capture, by TD, address and level."""
        return Counter(
            (id(call.td), call.gpa, call.level)
            for call in self._captured.run.journal.calls
            if call.leaf in _CHANGES_OF_SIZE and call.status == abi.SUCCESS
            if id(call) in self._captured.returns
        )


def _holders(call: Call) -> list[Call]:
    """Return the calls that held the lock which made a call busy."""
    reason = call.busy_reason
    return [h for h in reason.holders if isinstance(h, Call)] if reason is not None else []


def _is_kept_out(call: Call) -> bool:
    emulated = call.status == abi.EXIT_EPT_VIOLATION and call.armed and not call.entered
    return emulated or call.status == _BUSY_SEPT
