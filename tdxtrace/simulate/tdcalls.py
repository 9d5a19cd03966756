"""TDCALLs that hold a lock: TDG.MEM.PAGE.ACCEPT and ATTR, and what a host does to them.

Sources: intel/tdx-module ``src/td_dispatcher/vm_exits/tdg_mem_page_accept.c``,
``tdg_mem_page_attr_rd.c``, ``tdx_td_dispatcher.c td_call`` (rewriting of
OPERAND_BUSY_HOST_PRIORITY, the timeout), ``td_exit.c async_tdexit_internal``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tdxtrace.simulate import lock_plans
from tdxtrace.simulate.state import Call
from tdxtrace.simulate.steps import ACCEPT, Exit, Frame, Guest
from tdxtrace.simulate.words import (
    EXIT_EPT_VIOLATION,
    HIGH_HALF,
    HOST_PRIORITY_BUSY,
    HOST_PRIORITY_BUSY_TIMEOUT,
    MAPPED,
    NL_BLOCKED,
    NL_MAPPED,
    PENDING,
    SUCCESS,
)

if TYPE_CHECKING:
    from tdxtrace.simulate.guest_cpu import GuestCpu

# Extended exit qualification of a violation that ACCEPT makes: type 1 in bits 3:0, then
# the level asked for (34:32), where the walk ended (37:35) and the entry's state (45:38):
# TDX module ABI, TDH.VP.ENTER output operands; from memory, no public capture shows one.
_BY_ACCEPT: Final = 1
_WRITE: Final = 2
_PAGES_2M: Final = 512


def tdcall(guest: GuestCpu, frame: Frame) -> Guest:
    """Execute one TDCALL on a Secure EPT entry; done, to be repeated, or an exit."""
    task = guest.task
    gpa = frame.step[1]
    level = frame.step[2] if frame.step[0] == ACCEPT else 0
    guest.passes_filter(frame.rip)
    lead, guest.lead_ns = guest.lead_ns, 0
    yield task.machine.env.timeout(lead + task.draws.span(task.times.tdcall))
    entry = task.vm.td.sept.walk(gpa, level)
    if frame.step[0] == ACCEPT:
        if entry.level > level and entry.state == MAPPED:
            return _next(guest, frame)
        if entry.level > level:
            return _violation(guest, frame, (level, entry.level, entry.state))
        if entry.state in (NL_MAPPED, NL_BLOCKED):
            _in_small_pages(guest, frame)
            return None
    call = Call(lock_plans.ACCEPT if frame.step[0] == ACCEPT else lock_plans.ATTR, task.thread)
    call.td, call.vcpu, call.gpa, call.entry, call.guest = task.vm.td, task.vcpu, gpa, entry, True
    call.start_ns = int(task.machine.env.now)
    module = task.machine.module
    status = module.take(call, module.generation.plans[call.leaf])
    if status != SUCCESS:
        return (yield from _refused(guest, status))
    task.vcpu.hp_busy_since = None
    holding = _accept if frame.step[0] == ACCEPT else _attr
    return (yield from holding(guest, frame, call))


def _attr(guest: GuestCpu, frame: Frame, call: Call) -> Guest:
    task = guest.task
    yield task.machine.env.timeout(task.draws.span(task.times.attr))
    task.machine.module.release(call)
    frame.done += 1
    return _next(guest, frame) if frame.done >= frame.step[2] else None


def _accept(guest: GuestCpu, frame: Frame, call: Call) -> Guest:
    module, entry, level = guest.task.machine.module, call.entry, frame.step[2]
    assert entry is not None
    if entry.state not in (PENDING, MAPPED):
        module.release(call)
        return _violation(guest, frame, (level, level, entry.state))
    if entry.state == PENDING:
        n_pages = _PAGES_2M if level else 1
        yield from _zero(guest, frame, n_pages)
        if frame.done >= n_pages:
            entry.state = MAPPED
        if not module.generation.entry_writes_keep_priority:
            entry.host_priority = False
    module.release(call)
    return _next(guest, frame) if entry.state == MAPPED else None


def _in_small_pages(guest: GuestCpu, frame: Frame) -> None:
    """PAGE_SIZE_MISMATCH: the guest accepts the 512 small pages instead."""
    guest.pop()
    for i in reversed(range(_PAGES_2M)):
        guest.push((ACCEPT, frame.step[1] + (i << 12), 0))


def _next(guest: GuestCpu, frame: Frame) -> Exit | None:
    assert guest.frames[-1] is frame
    guest.pop()
    return None


def _zero(guest: GuestCpu, frame: Frame, n_pages: int) -> Guest:
    """Zero the pages, the entry held; a 2 MB page stops after the 4 KB where an event came."""
    task, env = guest.task, guest.task.machine.env
    each = task.draws.span(task.times.zero_page)
    while frame.done < n_pages:
        # As many as fit before the next interrupt, at least one; a kick comes in between.
        ahead = max(1, (guest.next_interrupt - int(env.now)) // max(1, each))
        chunk = min(n_pages - frame.done, ahead)
        took = yield from guest.elapse(chunk * each, masked=chunk == 1)
        if took < chunk * each:
            chunk = took // each + 1
            yield env.timeout(chunk * each - took)
        frame.done += chunk
        if guest.kicked or guest.next_interrupt <= env.now:
            break
    return None


def _refused(guest: GuestCpu, status: int) -> Guest:
    """OPERAND_BUSY, for the guest to see; too long for a host, and the TD exits."""
    vcpu, env = guest.task.vcpu, guest.task.machine.env
    if status & HIGH_HALF != HOST_PRIORITY_BUSY:
        vcpu.hp_busy_since = None
    elif vcpu.hp_busy_since is None:
        vcpu.hp_busy_since = int(env.now)
    elif env.now - vcpu.hp_busy_since >= guest.task.machine.hp_timeout_ns:
        vcpu.hp_busy_since = None
        guest.passes_filter(vcpu.rip + 4)
        return Exit(HOST_PRIORITY_BUSY_TIMEOUT)
    yield from guest.elapse(guest.task.draws.span(guest.task.times.guest_pause))
    return None


def _violation(guest: GuestCpu, frame: Frame, walk: tuple[int, int, int]) -> Exit:
    """A violation that ACCEPT finds by itself: exits as a write, and counts only in A."""
    wanted, ended, state = walk
    extended = _BY_ACCEPT | wanted << 32 | ended << 35 | (state & 0xFF) << 38
    gpa = frame.step[1]
    guest.task.vcpu.hp_busy_since = None
    if guest.task.machine.module.generation.counts_every_violation:
        guest.count_fault(gpa)
    return Exit(EXIT_EPT_VIOLATION, _WRITE, extended, gpa)
