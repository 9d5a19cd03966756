"""How KVM takes private pages away: block, track, kick, remove, and write back.

Sources: Linux 6.16 ``arch/x86/kvm/vmx/tdx.c tdx_sept_remove_private_spte``,
``tdx_sept_zap_private_spte``, ``tdx_track``, ``tdx_sept_drop_private_spte``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tdxtrace.simulate import calls
from tdxtrace.simulate.journal import UNSETTLED
from tdxtrace.simulate.machine import Asked, Steps
from tdxtrace.simulate.threads import Thread
from tdxtrace.simulate.vm import NO_PAGE, PRESENT, Vm
from tdxtrace.simulate.words import (
    ERROR_BIT,
    HIGH_HALF,
    OPERAND_BUSY,
    PREVIOUS_TLB_EPOCH_BUSY,
    SUCCESS,
)

# Pages zapped under one hold of mmu_lock before it is offered to others:
# tdp_mmu_iter_cond_resched, here by count since the model has no need_resched for it.
_BATCH: Final = 16


def zap(vm: Vm, thread: Thread, pages: Sequence[int], level: int = 0) -> Steps:
    """Invalidate a range and remove every private page of it that is mapped.

    Args:
        vm: Whose pages.
        thread: Who does it: a vCPU's thread in userspace's place, or another.
        pages: Guest pages in ascending order.
        level: Their size.
    """
    if not pages:
        return
    machine = vm.machine
    covered = (pages[0], pages[-1] + (1 << 12 + 9 * level))
    yield from machine.lock(thread, vm.mmu_lock, alone=True)
    vm.invalidating.append(covered)
    for done, gpa in enumerate(pages, 1):
        if vm.dead:
            break
        if vm.sptes.get(gpa | level) == PRESENT:
            yield from remove_page(vm, thread, gpa, level)
        if done % _BATCH == 0 and done < len(pages):
            yield from machine.catch_up(thread)
            vm.mmu_lock.release()
            yield from machine.lock(thread, vm.mmu_lock, alone=True)
    yield from machine.catch_up(thread)
    vm.invalidating.remove(covered)
    vm.mmu_lock.release()


def remove_page(vm: Vm, thread: Thread, gpa: int, level: int) -> Asked:
    """Remove one private page, mmu_lock held for writing; returns 0, or the status it failed by."""
    times, draws = vm.machine.times, thread.draws
    status = yield from calls.change(vm, thread, "TDH.MEM.RANGE.BLOCK", gpa, level)
    if not status & ERROR_BIT:
        status = yield from track(vm, thread)
    if not status & ERROR_BIT:
        page = vm.td.sept.entry(gpa, level).page
        thread.now += draws.span(times.zap_step)
        status = yield from calls.change(vm, thread, "TDH.MEM.PAGE.REMOVE", gpa, level)
    if status & ERROR_BIT:
        return status
    del vm.sptes[gpa | level]
    yield from write_back(vm, thread, page)
    return 0


def track(vm: Vm, thread: Thread) -> Asked:
    """TRACK, and if it succeeds a kick: every vCPU goes on in the new epoch."""
    thread.now += thread.draws.span(vm.machine.times.zap_step)
    status = yield from calls.change(vm, thread, "TDH.MEM.TRACK")
    if not status & ERROR_BIT:
        journal = vm.machine.journal
        journal.epochs.append((thread.now, vm.number, vm.td.epochs.current))
        yield from vm.kick(thread)
    return status


def write_back(vm: Vm, thread: Thread, page: int) -> Steps:
    """PHYMEM.PAGE.WBINVD of a page that was private, and its clearing."""
    request = vm.request("TDH.PHYMEM.PAGE.WBINVD", thread)
    call = vm.call("TDH.PHYMEM.PAGE.WBINVD")
    call.page, call.operand = page, vm.hkid
    thread.now += thread.draws.span(vm.machine.times.zap_step)
    yield from vm.machine.attempt(thread, request, call, vm.machine.times.wbinvd)
    thread.now += thread.draws.span(vm.machine.times.clear_page)


def block_and_unblock(vm: Vm, thread: Thread, gpa: int, hold_ns: int) -> Steps:
    """What a hostile host does to watch a page: block it, wait for the fault, unblock it.

    It goes by no policy but its own: each call until it is not busy, a kick where TRACK
    wants vCPUs out, and no harm if another of its threads was there first.
    """
    times = vm.machine.times
    for leaf, work in (
        ("TDH.MEM.RANGE.BLOCK", times.block),
        ("TDH.MEM.TRACK", times.track),
        ("TDH.MEM.RANGE.UNBLOCK", times.block),
    ):
        page = NO_PAGE if leaf == "TDH.MEM.TRACK" else (gpa, 0)
        request = vm.request(leaf, thread, page)
        status = OPERAND_BUSY
        while status & HIGH_HALF in UNSETTLED and not vm.dead:
            call = vm.call(leaf, gpa) if page != NO_PAGE else vm.call(leaf)
            status = yield from vm.machine.attempt(thread, request, call, work)
            thread.now += thread.draws.span(times.wrapper_turn)
            if status == PREVIOUS_TLB_EPOCH_BUSY:
                calls.name_laggards(vm, request)
                yield from vm.kick(thread)
        if leaf == "TDH.MEM.TRACK":
            vm.machine.journal.epochs.append((thread.now, vm.number, vm.td.epochs.current))
            yield from vm.kick(thread)
            thread.now += hold_ns
        elif status != SUCCESS:
            return
