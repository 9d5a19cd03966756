"""The thread of one vCPU on the host: enter the guest, handle the exit, enter again.

Only this module connects the guest's execution and KVM's exit handlers.

Sources: Linux 6.16 ``arch/x86/kvm/x86.c vcpu_run``, ``vcpu_enter_guest``;
``arch/x86/kvm/vmx/tdx.c tdx_vcpu_run``, ``tdx_handle_exit``, ``tdx_vcpu_load``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tdxtrace.simulate.guest import execution
from tdxtrace.simulate.guest.cpu import GuestCpu
from tdxtrace.simulate.guest.programs import Step, VmExit
from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.host.vcpu_state import VcpuState
from tdxtrace.simulate.kvm import lifecycle, page_fault, zap
from tdxtrace.simulate.kvm.vm import NO_PAGE, Vm
from tdxtrace.simulate.module import abi, vp_enter
from tdxtrace.simulate.module.state import NOWHERE, Call

KVM_EXIT_IO: Final = 2
KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_INTERNAL_ERROR: Final = 17
EFAULT: Final = -14
# TDVPS field PEND_NMI: class 32 (management), field 11; Linux arch/x86/kvm/vmx/tdx_arch.h
# TD_VCPU_PEND_NMI.
_PEND_NMI: Final = 0xA020_0000_0000_000B
# Linux 6.16 include/uapi/linux/kvm.h, KVM_MEMORY_ATTRIBUTE_PRIVATE.
_PRIVATE: Final = 1 << 3
# Share of single-stepped entries that execute no instruction: TDXdown, see _arm_timer.
_EMPTY_STEPS: Final = 0.008
# Duration of an instruction at 800 MHz, as in that attack: a few cycles.
_INSTRUCTION_NS: Final = 4
_HANDLING: Final = {
    page_fault.FIXED: "served",
    page_fault.SPURIOUS: "spurious",
    page_fault.MEMORY_FAULT: "memory_fault",
}


class VcpuRun:
    """KVM_RUN of one vCPU, from its first entry to the end of the VM."""

    def __init__(self, vm: Vm, state: VcpuState, program: Iterator[Step]) -> None:
        self.vm = vm
        self.state = state
        self.machine = state.machine
        self.guest = GuestCpu(state, program)
        self._slice_ends = 0
        self._n_ignored = 0

    def run(self) -> SimProcess[None]:
        """Run the vCPU until the VM is dead or stopping."""
        state, thread, machine = self.state, self.state.thread, self.machine
        yield from self._schedule_in()
        state.next_interrupt = thread.now + state.random.exponential(state.interrupt_mean_ns)
        state.next_event = thread.now + state.random.exponential(state.event_mean_ns)
        while not (self.vm.dead or self.vm.stopping):
            yield from self._maybe_preempt()
            if state.vcpu.lp not in (NOWHERE, thread.cpu):
                yield from lifecycle.flush_on_last_cpu(self.vm, thread, state.vcpu)
            thread.now += state.random.duration(state.durations.before_entry)
            yield from machine.sync_clock(thread)
            if machine.in_irq_handler[thread.cpu]:
                yield from machine.wait_for_irq_handler(thread)
                continue
            if self.vm.is_held_off:
                yield from self._return_without_entry()
                continue
            if state.nmi_pending:
                yield from self._inject_nmi()
                continue
            exit_ = yield from self.enter()
            yield from self._handle_exit(exit_)
        machine.cpus.release(thread.cpu)

    def _return_without_entry(self) -> SimProcess[None]:
        """Return from tdx_vcpu_run without TDH.VP.ENTER, while a zap prevents entries.

        The loop of vcpu_run calls it again immediately: no kvm_entry, no kvm_exit, and vp_enter_ret
        is still that of the last entry (Linux 6.16 tdx_vcpu_run, wait_for_sept_zap).
        """
        state, thread = self.state, self.state.thread
        call = Call("TDH.VP.ENTER", thread, self.vm.td, state.vcpu)
        call.start_ns, call.cpu, call.page = thread.now, thread.cpu, state.vcpu.number
        thread.now += state.random.duration(state.durations.held_off)
        call.end_ns, call.status, call.out_r8 = thread.now, state.last_status, state.last_gpa
        self.machine.journal.stale_returns.append(call)
        thread.now += state.random.duration(state.durations.handle_exit)
        thread.irqs_enabled = True
        yield from self.machine.sync_clock(thread)
        thread.irqs_enabled = False

    def _inject_nmi(self) -> SimProcess[None]:
        """Call TDH.VP.WR for TD_VCPU_PEND_NMI in the loop of the vCPU, as tdx_inject_nmi."""
        state, vm = self.state, self.vm
        state.nmi_pending = False
        journal = self.machine.journal
        vcpu = state.vcpu.number
        request = journal.open_request("TDH.VP.WR", state.thread, vm.number, vcpu, NO_PAGE)
        call = vm.call("TDH.VP.WR")
        call.vcpu, call.operand = state.vcpu, _PEND_NMI
        yield from self.machine.seamcall(state.thread, request, call, state.durations.manage)

    def enter(self) -> SimProcess[VmExit]:
        """Make one TDH.VP.ENTER; returns the exit, or the status that refused the entry."""
        state, thread = self.state, self.state.thread
        env, module = self.machine.env, self.machine.module
        state.inside = True
        state.n_entries += 1
        call = Call("TDH.VP.ENTER", thread, self.vm.td, state.vcpu)
        call.start_ns, call.cpu, call.page = thread.now, thread.cpu, state.vcpu.number
        yield env.timeout(state.random.duration(state.durations.into_module))
        status = vp_enter.acquire_entry_locks(module, call, thread.cpu)
        if status == abi.SUCCESS:
            yield env.timeout(state.random.duration(state.durations.epoch_window))
            status = vp_enter.pass_zero_step_gate(module, call)
        if status == abi.SUCCESS:
            exit_ = yield from self._run_guest(call)
            thread.now = int(env.now) + state.random.duration(state.durations.leave_guest)
        else:
            exit_ = VmExit(status, call.out_rcx, call.out_rdx, call.gpa)
            thread.now = int(env.now)
            self._count_refused_entry(status)
        thread.now += state.random.duration(state.durations.out_of_module)
        self._record(call, exit_)
        return exit_

    def _run_guest(self, call: Call) -> SimProcess[VmExit]:
        state = self.state
        delay = state.random.duration(state.durations.enter_guest)
        if call.armed:
            # The tree is held until the guest's state is restored; the other lock released there
            # (OP_STATE) is never taken exclusively in this model.
            yield self.machine.env.timeout(delay)
            delay = 0
        vp_enter.enter_guest(call)
        state.entry_delay_ns = delay
        if state.single_steps:
            self._arm_timer(delay)
        state.entering = call
        done = self.guest.n_progress
        exit_ = yield from execution.run(self.guest)
        call.executed = self.guest.n_progress > done
        vp_enter.exit_guest(self.machine.module, call)
        state.entering = None
        return exit_

    def _arm_timer(self, delay: int) -> None:
        """Schedule an interrupt after the first instruction of an entry, or just before it.

        TDXdown (L. Wilke and others, CCS 2024): 0.8 % of 1,260,000 single-stepped entries ran no
        instruction, without any EPT violation.
        """
        state, now = self.state, int(self.machine.env.now)
        is_empty = state.random.chance(_EMPTY_STEPS)
        state.next_interrupt = now + delay + (0 if is_empty else _INSTRUCTION_NS)
        self.machine.journal.count_act(state.thread.tid, "host", now)

    def _record(self, call: Call, exit_: VmExit) -> None:
        thread = self.state.thread
        call.end_ns, call.status = thread.now, exit_.status
        self.state.last_status, self.state.last_gpa = exit_.status, exit_.gpa
        call.vmcall_reason = exit_.vmcall_reason
        call.out_rcx, call.out_rdx = exit_.qualification, exit_.extended
        call.gpa, call.out_r8, call.operand = exit_.gpa, exit_.gpa, exit_.interruption
        journal, vcpu = self.machine.journal, self.state.vcpu.number
        request = journal.open_request("TDH.VP.ENTER", thread, self.vm.number, vcpu, NO_PAGE)
        journal.add_entry(request, call)
        self.state.inside = False
        self.vm.notify_vcpu_exited()

    def _count_refused_entry(self, status: int) -> None:
        episode, now = self.state.episode, int(self.machine.env.now)
        if episode is None or status == abi.OPERAND_BUSY | abi.OPERAND["TD_EPOCH"]:
            return
        if status == abi.EXIT_EPT_VIOLATION:
            episode.n_emulated += 1
        elif status == abi.OPERAND_BUSY | abi.OPERAND["SEPT_TREE"]:
            episode.n_busy += 1
        else:
            return
        if episode.first_refused_ns is None:
            episode.first_refused_ns = now
        episode.last_refused_ns = now

    def _handle_exit(self, exit_: VmExit) -> SimProcess[None]:
        state, thread = self.state, self.state.thread
        thread.now += state.random.duration(state.durations.handle_exit)
        if abi.is_busy(exit_.status):
            if self.vm.policy.flush_mmu_lock and exit_.status & 0xFF == abi.OPERAND["SEPT_TREE"]:
                yield from self.machine.acquire_lock(thread, self.vm.mmu_lock, exclusive=True)
                self.vm.mmu_lock.release()
        elif exit_.status & abi.ERROR_BIT:
            yield from self._internal_error(exit_.status)
        elif exit_.status == abi.EXIT_EPT_VIOLATION:
            yield from self._handle_ept_violation(exit_)
        elif exit_.vmcall_reason == abi.EXIT_HLT:
            yield from self._halt()
        elif exit_.vmcall_reason == abi.EXIT_IO:
            yield from self._serve_io()
        elif exit_.vmcall_reason == abi.EXIT_TDCALL:
            yield from self._map_gpa()

    def _serve_io(self) -> SimProcess[None]:
        """Handle port I/O in KVM or in the VMM; writes of the firmware are traced as kvm_pio."""
        state = self.state
        if state.vmcall_arguments:
            port, value = state.vmcall_arguments
            self.machine.log_event(state.thread, "kvm_pio", 1, port, 1, 1, value)
            yield from self._exit_to_userspace(KVM_EXIT_IO)
        elif state.random.chance(state.userspace_share):
            yield from self._exit_to_userspace(KVM_EXIT_IO)

    def _handle_ept_violation(self, exit_: VmExit) -> SimProcess[None]:
        state, vm = self.state, self.vm
        fault, state.fault = state.fault, None
        if state.refuses_faults:
            fields = (state.vcpu.number, exit_.gpa, page_fault.WRITE)
            self.machine.log_event(state.thread, "kvm_page_fault", *fields)
            self.machine.journal.count_act(state.thread.tid, "host", state.thread.now)
            if fault is not None:
                fault.handling = "refused"
            return
        level = 1 if vm.large_pages and exit_.extended >> 32 & 7 == 1 else 0
        result = yield from page_fault.handle(vm, state, exit_.gpa, level)
        if fault is not None:
            fault.handling = _HANDLING.get(result, state.thread.retry_reason)
        if result == page_fault.MEMORY_FAULT:
            yield from self._exit_to_userspace(EFAULT)
            self._n_ignored += 1
            if self._n_ignored > state.ignored_faults:
                self._n_ignored = 0
                vm.shared_pages.discard(exit_.gpa)

    def _internal_error(self, status: int) -> SimProcess[None]:
        thread = self.state.thread
        self.machine.log_event(thread, "dmesg", "vp_enter_ret", thread.tgid, status)
        yield from self._exit_to_userspace(KVM_EXIT_INTERNAL_ERROR)
        self.vm.log_action(thread, "stop", "TDH.VP.ENTER", status)
        self.vm.stopping = True

    def _map_gpa(self) -> SimProcess[None]:
        """Handle MapGPA: the VMM changes the attributes; pages that become shared are zapped."""
        state, vm = self.state, self.vm
        if not state.vmcall_arguments:
            return
        pages, to_shared = state.vmcall_arguments
        yield from self._exit_to_userspace(KVM_EXIT_HYPERCALL)
        state.thread.now += state.random.duration(state.durations.convert)
        first, attributes = pages[0] >> 12, 0 if to_shared else _PRIVATE
        ranges = (first, first + len(pages) * (512 if vm.is_large(pages[0]) else 1), attributes)
        self.machine.log_event(state.thread, "kvm_vm_set_mem_attributes", *ranges)
        if to_shared:
            level = int(vm.is_large(pages[0]))
            yield from zap.zap_range(vm, state.thread, pages, level)
            vm.shared_pages.update(pages)
        else:
            vm.shared_pages.difference_update(pages)

    def _exit_to_userspace(self, reason: int) -> SimProcess[None]:
        """Return to the VMM and come back."""
        state = self.state
        self.machine.log_event(state.thread, "kvm_userspace_exit", reason)
        state.thread.now += state.random.duration(state.durations.userspace)
        yield from self.machine.sync_clock(state.thread)

    def _halt(self) -> SimProcess[None]:
        state = self.state
        yield from self.machine.sync_clock(state.thread)
        self.machine.cpus.release(state.thread.cpu)
        wait = state.next_event - int(self.machine.env.now)
        if wait > 0:
            yield self.machine.env.timeout(wait)
        yield from self._schedule_in()

    def _schedule_in(self) -> SimProcess[None]:
        state, thread, machine = self.state, self.state.thread, self.machine
        thread.cpu = yield from machine.cpus.acquire(state, thread.cpu)
        thread.now = int(machine.env.now) + state.random.duration(state.durations.switch)
        self._slice_ends = thread.now + state.durations.slice.median
        state.next_interrupt = max(state.next_interrupt, thread.now)

    def _maybe_preempt(self) -> SimProcess[None]:
        cpus, thread = self.machine.cpus, self.state.thread
        if cpus.has_waiters and thread.now >= self._slice_ends:
            yield from self.machine.sync_clock(thread)
            cpus.release(thread.cpu)
            yield from self._schedule_in()
