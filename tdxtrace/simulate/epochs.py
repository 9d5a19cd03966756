"""TLB tracking of one TD: the epoch, who entered in which, and what TRACK may do.

Sources: intel/tdx-module ``src/common/helpers/helpers.c adjust_tlb_tracking_state``,
``helpers.h is_tlb_tracked``, ``src/vmm_dispatcher/api_calls/tdh_mem_track.c``.
"""

from __future__ import annotations


class Epochs:
    """The TD's epoch and the two counts of vCPUs inside, by the epoch's lowest bit."""

    __slots__ = ("current", "inside")

    def __init__(self) -> None:
        self.current = 0
        self.inside = [0, 0]

    def enter(self) -> int:
        """Count a vCPU in; returns the epoch it runs in, to be handed to ``leave``."""
        self.inside[self.current & 1] += 1
        return self.current

    def leave(self, epoch: int) -> None:
        """Count a vCPU out again: it exited, or its entry was refused after all."""
        self.inside[epoch & 1] -= 1

    def advance(self) -> bool:
        """TRACK: go to the next epoch, unless a vCPU is still in the previous one."""
        if self.inside[(self.current - 1) & 1]:
            return False
        self.current += 1
        return True

    def tracked(self, blocked_in: int) -> bool:
        """Whether no running vCPU can still use a translation blocked in that epoch."""
        previous = self.current - 1
        if blocked_in < previous:
            return True
        return blocked_in == previous and not self.inside[previous & 1]
