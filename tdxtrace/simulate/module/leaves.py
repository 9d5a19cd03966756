"""Preconditions and effects of each leaf on the module's state.

Sources: intel/tdx-module ``src/vmm_dispatcher/api_calls/tdh_*.c``, the function named after the
leaf; states and tracking by ``sept_manager.c`` and ``helpers.h is_tlb_tracked``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import (
    BLOCKED_STATE,
    INITIALIZED,
    NOWHERE,
    RUNNABLE,
    TRACKED_STATES,
    UNBLOCKED_STATE,
    Call,
    SeptEntry,
    Td,
)

_RCX: Final = abi.OPERAND["RCX"]


def check(call: Call) -> int:
    """Check that the state allows ``call``, which holds its locks; returns SUCCESS or a status."""
    leaf_check = _CHECKS.get(call.leaf)
    return abi.SUCCESS if leaf_check is None else leaf_check(call)


def commit(call: Call) -> int:
    """Apply the effect of ``call``; returns its final status."""
    leaf_commit = _COMMITS.get(call.leaf)
    return abi.SUCCESS if leaf_commit is None else leaf_commit(call)


def pamt_page(resource: str, call: Call) -> tuple[int, int]:
    """Return the physical page and level of a PAMT lock of ``call``.

    PAMT_RANGE is the 2 MB range of its page; PAMT_PAGE_2 and so on are its further pages.
    """
    if resource == "PAMT_RANGE":
        return call.page, 1
    if resource.startswith("PAMT_PAGE_"):
        return call.further_pages[int(resource.removeprefix("PAMT_PAGE_")) - 2], 0
    if resource == "PAMT_NEW" or call.entry is None:
        return call.page, call.level if call.leaf == "TDH.MEM.PAGE.AUG" else 0
    if resource == "PAMT_2M":
        return _large_page(call), 1
    return call.entry.page, call.level if call.leaf == "TDH.MEM.PAGE.REMOVE" else 0


def _large_page(call: Call) -> int:
    """Return the 2 MB page of DEMOTE (of the entry) or PROMOTE (in the table of the entry)."""
    entry, td = _operands(call)
    if call.leaf == "TDH.MEM.PAGE.DEMOTE":
        return entry.page
    return td.sept.entry(entry.gpa, 0).page


def _operands(call: Call) -> tuple[SeptEntry, Td]:
    assert call.entry is not None
    assert call.td is not None
    return call.entry, call.td


def _state_is(*allowed: int) -> Callable[[Call], int]:
    def check_call(call: Call) -> int:
        entry, _ = _operands(call)
        return abi.SUCCESS if entry.state in allowed else abi.EPT_ENTRY_STATE_INCORRECT | _RCX

    return check_call


def _check_aug(call: Call) -> int:
    entry, td = _operands(call)
    if td.op_state not in TRACKED_STATES:
        return abi.OP_STATE_INCORRECT
    return abi.SUCCESS if entry.state == abi.FREE else abi.EPT_ENTRY_STATE_INCORRECT | _RCX


def _check_block(call: Call) -> int:
    entry, _ = _operands(call)
    if entry.state in UNBLOCKED_STATE:
        return abi.GPA_RANGE_ALREADY_BLOCKED | _RCX
    return abi.SUCCESS if entry.state in BLOCKED_STATE else abi.EPT_ENTRY_STATE_INCORRECT | _RCX


def _blocked_and_tracked(*allowed: int) -> Callable[[Call], int]:
    """Return a check that the entry is in one of these blocked states, and that it is tracked."""

    def check_call(call: Call) -> int:
        entry, td = _operands(call)
        if entry.state not in UNBLOCKED_STATE:
            return abi.GPA_RANGE_NOT_BLOCKED | _RCX
        if entry.state not in allowed:
            return abi.EPT_ENTRY_STATE_INCORRECT | _RCX
        if td.op_state in TRACKED_STATES and not td.epochs.is_tracked(entry.blocked_in):
            return abi.TLB_TRACKING_NOT_DONE | _RCX
        return abi.SUCCESS

    return check_call


def _check_demote(call: Call) -> int:
    """Check the state for DEMOTE; for a page that is not blocked, TLB_TRACKING_NOT_DONE.

    As on a real host whose BLOCK was busy: canonical/tdx issue 213, SEAMCALL (0x0f) failed:
    0xc0000b0800000001.
    """
    entry, _ = _operands(call)
    if entry.state not in UNBLOCKED_STATE:
        return abi.TLB_TRACKING_NOT_DONE | _RCX
    return _blocked_and_tracked(abi.BLOCKED)(call)


def _check_flush(call: Call) -> int:
    assert call.vcpu is not None
    return abi.VCPU_NOT_ASSOCIATED if call.vcpu.lp == NOWHERE else abi.SUCCESS


def _install(state: int) -> Callable[[Call], int]:
    def commit_call(call: Call) -> int:
        entry, _ = _operands(call)
        entry.state, entry.page = state, call.page
        return abi.SUCCESS

    return commit_call


def _block(call: Call) -> int:
    entry, td = _operands(call)
    entry.state = BLOCKED_STATE[entry.state]
    entry.blocked_in, entry.blocked_by = td.epochs.current, call
    return abi.SUCCESS


def _unblock(call: Call) -> int:
    entry, _ = _operands(call)
    entry.state = UNBLOCKED_STATE[entry.state]
    return abi.SUCCESS


def _free(call: Call) -> int:
    entry, _ = _operands(call)
    entry.state, entry.page = abi.FREE, 0
    return abi.SUCCESS


def _track(call: Call) -> int:
    assert call.td is not None
    return abi.SUCCESS if call.td.epochs.advance() else abi.PREVIOUS_TLB_EPOCH_BUSY


def _demote(call: Call) -> int:
    entry, td = _operands(call)
    large = entry.page
    entry.state, entry.page = abi.NL_MAPPED, call.page
    for i, child in enumerate(td.sept.children(entry)):
        child.state, child.page = abi.MAPPED, large + (i << 12)
    return abi.SUCCESS


def _promote(call: Call) -> int:
    entry, td = _operands(call)
    children = td.sept.children(entry)
    entry.state, entry.page = abi.MAPPED, children[0].page
    for child in children:
        child.state, child.page = abi.FREE, 0
    return abi.SUCCESS


def _set_op_state(state: int) -> Callable[[Call], int]:
    def commit_call(call: Call) -> int:
        assert call.td is not None
        call.td.op_state = state
        return abi.SUCCESS

    return commit_call


def _flush(call: Call) -> int:
    assert call.vcpu is not None
    call.vcpu.lp = NOWHERE
    call.vcpu.td.n_associated -= 1
    return abi.SUCCESS


_CHECKS: Final[dict[str, Callable[[Call], int]]] = {
    "TDH.MEM.SEPT.ADD": _state_is(abi.FREE),
    "TDH.MEM.PAGE.ADD": _state_is(abi.FREE),
    "TDH.MEM.PAGE.AUG": _check_aug,
    "TDH.MEM.RANGE.BLOCK": _check_block,
    "TDH.MEM.RANGE.UNBLOCK": _blocked_and_tracked(abi.BLOCKED, abi.PENDING_BLOCKED, abi.NL_BLOCKED),
    "TDH.MEM.PAGE.REMOVE": _blocked_and_tracked(abi.BLOCKED, abi.PENDING_BLOCKED),
    "TDH.MEM.SEPT.REMOVE": _blocked_and_tracked(abi.NL_BLOCKED),
    "TDH.MEM.PAGE.DEMOTE": _check_demote,
    "TDH.MEM.PAGE.PROMOTE": _blocked_and_tracked(abi.NL_BLOCKED),
    "TDH.VP.FLUSH": _check_flush,
}
_COMMITS: Final[dict[str, Callable[[Call], int]]] = {
    "TDH.MEM.SEPT.ADD": _install(abi.NL_MAPPED),
    "TDH.MEM.PAGE.ADD": _install(abi.MAPPED),
    "TDH.MEM.PAGE.AUG": _install(abi.PENDING),
    "TDH.MEM.RANGE.BLOCK": _block,
    "TDH.MEM.RANGE.UNBLOCK": _unblock,
    "TDH.MEM.PAGE.REMOVE": _free,
    "TDH.MEM.SEPT.REMOVE": _free,
    "TDH.MEM.TRACK": _track,
    "TDH.MEM.PAGE.DEMOTE": _demote,
    "TDH.MEM.PAGE.PROMOTE": _promote,
    "TDH.MNG.INIT": _set_op_state(INITIALIZED),
    "TDH.MR.FINALIZE": _set_op_state(RUNNABLE),
    "TDH.VP.FLUSH": _flush,
}
