"""In what the module's releases differ, as far as locks, pages and stepping go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.lock_plans import PLANS, Plan


@dataclass(frozen=True, slots=True)
class Generation:
    """One lock generation of the TDX module."""

    name: str
    releases: str
    plans: Mapping[str, Plan]
    host_priority: bool
    """Whether PAMT entries (TDR, TDVPR, pages), OP_STATE and SEPT entries have the bit."""
    tree_host_priority: bool
    """Whether the SEPT tree lock has it too."""
    entry_writes_keep_priority: bool
    """Whether a write of a whole SEPT entry keeps a TDHP that was set meanwhile."""
    pending_is_not_missing: bool
    """Whether the gate exempts a pending page that the guest would take as #VE."""
    counts_every_violation: bool
    """Whether EPT violations on shared pages and those of ACCEPT count for zero-step."""
    demote_interruptible: bool
    """Whether DEMOTE and PROMOTE stop at a pending interrupt (INTERRUPTED_RESTARTABLE)."""
    yields_to_tree_priority: bool
    """Whether long leaves stop (INTERRUPTED_BUSY) when the tree lock's bit is set."""


# A: 1.0.x has neither host priority nor locks of entries (tdx_locks.h of 1.0.03).
# B: a write of a whole entry drops TDHP: tdg_mem_page_accept.c up to 1.5.16.
# C: atomically_update_sept_state_keep_tdhp, is_epf_expected and the tree lock of 1.5.20.
# DEMOTE's check for interrupts is in the source up to 1.5.16 and gone in 1.5.20; a flag
# for it is enumerated from 1.5.28 (Yan Zhao, huge page series for TDX, 2025 to 2026).
GENERATIONS: Final = {
    "A": Generation("A", "1.0.x", PLANS["A"], False, False, False, False, True, True, False),
    "B": Generation(
        "B", "1.5.01 to 1.5.16", PLANS["B"], True, False, False, False, False, True, False
    ),
    "C": Generation(
        "C", "1.5.20 to 1.5.34", PLANS["C"], True, True, True, True, False, False, True
    ),
}
