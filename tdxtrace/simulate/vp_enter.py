"""TDH.VP.ENTER: into the guest, past the zero-step gate, and out again.

The call goes through four instants, between which time passes: it takes the vCPU, the
TD and, for a few instructions, the epoch (``knock``); it lets go of the epoch and
passes the gate (``pass_gate``); it drops all but TDVPR and TDR (``run``); it comes out
(``leave``), or is refused on the way.

Sources: intel/tdx-module ``src/td_transitions/tdh_vp_enter.c`` (``tdh_vp_enter``,
``handle_stepping_filter``, ``emulate_ept_violation_td_exit``), ``td_exit.c
td_vmexit_to_vmm``, ``td_exit_stepping.c td_entry_stepping_filter``, ``helpers.c
check_and_associate_vcpu, adjust_tlb_tracking_state, revert_tlb_tracking_state``.
"""

from __future__ import annotations

from tdxtrace.simulate.lock_plans import ARMED
from tdxtrace.simulate.module import Module
from tdxtrace.simulate.state import NOWHERE, RUNNABLE, Call, Td, Vcpu
from tdxtrace.simulate.words import (
    EXIT_EPT_VIOLATION,
    MAPPED,
    OP_STATE_INCORRECT,
    PENDING,
    SUCCESS,
    VCPU_ASSOCIATED,
    VCPU_STATE_INCORRECT,
)

# Qualification of the exit that the module emulates: a write.
WRITE = 0x2


def knock(module: Module, call: Call, lp: int) -> int:
    """Take TDVPR, TDR, OP_STATE and the epoch, and the vCPU for logical processor ``lp``.

    Returns:
        SUCCESS, or the status the entry is refused with.
    """
    td, vcpu = _of(call)
    plan = module.generation.plans["TDH.VP.ENTER"]
    status = module.take(call, plan[:3])
    if status == SUCCESS:
        status = _associate(td, vcpu, lp)
        if status != SUCCESS:
            module.release(call)
    return status if status != SUCCESS else module.take(call, plan[3:])


def _associate(td: Td, vcpu: Vcpu, lp: int) -> int:
    if td.op_state != RUNNABLE:
        return OP_STATE_INCORRECT
    if vcpu.running:
        return VCPU_STATE_INCORRECT
    if vcpu.lp not in (NOWHERE, lp):
        return VCPU_ASSOCIATED
    if vcpu.lp == NOWHERE:
        vcpu.lp = lp
        td.n_associated += 1
    return SUCCESS


def pass_gate(module: Module, call: Call) -> int:
    """Let go of the epoch, counted in it, and pass the zero-step gate if it is armed.

    Returns:
        SUCCESS: go on, an armed entry still holding the tree; busy with operand
        SEPT_TREE: the tree was not to be had; EPT violation: a logged page would
        fault again, and this exit is emulated without entering (RCX, RDX and R8 of it
        in ``call.out_rcx``, ``out_rdx``, ``call.gpa``).
    """
    td, vcpu = _of(call)
    vcpu.epoch = td.epochs.enter()
    call.held.pop().drop(call)
    vcpu.zero_step.on_entry(vcpu.rip)
    if not vcpu.zero_step.armed:
        return SUCCESS
    call.armed = True
    status = module.take(call, module.generation.plans[ARMED])
    if status != SUCCESS:
        td.epochs.leave(vcpu.epoch)
        return status
    for page in vcpu.zero_step.pages:
        if _would_fault(module, td, page):
            module.release(call)
            td.epochs.leave(vcpu.epoch)
            call.gpa, call.out_rcx, call.out_rdx = page & -4096, WRITE, 0
            return EXIT_EPT_VIOLATION
    return SUCCESS


def _would_fault(module: Module, td: Td, page: int) -> bool:
    """Whether a read, write or fetch of a logged page would still exit (is_epf_expected)."""
    state = td.sept.mapping(page).state
    if state == PENDING and not td.pending_ve_disable:
        return not module.generation.pending_is_not_missing
    return state != MAPPED


def run(call: Call) -> None:
    """Enter the guest: only TDVPR and TDR stay held, shared, until it comes out."""
    _, vcpu = _of(call)
    vcpu.running = call.entered = True
    while len(call.held) > 2:
        call.held.pop().drop(call)


def leave(module: Module, call: Call) -> None:
    """Come out of the guest to the host: count the vCPU out, give back what is held."""
    td, vcpu = _of(call)
    vcpu.running = False
    td.epochs.leave(vcpu.epoch)
    module.release(call)


def _of(call: Call) -> tuple[Td, Vcpu]:
    assert call.td is not None
    assert call.vcpu is not None
    return call.td, call.vcpu
