"""Removal of private pages: block, track, kick, remove, write back.

Sources: Linux 6.16 ``arch/x86/kvm/vmx/tdx.c tdx_sept_remove_private_spte``,
``tdx_sept_zap_private_spte``, ``tdx_track``, ``tdx_sept_drop_private_spte``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.journal import RETRYABLE
from tdxtrace.simulate.kvm import retries
from tdxtrace.simulate.kvm.vm import FROZEN, NO_PAGE, PRESENT, Vm
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.thread import Thread

# Pages zapped before mmu_lock is released briefly: tdp_mmu_iter_cond_resched, here by count
# since the model has no need_resched.
_BATCH: Final = 16


def zap_range(vm: Vm, thread: Thread, pages: Sequence[int], level: int = 0) -> SimProcess[None]:
    """Invalidate a range and remove every mapped private page in it.

    Args:
        vm: The VM.
        thread: The calling thread: of a vCPU, or another thread of the VMM.
        pages: Addresses of guest pages, ascending.
        level: Their size.
    """
    if not pages:
        return
    machine, exclusive = vm.machine, not vm.policy.zaps_shared
    covered = (pages[0], pages[-1] + (1 << 12 + 9 * level))
    yield from machine.acquire_lock(thread, vm.mmu_lock, exclusive=exclusive)
    vm.invalidating.append(covered)
    for done, gpa in enumerate(pages, 1):
        if vm.dead:
            break
        if vm.sptes.get(gpa | level) == PRESENT:
            yield from remove_page(vm, thread, gpa, level)
        if done % _BATCH == 0 and done < len(pages):
            yield from machine.sync_clock(thread)
            vm.mmu_lock.release()
            yield from machine.acquire_lock(thread, vm.mmu_lock, exclusive=exclusive)
    yield from machine.sync_clock(thread)
    vm.invalidating.remove(covered)
    vm.mmu_lock.release()


def remove_page(vm: Vm, thread: Thread, gpa: int, level: int) -> SimProcess[int]:
    """Remove one private page, mmu_lock held; returns 0 or the failing status."""
    durations, random = vm.machine.durations, thread.random
    # With the lock held for reading, a zap freezes the SPTE first, as a fault does.
    vm.sptes[gpa | level] = FROZEN
    status = yield from retries.zap_call(vm, thread, "TDH.MEM.RANGE.BLOCK", gpa, level)
    if not status & abi.ERROR_BIT:
        status = yield from track(vm, thread)
    if not status & abi.ERROR_BIT:
        page = vm.td.sept.entry(gpa, level).page
        thread.now += random.duration(durations.zap_step)
        status = yield from retries.zap_call(vm, thread, "TDH.MEM.PAGE.REMOVE", gpa, level)
    if status & abi.ERROR_BIT:
        vm.sptes[gpa | level] = PRESENT
        return status
    del vm.sptes[gpa | level]
    if level:
        vm.large_pages_at.discard(gpa)
    yield from write_back(vm, thread, page)
    return 0


def track(vm: Vm, thread: Thread) -> SimProcess[int]:
    """Call TRACK, and if it succeeds kick, so that every vCPU continues in the new epoch."""
    thread.now += thread.random.duration(vm.machine.durations.zap_step)
    status = yield from retries.zap_call(vm, thread, "TDH.MEM.TRACK")
    if not status & abi.ERROR_BIT:
        journal = vm.machine.journal
        journal.epochs.append((thread.now, vm.number, vm.td.epochs.current))
        yield from vm.kick(thread)
    return status


def write_back(vm: Vm, thread: Thread, page: int) -> SimProcess[None]:
    """Call PHYMEM.PAGE.WBINVD for a page that was private, then clear the page.

    The v1 series repeats a busy call without limit; later kernels do not expect one.
    """
    request = vm.request("TDH.PHYMEM.PAGE.WBINVD", thread)
    status = abi.OPERAND_BUSY
    while abi.is_busy(status) and not vm.dead:
        call = vm.call("TDH.PHYMEM.PAGE.WBINVD")
        call.page, call.operand = page, vm.hkid
        thread.now += thread.random.duration(vm.machine.durations.zap_step)
        status = yield from vm.machine.seamcall(thread, request, call, vm.machine.durations.wbinvd)
        if abi.is_busy(status) and not vm.policy.exactly_sept:
            vm.kvm_bug_on(thread, call.leaf, status)
    thread.now += thread.random.duration(vm.machine.durations.clear_page)


def block_and_unblock(
    vm: Vm, thread: Thread, page: tuple[int, int], hold_ns: int, locked: bool
) -> SimProcess[None]:
    """Block a page, wait for the fault, unblock it: an attack, or a migration.

    No busy policy applies: each call is repeated until it is not busy, with a kick if TRACK waits
    for vCPUs.  Stops if another thread changed the page before.

    Args:
        vm: The VM.
        thread: The calling thread.
        page: Address and level of the page.
        hold_ns: Time for which the page stays blocked.
        locked: Whether mmu_lock is held for writing during the calls, as KVM does for zaps, but
            not while the page stays blocked.
    """
    if (yield from block_and_track(vm, thread, page, locked)):
        thread.now += hold_ns
        yield from unblock(vm, thread, page, locked)


def block_and_track(
    vm: Vm, thread: Thread, page: tuple[int, int], locked: bool
) -> SimProcess[bool]:
    """BLOCK and TRACK a page, and kick every vCPU; returns whether the page is blocked."""
    if locked:
        yield from vm.machine.acquire_lock(thread, vm.mmu_lock, exclusive=True)
    is_blocked = (
        yield from _call_endlessly(vm, thread, "TDH.MEM.RANGE.BLOCK", page)
    ) == abi.SUCCESS
    if is_blocked:
        yield from _call_endlessly(vm, thread, "TDH.MEM.TRACK", NO_PAGE)
        vm.machine.journal.epochs.append((thread.now, vm.number, vm.td.epochs.current))
        yield from vm.kick(thread)
    if locked:
        yield from vm.machine.sync_clock(thread)
        vm.mmu_lock.release()
    return is_blocked


def unblock(vm: Vm, thread: Thread, page: tuple[int, int], locked: bool) -> SimProcess[None]:
    """UNBLOCK a page."""
    if locked:
        yield from vm.machine.acquire_lock(thread, vm.mmu_lock, exclusive=True)
    yield from _call_endlessly(vm, thread, "TDH.MEM.RANGE.UNBLOCK", page)
    if locked:
        yield from vm.machine.sync_clock(thread)
        vm.mmu_lock.release()


def _call_endlessly(vm: Vm, thread: Thread, leaf: str, page: tuple[int, int]) -> SimProcess[int]:
    """Repeat a call until it is not busy; kick every vCPU if TRACK waits for one."""
    durations = vm.machine.durations
    request = vm.request(leaf, thread, page)
    work = durations.track if leaf == "TDH.MEM.TRACK" else durations.block
    status = abi.OPERAND_BUSY
    while status & abi.HIGH_HALF in RETRYABLE and not vm.dead:
        call = vm.call(leaf, *page) if page != NO_PAGE else vm.call(leaf)
        status = yield from vm.machine.seamcall(thread, request, call, work)
        thread.now += thread.random.duration(durations.wrapper_turn)
        if status == abi.PREVIOUS_TLB_EPOCH_BUSY:
            retries.blame_previous_epoch(vm, request)
            yield from vm.kick(thread)
    return status
