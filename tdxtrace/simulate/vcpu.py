"""A vCPU's thread on the host: enter, serve the exit, enter again.

Sources: Linux 6.16 ``arch/x86/kvm/x86.c vcpu_run``, ``vcpu_enter_guest``;
``arch/x86/kvm/vmx/tdx.c tdx_vcpu_run``, ``tdx_handle_exit``, ``tdx_vcpu_load``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final

import simpy

from tdxtrace.simulate import fault, lifecycle, vp_enter
from tdxtrace.simulate.guest_cpu import GuestCpu
from tdxtrace.simulate.journal import Request
from tdxtrace.simulate.machine import Steps
from tdxtrace.simulate.state import NOWHERE, Call, Vcpu
from tdxtrace.simulate.steps import Exit, Step
from tdxtrace.simulate.threads import Thread
from tdxtrace.simulate.vm import NO_PAGE, Vm
from tdxtrace.simulate.words import (
    ERROR_BIT,
    EXIT_EPT_VIOLATION,
    EXIT_HLT,
    EXIT_IO,
    EXIT_TDCALL,
    OPERAND,
    OPERAND_BUSY,
    SUCCESS,
    is_busy,
)

KVM_EXIT_IO: Final = 2
KVM_EXIT_INTERNAL_ERROR: Final = 17
EFAULT: Final = -14


Entering = Generator[simpy.Event, object, Exit]


class VcpuTask:
    """One vCPU: its thread, the module's vCPU, the guest in it."""

    def __init__(self, vm: Vm, number: int, thread: Thread, program: Iterator[Step]) -> None:
        self.vm = vm
        self.machine = vm.machine
        self.times = vm.machine.times
        self.thread = thread
        self.draws = thread.draws
        self.vcpu = Vcpu(vm.td, number, vm.machine.module.generation)
        self.guest = GuestCpu(self, program)
        self.interrupt_mean_ns = 1_000_000
        self.event_mean_ns = 1_000_000
        self.userspace_share = 0.0
        """How many of the exits for I/O go on to the VMM."""
        self.ignored_faults = 0
        """How many MEMORY_FAULT exits in a row the VMM lets pass before it converts the page."""
        self.refuses = False
        """Whether the host leaves private faults unserved: an attack."""
        self.asked: Step = ()
        """What the guest's last call asks for: pages to convert, and to what."""
        self.inside = False
        self.n_entries = 0
        self.entering: Call | None = None
        self.process: simpy.Process | None = None
        self._slice_ends = 0
        self._busy_entry: tuple[Request, int] | None = None
        self._n_ignored = 0

    def kick(self, entry: int | None = None) -> None:
        """An IPI arrives: out of the guest, if this is still the entry it was meant for."""
        if not self.inside or entry not in (None, self.n_entries):
            return
        if self.guest.interruptible and self.process is not None:
            self.guest.interruptible = False
            self.process.interrupt()
        else:
            self.guest.kicked = True

    def has_event(self) -> bool:
        """Whether an event waits for the vCPU (kvm_vcpu_has_events): the local loop ends then."""
        return self.guest.next_event <= self.thread.now

    def live(self) -> Steps:
        """Run the vCPU until the VM is dead or stopped."""
        yield from self._get_cpu()
        now = self.thread.now
        self.guest.next_interrupt = now + self.draws.exponential(self.interrupt_mean_ns)
        self.guest.next_event = now + self.draws.exponential(self.event_mean_ns)
        while not (self.vm.dead or self.vm.stopping):
            yield from self._maybe_yield()
            if self.vcpu.lp not in (NOWHERE, self.thread.cpu):
                yield from lifecycle.flush_elsewhere(self.vm, self.thread, self.vcpu)
            self.thread.now += self.draws.span(self.times.before_entry)
            yield from self.machine.catch_up(self.thread)
            if self.machine.in_handler[self.thread.cpu]:
                yield from self.machine.not_interrupted(self.thread)
                continue
            if self.vm.held_off is not None:
                self.thread.parked = True
                yield self.vm.held_off
                self.thread.parked = False
                self.thread.now = int(self.machine.env.now)
                continue
            exit_ = yield from self.enter()
            yield from self._serve(exit_)
        if self._busy_entry is not None:
            self.machine.journal.leave(self._busy_entry[0])
        self.machine.cpus.give(self.thread.cpu)

    def enter(self) -> Entering:
        """Make one TDH.VP.ENTER; returns the exit, or the refusal in its place."""
        env, thread, module = self.machine.env, self.thread, self.machine.module
        self.inside = True
        self.n_entries += 1
        call = Call("TDH.VP.ENTER", thread, self.vm.td, self.vcpu)
        call.start_ns, call.cpu, call.page = thread.now, thread.cpu, self.vcpu.number
        yield env.timeout(self.draws.span(self.times.into_module))
        status = vp_enter.knock(module, call, thread.cpu)
        if status == SUCCESS:
            yield env.timeout(self.draws.span(self.times.epoch_window))
            status = vp_enter.pass_gate(module, call)
        if status == SUCCESS:
            exit_ = yield from self._in_guest(call)
            thread.now = int(env.now) + self.draws.span(self.times.leave_guest)
        else:
            exit_ = Exit(status, call.out_rcx, call.out_rdx, call.gpa)
            thread.now = int(env.now)
            self._note_refusal(status)
        thread.now += self.draws.span(self.times.out_of_module)
        self._record(call, exit_)
        return exit_

    def _in_guest(self, call: Call) -> Entering:
        lead = self.draws.span(self.times.enter_guest)
        if call.armed:
            # The tree is held until the guest's state is restored; what else is
            # dropped there (OP_STATE) no call of this model takes alone.
            yield self.machine.env.timeout(lead)
            lead = 0
        vp_enter.run(call)
        self.guest.lead_ns = lead
        self.entering = call
        exit_ = yield from self.guest.run()
        assert exit_ is not None
        vp_enter.leave(self.machine.module, call)
        self.entering = None
        return exit_

    def _record(self, call: Call, exit_: Exit) -> None:
        call.end_ns, call.status, call.asked = self.thread.now, exit_.status, exit_.asked
        call.out_rcx, call.out_rdx = exit_.qualification, exit_.extended
        call.gpa, call.out_r8, call.operand = exit_.gpa, exit_.gpa, exit_.interruption
        journal = self.machine.journal
        request = self._entry_request()
        settled = journal.entered(request, call)
        self._busy_entry = None if settled else (request, self.thread.n_calls)
        self.inside = False
        self.vm.someone_left()

    def _entry_request(self) -> Request:
        """The request to enter that was answered busy just before, or a new one."""
        if self._busy_entry is not None:
            request, n_calls = self._busy_entry
            if n_calls == self.thread.n_calls:
                return request
            self.machine.journal.leave(request)
        journal, vm = self.machine.journal, self.vm
        return journal.open("TDH.VP.ENTER", self.thread, vm.number, self.vcpu.number, NO_PAGE)

    def _note_refusal(self, status: int) -> None:
        episode, now = self.guest.episode, int(self.machine.env.now)
        if episode is None or status == OPERAND_BUSY | OPERAND["TD_EPOCH"]:
            return
        if status == EXIT_EPT_VIOLATION:
            episode.n_emulated += 1
        elif status == OPERAND_BUSY | OPERAND["SEPT_TREE"]:
            episode.n_busy += 1
        else:
            return
        if episode.first_refused_ns is None:
            episode.first_refused_ns = now
        episode.last_refused_ns = now

    def _serve(self, exit_: Exit) -> Steps:
        self.thread.now += self.draws.span(self.times.handle_exit)
        if is_busy(exit_.status):
            if self.vm.policy.flush_mmu_lock and exit_.status & 0xFF == OPERAND["SEPT_TREE"]:
                yield from self.machine.lock(self.thread, self.vm.mmu_lock, alone=True)
                self.vm.mmu_lock.release()
        elif exit_.status & ERROR_BIT:
            yield from self._internal_error(exit_.status)
        elif exit_.status == EXIT_EPT_VIOLATION:
            yield from self._serve_fault(exit_)
        elif exit_.asked == EXIT_HLT:
            yield from self._halt()
        elif exit_.asked == EXIT_IO and self.draws.chance(self.userspace_share):
            yield from self.in_userspace(KVM_EXIT_IO)
        elif exit_.asked == EXIT_TDCALL:
            yield from lifecycle.convert(self)

    def _serve_fault(self, exit_: Exit) -> Steps:
        if self.refuses:
            note = self.machine.note
            note(self.thread, "kvm_page_fault", self.vcpu.number, exit_.gpa, fault.WRITE)
            return
        level = 1 if self.vm.large_pages and exit_.extended >> 32 & 7 == 1 else 0
        result = yield from fault.handle(self, exit_.gpa, level)
        if result == fault.MEMORY_FAULT:
            yield from self.in_userspace(EFAULT)
            self._n_ignored += 1
            if self._n_ignored > self.ignored_faults:
                self._n_ignored = 0
                self.vm.shared_pages.discard(exit_.gpa)

    def _internal_error(self, status: int) -> Steps:
        self.machine.note(self.thread, "dmesg", "vp_enter_ret", self.thread.tgid, status)
        yield from self.in_userspace(KVM_EXIT_INTERNAL_ERROR)
        self.vm.act(self.thread, "stop", "TDH.VP.ENTER", status)
        self.vm.stopping = True

    def in_userspace(self, reason: int) -> Steps:
        """Go out to the VMM and come back."""
        self.machine.note(self.thread, "kvm_userspace_exit", reason)
        self.thread.now += self.draws.span(self.times.userspace)
        yield from self.machine.catch_up(self.thread)

    def _halt(self) -> Steps:
        yield from self.machine.catch_up(self.thread)
        self.machine.cpus.give(self.thread.cpu)
        wait = self.guest.next_event - int(self.machine.env.now)
        if wait > 0:
            yield self.machine.env.timeout(wait)
        yield from self._get_cpu()

    def _get_cpu(self) -> Steps:
        cpus, env = self.machine.cpus, self.machine.env
        self.thread.cpu = yield from cpus.take(self, self.thread.cpu)
        self.thread.now = int(env.now) + self.draws.span(self.times.switch)
        self._slice_ends = self.thread.now + self.times.slice.median
        self.guest.next_interrupt = max(self.guest.next_interrupt, self.thread.now)

    def _maybe_yield(self) -> Steps:
        if self.machine.cpus.wanted and self.thread.now >= self._slice_ends:
            yield from self.machine.catch_up(self.thread)
            self.machine.cpus.give(self.thread.cpu)
            yield from self._get_cpu()
