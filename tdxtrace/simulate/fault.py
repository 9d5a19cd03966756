"""A private EPT violation in KVM: trace, map, and around again while it must be retried.

Sources: Linux 6.16 ``arch/x86/kvm/vmx/tdx.c tdx_handle_ept_violation``,
``arch/x86/kvm/mmu/tdp_mmu.c kvm_tdp_mmu_map``, ``mmu.c kvm_faultin_pfn``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tdxtrace.simulate import calls
from tdxtrace.simulate.journal import Request
from tdxtrace.simulate.machine import Asked
from tdxtrace.simulate.sept import ROOT_LEVEL, page_bytes
from tdxtrace.simulate.state import Call
from tdxtrace.simulate.threads import Thread
from tdxtrace.simulate.vm import FROZEN, PRESENT, Vm
from tdxtrace.simulate.words import ERROR_BIT, is_busy

if TYPE_CHECKING:
    from tdxtrace.simulate.vcpu import VcpuTask

# What became of a fault: RET_PF_* of Linux arch/x86/kvm/mmu/mmu_internal.h, and errors.
RETRY: Final = 1
FIXED: Final = 5
SPURIOUS: Final = 6
MEMORY_FAULT: Final = -14
BUGGED: Final = -5

# A private fault is always passed on as a write: EPT_VIOLATION_ACC_WRITE, tdx.c.
WRITE: Final = 0x2


def handle(task: VcpuTask, gpa: int, level: int) -> Asked:
    """Serve one EPT violation of a vCPU on a private page.

    ``kvm_page_fault`` is traced once, whatever follows.  Where the policy loops
    locally, the fault is tried until it is settled or an event waits for the vCPU;
    else the guest is entered again with the page still missing.

    Returns:
        RETRY, FIXED, SPURIOUS, MEMORY_FAULT or BUGGED.
    """
    vm, thread, machine = task.vm, task.thread, task.machine
    machine.note(thread, "kvm_page_fault", task.vcpu.number, gpa, WRITE)
    thread.now += thread.draws.span(machine.times.handle_fault)
    if gpa in vm.shared_pages:
        return MEMORY_FAULT
    turns = 0
    while True:
        result = yield from populate(vm, thread, gpa, level)
        if result != RETRY or not vm.policy.local_loop:
            return result
        turns += 1
        if task.has_event():
            vm.act(thread, "leave_loop", "TDH.MEM.PAGE.AUG", turns)
            return RETRY
        thread.now += thread.draws.span(machine.times.local_turn)


def populate(vm: Vm, thread: Thread, gpa: int, level: int) -> Asked:
    """Map one page as the TDP MMU does: tables from the top, then the page itself.

    Returns:
        RETRY, FIXED, SPURIOUS or BUGGED; mmu_lock is held for reading meanwhile.
    """
    yield from vm.machine.lock(thread, vm.mmu_lock, alone=False)
    result = yield from _walk_down(vm, thread, gpa, level)
    yield from vm.machine.catch_up(thread)
    vm.mmu_lock.release()
    return result


def _walk_down(vm: Vm, thread: Thread, gpa: int, level: int) -> Asked:
    if vm.dead:
        return BUGGED
    if vm.is_invalidating(gpa):
        return RETRY
    result = SPURIOUS
    for at in range(ROOT_LEVEL, level - 1, -1):
        key = (gpa & -page_bytes(at)) | at
        spte = vm.sptes.get(key)
        if spte == FROZEN:
            return RETRY
        if spte is None:
            result = yield from _install(vm, thread, key, at == level)
            if result != FIXED:
                return result
    return result


def _install(vm: Vm, thread: Thread, key: int, is_page: bool) -> Asked:
    """Freeze one mirror SPTE, make the SEAMCALL for it, and set or free it again."""
    gpa, level = key & -4096, key & 0xFFF
    leaf = "TDH.MEM.PAGE.AUG" if is_page else "TDH.MEM.SEPT.ADD"
    vm.sptes[key] = FROZEN
    page = vm.new_page(level if is_page else 0)

    def make() -> Call:
        call = vm.call(leaf, gpa, level)
        call.page = page
        return call

    status = yield from calls.install(vm, thread, _request(vm, thread, leaf, (gpa, level)), make)
    # The SPTE is set when the call is over, as every thread that looks at it then sees.
    yield from vm.machine.catch_up(thread)
    if not status & ERROR_BIT:
        vm.sptes[key] = PRESENT
        return FIXED
    del vm.sptes[key]
    return RETRY if is_busy(status) and not vm.dead else BUGGED


def _request(vm: Vm, thread: Thread, leaf: str, page: tuple[int, int]) -> Request:
    """The request this thread left busy for the same page, or a new one."""
    pending = thread.pending
    if pending is not None and pending.key == (vm.number, leaf, *page):
        return pending
    return vm.request(leaf, thread, page)
