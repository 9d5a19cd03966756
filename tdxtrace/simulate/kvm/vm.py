"""KVM's state of one VM: its TD, mirror page tables, locks and vCPUs, and kicks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import simpy

from tdxtrace.simulate.host.machine import Machine
from tdxtrace.simulate.host.scheduler import RwLock, SimProcess
from tdxtrace.simulate.host.vcpu_state import VcpuState
from tdxtrace.simulate.journal import PolicyAction, Request
from tdxtrace.simulate.kvm.policies import Policy
from tdxtrace.simulate.module.abi import page_bytes
from tdxtrace.simulate.module.state import Call, Td
from tdxtrace.simulate.thread import Thread

# State of a mirror SPTE: none, FROZEN while a SEAMCALL for it is in progress, PRESENT.
PRESENT: Final = 1
FROZEN: Final = 2
NO_PAGE: Final = (-1, -1)
NO_VCPU: Final = -1


class Vm:
    """A VM: KVM's mirror of the Secure EPT, its locks, its vCPUs, its policy."""

    def __init__(self, machine: Machine, number: int, policy: Policy) -> None:
        self.machine = machine
        self.number = number
        self.policy = policy
        self.td = Td(machine.module.generation, number)
        self.mmu_lock = RwLock(machine.env)
        self.seamcall_lock = RwLock(machine.env)
        self.sptes: dict[int, int] = {}
        """State of each mirror SPTE, by the page's address and level together."""
        self.invalidating: list[tuple[int, int]] = []
        self.shared_pages: set[int] = set()
        """Pages that userspace has marked shared: a private access exits with MEMORY_FAULT."""
        self.large_pages = False
        self.large_pages_at: set[int] = set()
        """Addresses of the 2 MB pages that are mapped; other SPTEs of that level are tables."""
        self.interrupt_mean_ns = 1_000_000
        self.racing_init = False
        self.fault_serial_ns = 0
        self.fault_per_vcpu_ns = 0
        self._serial_until = 0
        self.last_fault_gpa = -1
        """Page of the latest private fault of any vCPU."""
        self.vcpus: list[VcpuState] = []
        self.dead = False
        self.stopping = False
        # wait_for_sept_zap: Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_no_vcpus_enter_start.
        self.is_held_off = False
        self.exit_waiters: list[simpy.Event] = []
        # Private key ids begin after the shared ones: [32, 64) in canonical/tdx issue 25.
        self.hkid = 32 + number
        self._pages = (number + 1) << 40

    def new_page(self, level: int = 0) -> int:
        """Allocate a physical page of a level, aligned to its size."""
        size = page_bytes(level)
        self._pages = (self._pages + size - 1) & -size
        page = self._pages
        self._pages += size
        return page

    def is_large(self, gpa: int) -> bool:
        """Return whether a 2 MB page is mapped at an address."""
        return gpa & -page_bytes(1) in self.large_pages_at

    def call(self, leaf: str, gpa: int = 0, level: int = 0) -> Call:
        """Return a SEAMCALL on this TD, not yet made."""
        call = Call(leaf, td=self.td)
        call.gpa, call.level = gpa, level
        return call

    def request(self, leaf: str, thread: Thread, page: tuple[int, int] = NO_PAGE) -> Request:
        """Begin a request on this TD."""
        return self.machine.journal.open_request(leaf, thread, self.number, NO_VCPU, page)

    def prepare_fault(self, thread: Thread) -> SimProcess[None]:
        """Spend the time of a fault that depends on the number of vCPUs, outside of SEAMCALLs.

        No source explains this time: possibly allocation and zeroing of pages, and contended cache
        lines of locks.  It is spent before mmu_lock is taken, where it does not lengthen a
        SEAMCALL.  The first part is serialised among vCPUs and limits the faults of the TD per
        second; the second part grows with the number of vCPUs, whether they fault or not.

        Public figures, and results of boot_storm (fault_serial_ns 1370, fault_per_vcpu_ns 587):

        | vCPUs | public, us per page and vCPU | model |
        |---|---|---|
        | 1 | 8.1 to 15.8 (lkvs, one worker), 8 (Dstack) | 10.1 |
        | 32, all accept | 42 to 46, 1.31 to 1.43 us in all (lkvs) | 43.8, 1.37 us in all |
        | 248, one accepts | 153 (Dstack PR 1220) | 155 |

        Deviations: the real cost of one vCPU grows with the TD's memory (lkvs: 11.4 us at 8 GB,
        15.8 at 96 GB), the model's does not; the model gives 10.1 us where Dstack measured 8 us.
        For 2 to 31 vCPUs, and more than 32 that all accept, there are no public figures: the model
        extrapolates.
        """
        thread.now += self.fault_per_vcpu_ns * (len(self.vcpus) - 1)
        if self.fault_serial_ns:
            yield from self.machine.sync_clock(thread)
            self._serial_until = max(thread.now, self._serial_until) + self.fault_serial_ns
            thread.now = self._serial_until

    def log_action(self, thread: Thread, action: str, leaf: str, detail: int = 0) -> None:
        """Record an action of the policy."""
        journal = self.machine.journal
        journal.actions.append(PolicyAction(thread.now, thread, self.number, action, leaf, detail))

    def is_invalidating(self, gpa: int) -> bool:
        """Return whether an invalidation of a page is in progress (mmu_invalidate_retry)."""
        return any(start <= gpa < end for start, end in self.invalidating)

    def kvm_bug_on(self, thread: Thread, leaf: str, status: int) -> None:
        """Mark the VM dead, as KVM_BUG_ON; every further ioctl on it fails."""
        if self.dead:
            return
        self.log_action(thread, "bug", leaf, status)
        self.machine.log_event(thread, "dmesg", "failed", leaf, status)
        self.mark_dead()

    def mark_dead(self) -> None:
        """Prevent all vCPUs from entering, and kick them."""
        self.dead = True
        for state in self.vcpus:
            state.kick()

    def kick(self, thread: Thread) -> SimProcess[None]:
        """Send an IPI to every vCPU in its guest, and wait until each has exited once."""
        machine, env = self.machine, self.machine.env
        yield from machine.sync_clock(thread)
        inside = [state for state in self.vcpus if state.inside]
        for state in inside:
            thread.now += thread.random.duration(machine.durations.send_ipi)
            flight = (
                thread.now - int(env.now) + thread.random.duration(machine.durations.ipi_flight)
            )
            arrival = env.timeout(flight)
            assert arrival.callbacks is not None
            arrival.callbacks.append(_delivery(state, state.n_entries))
        entries = [(state, state.n_entries) for state in inside]
        while any(state.inside and state.n_entries == n for state, n in entries):
            exited = env.event()
            self.exit_waiters.append(exited)
            yield exited
        thread.now = max(thread.now, int(env.now))

    def notify_vcpu_exited(self) -> None:
        """Wake the threads that wait for a vCPU to exit."""
        waiters, self.exit_waiters = self.exit_waiters, []
        for event in waiters:
            event.succeed()

    def no_vcpus_enter_start(self, thread: Thread, leaf: str) -> SimProcess[None]:
        """Prevent vCPUs from entering the guest, and kick those that run it."""
        self.log_action(thread, "kick", leaf, sum(state.inside for state in self.vcpus))
        self.is_held_off = True
        yield from self.kick(thread)

    def no_vcpus_enter_stop(self, thread: Thread) -> SimProcess[None]:
        """Let vCPUs enter the guest again."""
        yield from self.machine.sync_clock(thread)
        self.is_held_off = False


def _delivery(state: VcpuState, entry: int) -> Callable[[simpy.Event], None]:
    """Return the callback for the arrival of an IPI, which kicks the vCPU if still in ``entry``."""
    return lambda _: state.kick(entry)
