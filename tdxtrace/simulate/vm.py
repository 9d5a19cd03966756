"""One VM as KVM keeps it: its TD, its page tables, its locks, and how it is kicked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import simpy

from tdxtrace.simulate.journal import Action, Request
from tdxtrace.simulate.machine import Machine, Steps
from tdxtrace.simulate.mutex import RwLock
from tdxtrace.simulate.policies import Policy
from tdxtrace.simulate.sept import page_bytes
from tdxtrace.simulate.state import Call, Td
from tdxtrace.simulate.threads import Thread

if TYPE_CHECKING:
    from tdxtrace.simulate.vcpu import VcpuTask

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
        # Linux mirror SPTEs: missing, FROZEN while a SEAMCALL for them is under way, PRESENT.
        self.sptes: dict[int, int] = {}
        self.invalidating: list[tuple[int, int]] = []
        self.shared_pages: set[int] = set()
        """Pages that userspace has marked shared: a private access exits with MEMORY_FAULT."""
        self.large_pages = False
        self.interrupt_mean_ns = 1_000_000
        self.tasks: list[VcpuTask] = []
        self.dead = False
        self.stopping = False
        # wait_for_sept_zap: Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_no_vcpus_enter_start.
        self.held_off: simpy.Event | None = None
        self.waiting_for_exits: list[simpy.Event] = []
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

    def call(self, leaf: str, gpa: int = 0, level: int = 0) -> Call:
        """A SEAMCALL about this TD, about to be made."""
        made = Call(leaf, td=self.td)
        made.gpa, made.level = gpa, level
        return made

    def request(self, leaf: str, thread: Thread, page: tuple[int, int] = NO_PAGE) -> Request:
        """Begin a request about this TD."""
        return self.machine.journal.open(leaf, thread, self.number, NO_VCPU, page)

    def act(self, thread: Thread, action: str, leaf: str, detail: int = 0) -> None:
        """Write down what the policy does."""
        journal = self.machine.journal
        journal.actions.append(Action(thread.now, thread, self.number, action, leaf, detail))

    def is_invalidating(self, gpa: int) -> bool:
        """Whether an invalidation that covers a page is in progress (mmu_invalidate_retry)."""
        return any(start <= gpa < end for start, end in self.invalidating)

    def bug(self, thread: Thread, leaf: str, status: int) -> None:
        """KVM_BUG_ON: the VM is dead, and every ioctl on it fails from now on."""
        if self.dead:
            return
        self.act(thread, "bug", leaf, status)
        self.machine.note(thread, "dmesg", "failed", leaf, status)
        self.die()

    def die(self) -> None:
        """Let no vCPU enter any more, and wake those that wait."""
        self.dead = True
        for task in self.tasks:
            task.kick()

    def kick(self, thread: Thread) -> Steps:
        """Send every vCPU that is in its guest an IPI, and wait until each came out once."""
        machine, env = self.machine, self.machine.env
        yield from machine.catch_up(thread)
        inside = [task for task in self.tasks if task.inside]
        for task in inside:
            thread.now += thread.draws.span(machine.times.send_ipi)
            flight = thread.now - int(env.now) + thread.draws.span(machine.times.ipi_flight)
            arrival = env.timeout(flight)
            assert arrival.callbacks is not None
            arrival.callbacks.append(_delivery(task, task.n_entries))
        visits = [(task, task.n_entries) for task in inside]
        while any(task.inside and task.n_entries == n for task, n in visits):
            left = env.event()
            self.waiting_for_exits.append(left)
            yield left
        thread.now = max(thread.now, int(env.now))

    def someone_left(self) -> None:
        """Tell those who wait for vCPUs to come out that one did."""
        waiting, self.waiting_for_exits = self.waiting_for_exits, []
        for event in waiting:
            event.succeed()

    def hold_off(self, thread: Thread, leaf: str) -> Steps:
        """Keep vCPUs from entering, and kick those that are in."""
        self.act(thread, "kick", leaf, sum(task.inside for task in self.tasks))
        self.held_off = self.machine.env.event()
        yield from self.kick(thread)

    def let_in(self, thread: Thread) -> Steps:
        """Let vCPUs enter again."""
        yield from self.machine.catch_up(thread)
        waiting, self.held_off = self.held_off, None
        if waiting is not None:
            waiting.succeed()


def _delivery(task: VcpuTask, entry: int) -> Callable[[simpy.Event], None]:
    """What the arrival of an IPI does: it finds the vCPU in the entry it was sent for, or not."""
    return lambda _: task.kick(entry)
