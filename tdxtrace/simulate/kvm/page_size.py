"""Change the size of private pages: split a 2 MB page, merge small ones, or both in turn.

Sources: huge page series for TDX (Yan Zhao, RFC 2025-04-24 to v3 2026-01-06): BLOCK, TRACK,
kick, DEMOTE, under mmu_lock for writing.  PROMOTE is in no series since 2023; here it takes
the same locks, and its caller gives up after three interruptions, as the module does not limit
their number (Yan Zhao, v3).
"""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.kvm import zap
from tdxtrace.simulate.kvm.vm import PRESENT, Vm
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.thread import Thread

LARGE: Final = abi.page_bytes(1)
DEMOTE: Final = "TDH.MEM.PAGE.DEMOTE"
PROMOTE: Final = "TDH.MEM.PAGE.PROMOTE"
_SMALL_PAGES: Final = 512
_PROMOTE_CALLS: Final = 3
STOPPED: Final = (abi.INTERRUPTED_RESTARTABLE, abi.INTERRUPTED_BUSY)


def attempt(vm: Vm, thread: Thread, leaf: str, gpa: int, page: int) -> SimProcess[int]:
    """Call DEMOTE or PROMOTE once on a blocked and tracked range; an interrupt may stop it.

    Args:
        vm: The VM.
        thread: The calling thread.
        leaf: DEMOTE or PROMOTE.
        gpa: Address of the 2 MB page or range.
        page: The new Secure EPT page of DEMOTE.

    Returns:
        The status.
    """
    durations = vm.machine.durations
    work = durations.demote if leaf == DEMOTE else durations.promote
    request = vm.request(leaf, thread, (gpa, 1))
    call = vm.call(leaf, gpa, 1)
    call.page = page
    # Probability of an interrupt of the host CPU during the work of the leaf.
    chance = work.median / max(1, vm.interrupt_mean_ns)
    call.interrupt_pending = thread.random.chance(chance)
    status = yield from vm.machine.seamcall(thread, request, call, work)
    if not status & abi.ERROR_BIT:
        _set_size(vm, gpa, large=leaf == PROMOTE)
    return status


def _set_size(vm: Vm, gpa: int, large: bool) -> None:
    (vm.large_pages_at.add if large else vm.large_pages_at.discard)(gpa)
    for small in range(gpa, gpa + LARGE, LARGE // _SMALL_PAGES):
        if large:
            vm.sptes.pop(small, None)
        else:
            vm.sptes[small] = PRESENT


def split(vm: Vm, thread: Thread, gpa: int) -> SimProcess[int]:
    """Repeat DEMOTE until no interrupt stops it; returns the last status."""
    page, status = vm.new_page(), abi.ERROR_BIT
    while not vm.dead:
        status = yield from attempt(vm, thread, DEMOTE, gpa, page)
        if status not in STOPPED:
            break
        thread.now += thread.random.duration(vm.machine.durations.wrapper_turn)
    return status


def merge(vm: Vm, thread: Thread, gpa: int, hold_ns: int) -> SimProcess[None]:
    """Try to merge 512 small pages: BLOCK, TRACK, PROMOTE; UNBLOCK after three interruptions.

    mmu_lock is released before PROMOTE and after each interruption, so that the interrupting
    thread can run; vCPUs fault on the blocked range meanwhile.
    """
    if not _is_whole(vm, gpa):
        return
    if not (yield from zap.block_and_track(vm, thread, (gpa, 1), locked=True)):
        return
    for _ in range(_PROMOTE_CALLS):
        thread.now += hold_ns
        yield from vm.machine.acquire_lock(thread, vm.mmu_lock, exclusive=True)
        status = yield from attempt(vm, thread, PROMOTE, gpa, 0)
        yield from vm.machine.sync_clock(thread)
        vm.mmu_lock.release()
        if not status & abi.ERROR_BIT:
            return
    yield from zap.unblock(vm, thread, (gpa, 1), locked=True)


def _is_whole(vm: Vm, gpa: int) -> bool:
    """Return whether the range is mapped by 512 small pages."""
    small_pages = range(gpa, gpa + LARGE, LARGE // _SMALL_PAGES)
    return not vm.is_large(gpa) and all(vm.sptes.get(small) == PRESENT for small in small_pages)


def change_back_and_forth(vm: Vm, thread: Thread, gpa: int, hold_ns: int) -> SimProcess[None]:
    """Attack: block a range, wait for faults, and unblock it by DEMOTE, or by PROMOTE.

    Both leaves make the range accessible again; a host that splits and merges the same range
    endlessly observes its guest just as with RANGE.UNBLOCK.
    """
    leaf = DEMOTE if vm.is_large(gpa) else PROMOTE
    if leaf == PROMOTE and not _is_whole(vm, gpa):
        return
    if not (yield from zap.block_and_track(vm, thread, (gpa, 1), locked=False)):
        return
    thread.now += hold_ns
    page = vm.new_page()
    while not vm.dead:
        status = yield from attempt(vm, thread, leaf, gpa, page)
        if status not in STOPPED and not abi.is_busy(status):
            return
        thread.now += thread.random.duration(vm.machine.durations.wrapper_turn)
