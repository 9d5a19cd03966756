"""TDH.VP.ENTER: locks, zero-step gate, guest entry and exit.

The call is made in four steps: it locks the vCPU, the TD and, for a few instructions, the epoch
(``acquire_entry_locks``); it releases the epoch and passes the zero-step gate
(``pass_zero_step_gate``); it releases all locks but TDVPR and TDR (``enter_guest``); it exits
(``exit_guest``).  The first two steps may refuse the entry.

Sources: intel/tdx-module ``src/td_transitions/tdh_vp_enter.c`` (``tdh_vp_enter``,
``handle_stepping_filter``, ``emulate_ept_violation_td_exit``), ``td_exit.c
td_vmexit_to_vmm``, ``td_exit_stepping.c td_entry_stepping_filter``, ``helpers.c
check_and_associate_vcpu, adjust_tlb_tracking_state, revert_tlb_tracking_state``.
"""

from __future__ import annotations

from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.dispatcher import Module
from tdxtrace.simulate.module.generations import ARMED
from tdxtrace.simulate.module.state import NOWHERE, RUNNABLE, Call, Td, Vcpu

# Exit qualification that the module emulates: a write.
_WRITE = 0x2


def acquire_entry_locks(module: Module, call: Call, lp: int) -> int:
    """Acquire TDVPR, TDR, OP_STATE and the epoch; associate the vCPU with CPU ``lp``.

    Returns:
        SUCCESS, or the status that refuses the entry.
    """
    td, vcpu = _td_and_vcpu(call)
    sequence = module.generation.lock_sequences["TDH.VP.ENTER"]
    status = module.acquire(call, sequence[:3])
    if status == abi.SUCCESS:
        status = _associate(td, vcpu, lp)
        if status != abi.SUCCESS:
            module.release(call)
    return status if status != abi.SUCCESS else module.acquire(call, sequence[3:])


def _associate(td: Td, vcpu: Vcpu, lp: int) -> int:
    if td.op_state != RUNNABLE:
        return abi.OP_STATE_INCORRECT
    if vcpu.running:
        return abi.VCPU_STATE_INCORRECT
    if vcpu.lp not in (NOWHERE, lp):
        return abi.VCPU_ASSOCIATED
    if vcpu.lp == NOWHERE:
        vcpu.lp = lp
        td.n_associated += 1
    return abi.SUCCESS


def pass_zero_step_gate(module: Module, call: Call) -> int:
    """Count the vCPU in its epoch, release the epoch, pass the zero-step gate if it is armed.

    Returns:
        SUCCESS; an armed entry then still holds the tree.  OPERAND_BUSY with operand SEPT_TREE if
        the tree was locked.  An EPT violation if a logged page would fault again: that exit is
        emulated without entering (its RCX, RDX and R8 are in ``call.out_rcx``, ``out_rdx``,
        ``call.gpa``).
    """
    td, vcpu = _td_and_vcpu(call)
    vcpu.epoch = td.epochs.enter()
    call.locks_held.pop().release(call)
    vcpu.zero_step.on_entry(vcpu.rip)
    if not vcpu.zero_step.armed:
        return abi.SUCCESS
    call.armed = True
    status = module.acquire(call, module.generation.lock_sequences[ARMED])
    if status != abi.SUCCESS:
        td.epochs.leave(vcpu.epoch)
        return status
    for page in vcpu.zero_step.pages:
        if _would_fault(module, td, page):
            module.release(call)
            td.epochs.leave(vcpu.epoch)
            call.gpa, call.out_rcx, call.out_rdx = page & -4096, _WRITE, 0
            return abi.EXIT_EPT_VIOLATION
    return abi.SUCCESS


def _would_fault(module: Module, td: Td, page: int) -> bool:
    """Return whether an access to a logged page would still cause an exit (is_epf_expected)."""
    state = td.sept.mapping(page).state
    if state == abi.PENDING and not td.pending_ve_disable:
        return not module.generation.pending_is_not_missing
    return state != abi.MAPPED


def enter_guest(call: Call) -> None:
    """Enter the guest: only TDVPR and TDR stay locked, shared, until the exit."""
    _, vcpu = _td_and_vcpu(call)
    vcpu.running = call.entered = True
    while len(call.locks_held) > 2:
        call.locks_held.pop().release(call)


def exit_guest(module: Module, call: Call) -> None:
    """Exit to the host: remove the vCPU from its epoch's count, release its locks."""
    td, vcpu = _td_and_vcpu(call)
    vcpu.running = False
    td.epochs.leave(vcpu.epoch)
    module.release(call)


def _td_and_vcpu(call: Call) -> tuple[Td, Vcpu]:
    assert call.td is not None
    assert call.vcpu is not None
    return call.td, call.vcpu
