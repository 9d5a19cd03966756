"""The broken rules of a run: calls that broke a rule of a correct kernel, with the evidence.

The rules are those of ``tables.truth.TRUTH_BROKEN_RULES``.  They are found from the holders of
the module's locks and from the times of the calls, not from a trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.journal import BrokenRule
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import Call

# Calls that KVM makes with mmu_lock held for writing: Linux 6.16 arch/x86/kvm/vmx/tdx.c
# tdx_sept_remove_private_spte, tdx_track (lockdep_assert_held_write).
_ZAPS: Final = frozenset({"TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE"})
# Calls that it makes with mmu_lock held for reading: kvm_tdp_mmu_map.
_INSTALLS: Final = frozenset({"TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"})
_BY_LOCK: Final = {"TDR": "tdr_busy", "TDVPR": "tdvpr_busy"}
# Locks that belong to one TD.
_OF_TD: Final = ("TDR", "TDVPR", "OP_STATE", "TREE", "ENTRY", "CHILDREN", "EPOCH")


def true_rules(run: Run) -> Iterator[BrokenRule]:
    """Yield every broken rule of a run; a call may break several rules, or one several times."""
    calls = run.journal.calls
    yield from run.journal.broken
    yield from _busy_rules(calls)
    yield from _overlaps(calls)


def _busy_rules(calls: Sequence[Call]) -> Iterator[BrokenRule]:
    finalized = _built_until(calls)
    for call in calls:
        reason = call.busy_reason
        if reason is None or not abi.is_busy(call.status) or call.td is None:
            continue
        held_by = next((holder for holder in reason.holders if isinstance(holder, Call)), None)
        if reason.resource in _BY_LOCK:
            yield BrokenRule(_BY_LOCK[reason.resource], call, held_by)
        if reason.resource in _OF_TD and call.end_ns <= finalized.get(call.td.number, -1):
            yield BrokenRule("busy_before_finalize", call, held_by)
        is_aug = call.leaf == "TDH.MEM.PAGE.AUG" and reason.resource == "ENTRY"
        if is_aug and held_by is not None and not held_by.guest:
            yield BrokenRule("aug_busy_on_entry", call, held_by)


def _built_until(calls: Iterable[Call]) -> dict[int, int]:
    """Return the time at which each TD that was built in this run was finalized."""
    return {
        call.td.number: call.end_ns
        for call in calls
        if call.leaf == "TDH.MR.FINALIZE" and call.status == abi.SUCCESS and call.td is not None
    }


def _overlaps(calls: Iterable[Call]) -> Iterator[BrokenRule]:
    """Yield pairs of calls on one TD, a zap and another zap or an install, that overlap."""
    open_calls: dict[int, list[Call]] = {}
    kept = (call for call in calls if call.leaf in _ZAPS | _INSTALLS)
    for call in sorted(kept, key=lambda c: (c.start_ns, c.end_ns)):
        assert call.td is not None
        others = open_calls.setdefault(call.td.number, [])
        others[:] = [other for other in others if other.end_ns > call.start_ns]
        for other in others:
            if call.leaf in _ZAPS or other.leaf in _ZAPS:
                yield BrokenRule("mmu_lock_excludes", call, other)
        others.append(call)
