"""Lock generations of the module: which locks each leaf takes, in which order.

Transcribed from the module's source, one line a leaf: every lock as RESOURCE, MODE
(SH shared, EX exclusive), OPERAND.  The first lock that fails decides the operand id.
Generation B is the complete table; A and C list only the leaves that differ.

Sources: intel/tdx-module 1.5.01 to 1.5.25, ``src/vmm_dispatcher/api_calls/tdh_*.c``,
``src/td_transitions/tdh_vp_enter.c``, ``src/td_dispatcher/vm_exits/tdg_mem_page_*.c``;
TDR and control pages by ``helpers.c non_shared_hpa_metadata_check_and_lock``, the tree
and entry by ``lock_sept_check_and_walk_internal``, OP_STATE by
``check_any_td_state_map_tdcs_and_lock``.  Left out: the shared hold on 1 GB PAMT
parents, since no leaf takes one exclusively, and the migration leaves but two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.module.abi import OPERAND

LockStep = tuple[str, bool, int]
"""Resource, whether exclusive, operand id of a failure."""
LockSequence = tuple[LockStep, ...]

ARMED: Final = "TDH.VP.ENTER armed"
ACCEPT: Final = "TDG.MEM.PAGE.ACCEPT"
ATTR: Final = "TDG.MEM.PAGE.ATTR"

_TD: Final = "TDR SH RDX, OP_STATE SH OP_STATE"
_ENTRY: Final = "ENTRY EX RCX"
_B: Final = f"""
TDH.VP.ENTER: TDVPR SH RCX, TDR SH TDR, OP_STATE SH OP_STATE, EPOCH SH TD_EPOCH
{ARMED}: TREE EX SEPT_TREE
TDH.MNG.ADDCX: TDR EX RDX, PAMT_NEW EX RCX
TDH.MEM.PAGE.ADD: TDR EX RDX, PAMT_NEW EX R8
TDH.MEM.SEPT.ADD: {_TD}, TREE SH SEPT_TREE, {_ENTRY}, PAMT_NEW EX R8
TDH.VP.ADDCX: TDVPR EX RDX, TDR SH TDR, OP_STATE SH OP_STATE, PAMT_NEW EX RCX
TDH.MEM.PAGE.RELOCATE: {_TD}, TREE SH SEPT_TREE, {_ENTRY}, PAMT_OLD EX RCX, PAMT_NEW EX R8
TDH.MEM.PAGE.AUG: {_TD}, TREE SH SEPT_TREE, {_ENTRY}, PAMT_NEW EX R8
TDH.MEM.RANGE.BLOCK: {_TD}, TREE EX SEPT_TREE, {_ENTRY}
TDH.MEM.RANGE.UNBLOCK: {_TD}, TREE EX SEPT_TREE, {_ENTRY}
TDH.MNG.KEY.CONFIG: TDR EX RCX, KET EX KET
TDH.MNG.CREATE: PAMT_NEW EX RCX, KOT EX KOT
TDH.VP.CREATE: {_TD}, PAMT_NEW EX RCX
TDH.MNG.RD: TDR SH RCX, OP_STATE SH OP_STATE
TDH.MEM.PAGE.DEMOTE: {_TD}, TREE SH SEPT_TREE, {_ENTRY}, PAMT_NEW EX R8, PAMT_2M EX RCX
TDH.MR.EXTEND: TDR EX RDX
TDH.MR.FINALIZE: TDR EX RCX
TDH.VP.FLUSH: TDVPR EX RCX, TDR SH TDR
TDH.MNG.VPFLUSHDONE: TDR EX RCX, KOT EX KOT
TDH.MNG.KEY.FREEID: TDR EX RCX, KOT EX KOT
TDH.MNG.INIT: TDR EX RCX
TDH.VP.INIT: TDVPR EX RCX, TDR SH TDR, OP_STATE SH OP_STATE
TDH.VP.INIT v1: TDVPR EX RCX, TDR EX TDR, OP_STATE SH OP_STATE
TDH.MEM.PAGE.PROMOTE: {_TD}, TREE SH SEPT_TREE, {_ENTRY}, CHILDREN EX RCX, PAMT_OLD EX RCX, \
PAMT_2M EX RCX
TDH.MEM.SEPT.RD: {_TD}, TREE SH SEPT_TREE, {_ENTRY}
TDH.VP.RD: TDVPR SH RCX, TDR SH TDR, OP_STATE SH OP_STATE
TDH.VP.WR: TDVPR SH RCX, TDR SH TDR, OP_STATE SH OP_STATE
TDH.PHYMEM.PAGE.RECLAIM: PAMT_OLD EX RCX, TDR SH TDR
TDH.MEM.PAGE.REMOVE: {_TD}, TREE SH SEPT_TREE, {_ENTRY}, PAMT_OLD EX RCX
TDH.MEM.SEPT.REMOVE: {_TD}, TREE EX SEPT_TREE, {_ENTRY}, PAMT_OLD EX RCX
TDH.MEM.TRACK: TDR SH RCX, OP_STATE SH OP_STATE, EPOCH EX TD_EPOCH
TDH.PHYMEM.CACHE.WB: WBCACHE EX WBCACHE, KOT SH KOT
TDH.PHYMEM.PAGE.WBINVD: PAMT_OLD SH RCX
TDH.EXPORT.MEM: {_TD}, MIG SH MIG, MIGSC EX MIGSC, TREE SH SEPT_TREE, {_ENTRY}
TDH.EXPORT.TRACK: TDR SH RCX, OP_STATE EX OP_STATE, MIG EX MIG, MIGSC EX MIGSC
{ACCEPT}: {_ENTRY}
{ATTR}: {_ENTRY}
"""
# A: one plain lock for the whole tree, exclusive for every leaf that changes it, and no
# locks of entries: 1.0.03 helpers.c lock_sept_check_and_walk_any_gpa.
_A: Final = f"""
TDH.MEM.SEPT.ADD: {_TD}, TREE EX SEPT_TREE, PAMT_NEW EX R8
TDH.MEM.PAGE.RELOCATE: {_TD}, TREE EX SEPT_TREE, PAMT_OLD EX RCX, PAMT_NEW EX R8
TDH.MEM.PAGE.AUG: {_TD}, TREE EX SEPT_TREE, PAMT_NEW EX R8
TDH.MEM.RANGE.BLOCK: {_TD}, TREE EX SEPT_TREE
TDH.MEM.RANGE.UNBLOCK: {_TD}, TREE EX SEPT_TREE
TDH.MEM.PAGE.DEMOTE: {_TD}, TREE EX SEPT_TREE, PAMT_NEW EX R8, PAMT_2M EX RCX
TDH.MEM.PAGE.PROMOTE: {_TD}, TREE EX SEPT_TREE, PAMT_OLD EX RCX, PAMT_2M EX RCX
TDH.MEM.SEPT.RD: {_TD}, TREE SH SEPT_TREE
TDH.MEM.PAGE.REMOVE: {_TD}, TREE EX SEPT_TREE, PAMT_OLD EX RCX
TDH.MEM.SEPT.REMOVE: {_TD}, TREE EX SEPT_TREE, PAMT_OLD EX RCX
{ACCEPT}:
{ATTR}:
"""
# C: an armed entry takes the tree shared, PROMOTE takes it exclusive and no children.
_C: Final = f"""
{ARMED}: TREE SH SEPT_TREE
TDH.MEM.PAGE.PROMOTE: {_TD}, TREE EX SEPT_TREE, {_ENTRY}, PAMT_OLD EX RCX, PAMT_2M EX RCX
"""


def _parse(table: str) -> dict[str, LockSequence]:
    sequences = {}
    for line in table.strip().splitlines():
        leaf, _, locks = line.partition(":")
        steps = (words.split() for words in locks.split(",") if words.strip())
        sequences[leaf] = tuple(
            (name, mode == "EX", OPERAND[operand]) for name, mode, operand in steps
        )
    return sequences


LOCK_SEQUENCES: Final = {
    "A": _parse(_B) | _parse(_A),
    "B": _parse(_B),
    "C": _parse(_B) | _parse(_C),
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
    """Whether a write of a whole SEPT entry keeps a TDHP that was set meanwhile."""
    pending_is_not_missing: bool
    """Whether the gate lets an entry pass whose logged page is pending and raises #VE."""
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
    "A": Generation(
        "A", "1.0.x", LOCK_SEQUENCES["A"], False, False, False, False, True, True, False
    ),
    "B": Generation(
        "B", "1.5.01 to 1.5.16", LOCK_SEQUENCES["B"], True, False, False, False, False, True, False
    ),
    "C": Generation(
        "C", "1.5.20 to 1.5.34", LOCK_SEQUENCES["C"], True, True, True, True, False, False, True
    ),
}
