"""Busy answers of armed entries whose cause a capture cannot decide, whoever reads it.

Judged by the simulated calls, without the analysis.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Final

import polars as pl

from tdxtrace.simulate.journal import Episode
from tdxtrace.simulate.module.generations import ARMED, LOCK_SEQUENCES
from tdxtrace.simulate.module.state import Call
from tdxtrace.validate.captured import CapturedRun

_ENTER: Final = "TDH.VP.ENTER"
UNNAMED_TD: Final = "unnamed TD"
"""No row says which TD the thread of the vCPU runs, and the capture has several."""
HOST_CALL: Final = "host call"
"""A host call that takes the tree overlaps the answer too."""
NEVER_REFUSED: Final = "never refused"
"""No entry was refused in the episode of the holder, so none shows that it was armed."""


class Decidable:
    """Why the cause of an answer cannot be decided.

    Args:
        made: The capture.
    """

    def __init__(self, made: CapturedRun) -> None:
        self._made = made
        self._locks = LOCK_SEQUENCES[made.run.scenario.generation]

    def reason(self, call: Call) -> str | None:
        """Return the reason for an answer that an armed entry caused; None: it can be decided.

        Args:
            call: A call that was busy on the tree.
        """
        holders = [h for h in _holders(call) if h.leaf == _ENTER]
        if not all(self._names_td(one) for one in (call, *holders)):
            return UNNAMED_TD
        if any(self._could_have_met(call, other) for other in self._host_calls):
            return HOST_CALL
        if not any(self._was_refused(holder) for holder in holders):
            return NEVER_REFUSED
        return None

    def _names_td(self, call: Call) -> bool:
        if call.leaf != _ENTER or call.thread is None or self._n_tds < 2:
            return True
        return call.thread.tid in self._named or bool(self._tgids)

    @cached_property
    def _named(self) -> set[int]:
        rows = self._made.trace.seamcalls.filter(pl.col("td_id").is_not_null())
        return set(rows["tid"].drop_nulls())

    @cached_property
    def _tgids(self) -> set[int]:
        return set(self._made.trace.seamcalls["tgid"].drop_nulls())

    @cached_property
    def _n_tds(self) -> int:
        return self._made.trace.seamcalls["td_id"].drop_nulls().n_unique()

    @cached_property
    def _host_calls(self) -> list[Call]:
        """SEAMCALLs that took the tree, but for entries."""
        calls = self._made.run.journal.calls
        return [c for c in calls if not c.guest and c.leaf != _ENTER and self._mode(c) is not None]

    def _mode(self, call: Call) -> bool | None:
        """Whether a call takes the tree exclusively; None if it takes none, or got none."""
        if call.busy_reason is not None:
            return None
        name = ARMED if call.leaf == _ENTER else call.leaf
        modes = [exclusive for lock, exclusive, _ in self._locks.get(name, ()) if lock == "TREE"]
        return any(modes) if modes else None

    def _could_have_met(self, call: Call, other: Call) -> bool:
        apart = other.end_ns < call.start_ns or other.start_ns > call.end_ns
        if apart or other.td is not call.td or other.thread is call.thread:
            return False
        own = self._locks.get(ARMED if call.leaf == _ENTER else call.leaf, ())
        wants = any(exclusive for lock, exclusive, _ in own if lock == "TREE")
        return wants or bool(self._mode(other))

    def _was_refused(self, holder: Call) -> bool:
        return any(episode.n_busy for episode in self._episodes(holder))

    def _episodes(self, holder: Call) -> Iterator[Episode]:
        end_ns = self._made.run.end_ns + 1
        for episode in self._made.run.journal.episodes:
            until = end_ns if episode.cleared_ns is None else episode.cleared_ns
            mine = episode.thread is holder.thread
            if mine and episode.armed_ns <= holder.start_ns <= until:
                yield episode


def _holders(call: Call) -> list[Call]:
    reason = call.busy_reason
    return [h for h in reason.holders if isinstance(h, Call)] if reason is not None else []
