"""Busy answers whose cause cannot be decided from a capture, by any analysis.

Only answers caused by armed entries and guests can be undecidable.  The test uses the simulated
calls, not the analysis.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Final

import polars as pl

from tdxtrace.simulate.journal import Episode
from tdxtrace.simulate.module.generations import ARMED, LOCK_SEQUENCES
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.record.symbols import CLOCK_START_NS
from tdxtrace.validate.captured import CapturedRun

_ENTER: Final = "TDH.VP.ENTER"
UNNAMED_TD: Final = "unnamed TD"
"""No row names the TD of the vCPU's thread, and the capture has several TDs."""
HOST_CALL: Final = "host call"
"""A host call that takes the tree lock also overlaps the answer."""
NEVER_REFUSED: Final = "never refused"
"""No entry was refused in the holder's episode, so nothing shows that the entry was armed."""
ONE_LEAF: Final = "one leaf"
"""No call of another leaf that takes the lock of an SEPT entry was captured: other leaves may not
have been probed, and an unrecorded call may have held the lock."""
SILENT_CPU: Final = "silent CPU"
"""A CPU has no line before or after the answer, and the format does not mark losses at the ends of
the capture: the CPU may have been idle, or its buffer full."""
UNSEEN_HOLDER: Final = "unseen holder"
"""The capture has neither the entry nor the return of any call that held the lock."""
# trace-cmd drains the buffers and marks losses; other formats do not mark losses at their ends.
_MARKS_LOSSES: Final = "trace-cmd"


class Decidable:
    """Decides whether the cause of a busy answer is decidable from a capture.

    Args:
        captured: The capture.
    """

    def __init__(self, captured: CapturedRun) -> None:
        self._captured = captured
        self._locks = LOCK_SEQUENCES[captured.run.scenario.generation]

    def reason(self, call: Call, cause: str) -> str | None:
        """Return the reason why the cause of an answer is undecidable; None if it is decidable.

        Args:
            call: A call that was answered busy.
            cause: Its true cause.  ``armed_entry`` and ``guest`` can be undecidable, because they
                are inferred from the absence of calls, and ``host_conflict`` if the call that held
                the lock was not captured.
        """
        if cause == "host_conflict":
            return None if self._shows_holder(call) else UNSEEN_HOLDER
        if cause not in ("armed_entry", "guest"):
            return None
        if not self._every_cpu_recorded(call):
            return SILENT_CPU
        if cause == "guest":
            return None if self._shows_other_leaves(call) else ONE_LEAF
        return self._armed_entry_reason(call)

    def _armed_entry_reason(self, call: Call) -> str | None:
        """Return why an answer caused by an armed entry is undecidable; None if decidable."""
        holders = [h for h in _holders(call) if h.leaf == _ENTER]
        if not all(self._names_td(one) for one in (call, *holders)):
            return UNNAMED_TD
        if any(self._could_conflict(call, other) for other in self._host_calls):
            return HOST_CALL
        if not any(self._was_refused(holder) for holder in holders):
            return NEVER_REFUSED
        return None

    def _shows_holder(self, call: Call) -> bool:
        """Whether a row of the capture stands for a call that held the lock."""
        captured = self._captured
        places = captured.returns, captured.entries, captured.exits
        return any(id(holder) in found for holder in _holders(call) for found in places)

    def _shows_other_leaves(self, call: Call) -> bool:
        """Return whether the capture has a call of another leaf that locks an SEPT entry."""
        captured = self._captured
        return any(
            other.leaf != call.leaf
            and (id(other) in captured.returns or id(other) in captured.entries)
            for other in captured.run.journal.calls
            if not other.guest
            if any(lock == "ENTRY" for lock, *_ in self._locks.get(other.leaf, ()))
        )

    def _every_cpu_recorded(self, call: Call) -> bool:
        if self._captured.cell.form == _MARKS_LOSSES:
            return True
        first, last = self._recorded
        return first <= CLOCK_START_NS + call.start_ns and CLOCK_START_NS + call.end_ns <= last

    @cached_property
    def _recorded(self) -> tuple[int, int]:
        """Interval in ns in which all CPUs with lines were recorded."""
        times: dict[int, list[int]] = {}
        for seen in self._captured.lines.values():
            times.setdefault(seen.cpu, []).append(seen.ts_ns)
        return max(map(min, times.values())), min(map(max, times.values()))

    def _names_td(self, call: Call) -> bool:
        if call.leaf != _ENTER or call.thread is None or self._n_tds < 2:
            return True
        return call.thread.tid in self._named or bool(self._tgids)

    @cached_property
    def _named(self) -> set[int]:
        rows = self._captured.trace.seamcalls.filter(pl.col("td_id").is_not_null())
        return set(rows["tid"].drop_nulls())

    @cached_property
    def _tgids(self) -> set[int]:
        return set(self._captured.trace.seamcalls["tgid"].drop_nulls())

    @cached_property
    def _n_tds(self) -> int:
        return self._captured.trace.seamcalls["td_id"].drop_nulls().n_unique()

    @cached_property
    def _host_calls(self) -> list[Call]:
        """SEAMCALLs of the host that took the tree lock, without vCPU entries."""
        calls = self._captured.run.journal.calls
        return [c for c in calls if not c.guest and c.leaf != _ENTER and self._mode(c) is not None]

    def _mode(self, call: Call) -> bool | None:
        """Return whether a call takes the tree lock exclusively; None if it did not take it."""
        if call.busy_reason is not None:
            return None
        name = ARMED if call.leaf == _ENTER else call.leaf
        modes = [exclusive for lock, exclusive, _ in self._locks.get(name, ()) if lock == "TREE"]
        return any(modes) if modes else None

    def _could_conflict(self, call: Call, other: Call) -> bool:
        is_disjoint = other.end_ns < call.start_ns or other.start_ns > call.end_ns
        if is_disjoint or other.td is not call.td or other.thread is call.thread:
            return False
        own = self._locks.get(ARMED if call.leaf == _ENTER else call.leaf, ())
        wants = any(exclusive for lock, exclusive, _ in own if lock == "TREE")
        return wants or bool(self._mode(other))

    def _was_refused(self, holder: Call) -> bool:
        return any(episode.n_busy for episode in self._episodes(holder))

    def _episodes(self, holder: Call) -> Iterator[Episode]:
        end_ns = self._captured.run.end_ns + 1
        for episode in self._captured.run.journal.episodes:
            until = end_ns if episode.cleared_ns is None else episode.cleared_ns
            mine = episode.thread is holder.thread
            if mine and episode.armed_ns <= holder.start_ns <= until:
                yield episode


def _holders(call: Call) -> list[Call]:
    reason = call.busy_reason
    return [h for h in reason.holders if isinstance(h, Call)] if reason is not None else []
