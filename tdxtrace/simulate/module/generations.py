"""Lock generations of the module: the locks that each leaf takes, in order.

data/locks.csv is transcribed from the module's source, one row per leaf: every lock as RESOURCE,
MODE (SH shared, EX exclusive), OPERAND.  The first lock that fails determines the operand id.

Sources: intel/tdx-module 1.5.01 to 1.5.25, ``src/vmm_dispatcher/api_calls/tdh_*.c``,
``src/td_transitions/tdh_vp_enter.c``, ``src/td_dispatcher/vm_exits/tdg_mem_page_*.c``;
TDR and control pages by ``helpers.c non_shared_hpa_metadata_check_and_lock``, the tree
and entry by ``lock_sept_check_and_walk_internal``, OP_STATE by
``check_any_td_state_map_tdcs_and_lock``.  Left out: the shared locks of 1 GB PAMT parents,
since no leaf takes one exclusively, and all but two of the migration leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.module.abi import OPERAND
from tdxtrace.simulate.tables import rows

LockStep = tuple[str, bool, int]
"""Resource, whether exclusive, operand id of a failure."""
LockSequence = tuple[LockStep, ...]

ARMED: Final = "TDH.VP.ENTER armed"
ACCEPT: Final = "TDG.MEM.PAGE.ACCEPT"
ATTR: Final = "TDG.MEM.PAGE.ATTR"


def _sequences(generation: str) -> dict[str, LockSequence]:
    """Return the lock sequences in data/locks.csv for a generation, by call."""
    sequences = {}
    for row in rows("locks"):
        if row["generation"] == generation:
            steps = (lock.split() for lock in row["locks"].split(";") if lock)
            sequences[row["call"]] = tuple(
                (name, mode == "EX", OPERAND[operand]) for name, mode, operand in steps
            )
    return sequences


# A: one lock without host priority for the whole tree, exclusive for every leaf that changes it,
# and no locks of entries: 1.0.03 helpers.c lock_sept_check_and_walk_any_gpa.
# C: an armed entry takes the tree shared; PROMOTE takes it exclusive, and locks no children.
LOCK_SEQUENCES: Final = {
    name: _sequences("B") | (_sequences(name) if name != "B" else {}) for name in "ABC"
}


@dataclass(frozen=True, slots=True)
class Generation:
    """One lock generation of the TDX module."""

    name: str
    releases: str
    lock_sequences: Mapping[str, LockSequence]
    host_priority: bool
    """Whether PAMT entries (TDR, TDVPR, pages), OP_STATE and SEPT entries have host priority."""
    tree_host_priority: bool
    """Whether the SEPT tree lock has host priority."""
    entry_writes_keep_priority: bool
    """Whether a write of a whole SEPT entry keeps a TDHP bit that was set meanwhile."""
    pending_is_not_missing: bool
    """Whether the gate allows an entry if its logged page is pending and raises #VE."""
    counts_every_violation: bool
    """Whether EPT violations on shared pages and of ACCEPT count for zero-step."""
    yields_to_tree_priority: bool
    """Whether long leaves stop (INTERRUPTED_BUSY) when the tree lock's bit is set."""


# A: 1.0.x has neither host priority nor locks of entries (tdx_locks.h of 1.0.03).
# B: a write of a whole entry clears TDHP: tdg_mem_page_accept.c up to 1.5.16.
# C: atomically_update_sept_state_keep_tdhp, is_epf_expected and the tree lock of 1.5.20.
# All stop DEMOTE and PROMOTE at a pending interrupt (INTERRUPTED_RESTARTABLE), in 1.5.20 to 1.5.25
# by check_host_interrupt_and_hp_bit.  C models these releases; 1.5.32 and 1.5.34 stop only if the
# TD has L2 VMs, which are not modelled.
GENERATIONS: Final = {
    "A": Generation("A", "1.0.x", LOCK_SEQUENCES["A"], False, False, False, False, True, False),
    "B": Generation(
        "B", "1.5.01 to 1.5.16", LOCK_SEQUENCES["B"], True, False, False, False, False, False
    ),
    "C": Generation(
        "C", "1.5.20 to 1.5.34", LOCK_SEQUENCES["C"], True, True, True, True, False, True
    ),
}
