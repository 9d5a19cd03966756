"""Run a guest from VM entry to VM exit: its steps, and its TDCALLs that hold locks.

Sources: intel/tdx-module ``src/td_dispatcher/vm_exits/tdg_mem_page_accept.c``,
``tdg_mem_page_attr_rd.c``, ``tdx_td_dispatcher.c td_call`` (rewriting of
OPERAND_BUSY_HOST_PRIORITY, the timeout), ``td_exit.c async_tdexit_internal``.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.guest.cpu import GuestCpu
from tdxtrace.simulate.guest.programs import ACCEPT, ATTR, REPEAT, RUN, TOUCH, VMCALL, Frame, VmExit
from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.journal import BrokenRule
from tdxtrace.simulate.module import abi, generations
from tdxtrace.simulate.module.state import Call, SeptEntry

# Extended exit qualification of an EPT violation, type in bits 3:0: 6 is a pending page
# (Linux 6.16 arch/x86/kvm/vmx/tdx.h, EXT_EXIT_QUAL_TYPE_PENDING_EPT_VIOLATION).
_PENDING_VIOLATION: Final = 6
# Violation by ACCEPT: type 1, the requested level (34:32), the level where the walk ended (37:35)
# and the entry's state (45:38): TDX module ABI, TDH.VP.ENTER output operands; not verified on a
# public capture.
_ACCEPT_VIOLATION: Final = 1
_WRITE: Final = 2
_PAGES_2M: Final = 512
# RCX of a TDG.VP.VMCALL exit: the registers that the guest passes; not used here.
_VMCALL_REGISTERS: Final = 0xFC00
_COPY_PAGE_NS: Final = 400

# A process that runs the guest up to an exit, or (None) to the end of a step.
MaybeExit = SimProcess[VmExit | None]


def run(cpu: GuestCpu) -> SimProcess[VmExit]:
    """Run from VM entry to VM exit; returns the exit."""
    env, state = cpu.env, cpu.state
    # If the first step is ACCEPT, it spends the delay of the entry together with its own.
    resumes_accept = bool(cpu.frames) and cpu.frames[-1].step[0] == ACCEPT
    if state.entry_delay_ns and not resumes_accept:
        delay, state.entry_delay_ns = state.entry_delay_ns, 0
        yield env.timeout(delay)
    if state.next_event <= env.now:
        state.next_event = int(env.now) + state.random.exponential(state.event_mean_ns)
        yield from cpu.elapse(state.random.duration(state.durations.guest_interrupt), masked=True)
        cpu.n_progress += 1
        step = next(state.handler, None)
        if step is not None:
            cpu.push(step)
    while True:
        if cpu.must_exit():
            return cpu.exit_for_interrupt()
        if not cpu.frames:
            cpu.push(next(cpu.program))
        frame = cpu.frames[-1]
        state.vcpu.rip = frame.rip
        exit_ = yield from _step(cpu, frame)
        if exit_ is not None:
            return exit_


def _step(cpu: GuestCpu, frame: Frame) -> MaybeExit:
    kind = frame.step[0]
    if kind == RUN:
        yield from _compute(cpu, frame)
        return None
    if kind == TOUCH:
        return (yield from _touch(cpu, frame, frame.step[1]))
    if kind == REPEAT:
        return (yield from _repeat(cpu, frame))
    if kind in (ACCEPT, ATTR):
        return (yield from _tdcall(cpu, frame))
    assert kind == VMCALL
    cpu.apply_stepping_filter(frame.rip)
    cpu.pop()
    cpu.state.vmcall_arguments = frame.step[2:]
    return VmExit(abi.EXIT_TDCALL, _VMCALL_REGISTERS, vmcall_reason=frame.step[1])


def _compute(cpu: GuestCpu, frame: Frame) -> SimProcess[None]:
    left = frame.step[1] - frame.done
    took = yield from cpu.elapse(left)
    frame.done += took
    if took:
        cpu.state.vcpu.rip = frame.rip = cpu.next_rip()
        cpu.n_progress += 1
    if took >= left:
        cpu.pop()


def _touch(cpu: GuestCpu, frame: Frame, gpa: int) -> MaybeExit:
    exit_ = _access(cpu, frame, gpa)
    if exit_ is None and cpu.frames[-1] is frame:
        cpu.pop()
    elif exit_ is None:
        yield from cpu.elapse(cpu.state.random.duration(cpu.state.durations.handle_ve), masked=True)
    return exit_


def _repeat(cpu: GuestCpu, frame: Frame) -> MaybeExit:
    pages = frame.step[2]
    while frame.done < len(pages):
        exit_ = _access(cpu, frame, pages[frame.done])
        if exit_ is not None or cpu.frames[-1] is not frame:
            return exit_
        frame.done += 1
        cpu.n_progress += 1
        yield from cpu.elapse(_COPY_PAGE_NS, masked=True)
        if cpu.must_exit():
            return None
    cpu.pop()
    return None


def _access(cpu: GuestCpu, frame: Frame, gpa: int) -> VmExit | None:
    """Access a page; returns None if it is mapped or raises #VE, else an EPT violation.

    #VE pushes a frame that accepts the page.
    """
    page_state = cpu.td.sept.mapping(gpa).state
    if page_state == abi.MAPPED:
        return None
    cpu.apply_stepping_filter(frame.rip)
    pending = page_state == abi.PENDING
    if pending and not cpu.td.pending_ve_disable:
        cpu.push((ACCEPT, gpa & -4096, 0))
        return None
    cpu.count_fault(gpa)
    access = frame.step[-1]
    assert isinstance(access, int)
    extended = _PENDING_VIOLATION if pending else 0
    return VmExit(abi.EXIT_EPT_VIOLATION, access, extended, gpa & -4096)


def _tdcall(cpu: GuestCpu, frame: Frame) -> MaybeExit:
    """Execute one TDCALL on a Secure EPT entry; returns None if done or to be repeated."""
    state, module = cpu.state, cpu.state.machine.module
    gpa = frame.step[1]
    level = frame.step[2] if frame.step[0] == ACCEPT else 0
    cpu.apply_stepping_filter(frame.rip)
    delay, state.entry_delay_ns = state.entry_delay_ns, 0
    yield cpu.env.timeout(delay + state.random.duration(state.durations.tdcall))
    entry = cpu.td.sept.walk(gpa, level)
    if frame.step[0] == ACCEPT:
        if entry.level > level and entry.state == abi.MAPPED:
            cpu.pop()
            return None
        if entry.level > level:
            return _accept_violation(cpu, frame, (level, entry.level, entry.state))
        if entry.state in (abi.NL_MAPPED, abi.NL_BLOCKED):
            _accept_small_pages(cpu, frame)
            return None
    leaf = generations.ACCEPT if frame.step[0] == ACCEPT else generations.ATTR
    call = Call(leaf, state.thread, cpu.td, state.vcpu, guest=True)
    call.gpa, call.entry, call.start_ns = gpa, entry, int(cpu.env.now)
    status = module.acquire(call, module.generation.lock_sequences[leaf])
    if status != abi.SUCCESS:
        return (yield from _busy(cpu, status, entry))
    state.machine.journal.count_act(state.thread.tid, "guest", call.start_ns)
    state.vcpu.hp_busy_since = None
    execute = _accept if frame.step[0] == ACCEPT else _read_attributes
    return (yield from execute(cpu, frame, call))


def _read_attributes(cpu: GuestCpu, frame: Frame, call: Call) -> MaybeExit:
    yield cpu.env.timeout(cpu.state.random.duration(cpu.state.durations.attr))
    cpu.state.machine.module.release(call)
    frame.done += 1
    cpu.n_progress += 1
    if frame.done >= frame.step[2]:
        cpu.pop()
    return None


def _accept(cpu: GuestCpu, frame: Frame, call: Call) -> MaybeExit:
    module, entry, level = cpu.state.machine.module, call.entry, frame.step[2]
    assert entry is not None
    if entry.state not in (abi.PENDING, abi.MAPPED):
        module.release(call)
        return _accept_violation(cpu, frame, (level, level, entry.state))
    if entry.state == abi.PENDING:
        n_pages = _PAGES_2M if level else 1
        yield from _zero_pages(cpu, frame, n_pages)
        if frame.done >= n_pages:
            entry.state = abi.MAPPED
        if not module.generation.entry_writes_keep_priority:
            entry.host_priority = False
    module.release(call)
    if entry.state == abi.MAPPED:
        cpu.pop()
    return None


def _accept_small_pages(cpu: GuestCpu, frame: Frame) -> None:
    """Accept 512 small pages instead of a large one, as a guest does after PAGE_SIZE_MISMATCH."""
    cpu.pop()
    for i in reversed(range(_PAGES_2M)):
        cpu.push((ACCEPT, frame.step[1] + (i << 12), 0))


def _zero_pages(cpu: GuestCpu, frame: Frame, n_pages: int) -> SimProcess[None]:
    """Zero pages while the entry is locked; on a pending event, stop after the current 4 KB."""
    state, env = cpu.state, cpu.env
    each = state.random.duration(state.durations.zero_page)
    while frame.done < n_pages:
        # As many as fit before the next interrupt, at least one; an IPI may arrive meanwhile.
        ahead = max(1, (state.next_interrupt - int(env.now)) // max(1, each))
        chunk = min(n_pages - frame.done, ahead)
        took = yield from cpu.elapse(chunk * each, masked=chunk == 1)
        if took < chunk * each:
            chunk = took // each + 1
            yield env.timeout(chunk * each - took)
        frame.done += chunk
        if cpu.must_exit():
            break


def _busy(cpu: GuestCpu, status: int, entry: SeptEntry) -> MaybeExit:
    """Return OPERAND_BUSY to the guest; after the host-priority timeout the TD exits."""
    state, vcpu, env = cpu.state, cpu.state.vcpu, cpu.env
    cpu.n_progress += 1
    if status & abi.HIGH_HALF != abi.HOST_PRIORITY_BUSY:
        vcpu.hp_busy_since = None
    elif vcpu.hp_busy_since is None:
        vcpu.hp_busy_since = int(env.now)
    elif env.now - vcpu.hp_busy_since >= state.machine.hp_timeout_ns:
        vcpu.hp_busy_since = None
        cpu.apply_stepping_filter(vcpu.rip + 4)
        left_by = entry.priority_of
        if state.entering is not None and isinstance(left_by, Call):
            state.machine.journal.broken.append(
                BrokenRule("host_priority_timeout", state.entering, left_by)
            )
        return VmExit(abi.HOST_PRIORITY_BUSY_TIMEOUT)
    yield from cpu.elapse(state.random.duration(state.durations.guest_pause))
    return None


def _accept_violation(cpu: GuestCpu, frame: Frame, walk: tuple[int, int, int]) -> VmExit:
    """Return the EPT violation of ACCEPT: exits as a write, counts for zero-step only in A."""
    asked_level, ended, state = walk
    extended = _ACCEPT_VIOLATION | asked_level << 32 | ended << 35 | (state & 0xFF) << 38
    gpa = frame.step[1]
    cpu.state.vcpu.hp_busy_since = None
    if cpu.state.machine.module.generation.counts_every_violation:
        cpu.count_fault(gpa)
    return VmExit(abi.EXIT_EPT_VIOLATION, _WRITE, extended, gpa)
