"""A private EPT violation in KVM: trace it, map the page, retry if the policy has a loop.

Sources: Linux 6.16 ``arch/x86/kvm/vmx/tdx.c tdx_handle_ept_violation``,
``arch/x86/kvm/mmu/tdp_mmu.c kvm_tdp_mmu_map``, ``mmu.c kvm_faultin_pfn``.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.host.vcpu_state import VcpuState
from tdxtrace.simulate.kvm import retries
from tdxtrace.simulate.kvm.vm import FROZEN, PRESENT, Vm
from tdxtrace.simulate.module.abi import ERROR_BIT, ROOT_LEVEL, is_busy, page_bytes
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.thread import Thread

# Result of a fault: RET_PF_* of Linux arch/x86/kvm/mmu/mmu_internal.h, and errors.
RETRY: Final = 1
FIXED: Final = 5
SPURIOUS: Final = 6
MEMORY_FAULT: Final = -14
BUGGED: Final = -5

# A private fault is always handled as a write: EPT_VIOLATION_ACC_WRITE, tdx.c.
WRITE: Final = 0x2


def handle(vm: Vm, vcpu: VcpuState, gpa: int, level: int) -> SimProcess[int]:
    """Handle one EPT violation of a vCPU on a private page.

    ``kvm_page_fault`` is traced exactly once.  With a local loop the fault is retried until it is
    resolved or an event is pending for the vCPU; without, the guest is entered again with the
    page still missing.

    Returns:
        RETRY, FIXED, SPURIOUS, MEMORY_FAULT or BUGGED.
    """
    thread, machine = vcpu.thread, vcpu.machine
    vm.last_fault_gpa = gpa
    machine.log_event(thread, "kvm_page_fault", vcpu.vcpu.number, gpa, WRITE)
    thread.now += thread.random.duration(machine.durations.handle_fault)
    if gpa in vm.shared_pages:
        return MEMORY_FAULT
    yield from vm.prepare_fault(thread)
    turns = 0
    while True:
        result = yield from populate(vm, thread, gpa, level)
        if result != RETRY or not vm.policy.local_loop:
            return result
        turns += 1
        if vcpu.has_event():
            vm.log_action(thread, "leave_loop", "TDH.MEM.PAGE.AUG", turns)
            return RETRY
        thread.now += thread.random.duration(machine.durations.local_turn)


def populate(vm: Vm, thread: Thread, gpa: int, level: int) -> SimProcess[int]:
    """Map one page as the TDP MMU does, mmu_lock held for reading: tables first, then the page.

    Returns:
        RETRY, FIXED, SPURIOUS or BUGGED.
    """
    yield from vm.machine.acquire_lock(thread, vm.mmu_lock, exclusive=False)
    result = yield from _map_levels(vm, thread, gpa, level)
    yield from vm.machine.sync_clock(thread)
    vm.mmu_lock.release()
    return result


def _map_levels(vm: Vm, thread: Thread, gpa: int, level: int) -> SimProcess[int]:
    if vm.dead:
        return BUGGED
    if vm.is_invalidating(gpa):
        thread.retry_reason = "invalidating"
        return RETRY
    result = SPURIOUS
    for at in range(ROOT_LEVEL, level - 1, -1):
        key = (gpa & -page_bytes(at)) | at
        spte = vm.sptes.get(key)
        if spte == FROZEN:
            thread.retry_reason = "frozen"
            return RETRY
        if at == 1 and spte is not None and vm.is_large(gpa):
            return SPURIOUS
        if spte is None:
            result = yield from _install(vm, thread, key, at == level)
            if result != FIXED:
                return result
    return result


def _install(vm: Vm, thread: Thread, key: int, is_page: bool) -> SimProcess[int]:
    """Freeze one mirror SPTE, make the SEAMCALL for it, then set or clear it."""
    gpa, level = key & -4096, key & 0xFFF
    leaf = "TDH.MEM.PAGE.AUG" if is_page else "TDH.MEM.SEPT.ADD"
    vm.sptes[key] = FROZEN
    page = vm.new_page(level if is_page else 0)

    def make_call() -> Call:
        call = vm.call(leaf, gpa, level)
        call.page = page
        return call

    request = vm.request(leaf, thread, (gpa, level))
    status = yield from retries.install(vm, thread, request, make_call)
    # The change of the SPTE is visible to other threads when the call has returned.
    yield from vm.machine.sync_clock(thread)
    if not status & ERROR_BIT:
        vm.sptes[key] = PRESENT
        if is_page and level:
            vm.large_pages_at.add(gpa)
        return FIXED
    del vm.sptes[key]
    thread.retry_reason = "busy"
    return RETRY if is_busy(status) and not vm.dead else BUGGED
