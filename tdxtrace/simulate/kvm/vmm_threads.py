"""Threads of the VMM besides the vCPUs: they zap, prefault, split, delete and attack.

Each kind of worker is a function for one action, during which the worker has a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.host.machine import POLL_NS
from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.journal import BrokenRule
from tdxtrace.simulate.kvm import lifecycle, page_fault, page_size, retries, zap
from tdxtrace.simulate.kvm.vm import PRESENT, Vm
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.tables import rows
from tdxtrace.simulate.thread import Thread

CONDUCTS: Final = ("honest", "buggy", "hostile")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker in a scenario: its kind, its region of pages, its interval."""

    kind: str
    first_page: int = 0
    """First page of its region, counted from the start of the TD's memory."""
    pages: int = 64
    every_us: int = 1000
    """Mean time between two actions."""
    batch: int = 1
    """Pages per action."""
    hold_us: int = 20
    """Time for which a page stays blocked."""
    begin_ms: int = 0
    """Time of its first action; 0: after a random interval."""
    leaf: str = ""
    """Leaf that a worker of kind seamcall calls."""
    conduct: str = "honest"
    """``honest``, ``buggy`` (a kernel with a bug) or ``hostile``.

    If a worker may hold KVM's locks or not (churn_blocks), only an honest one holds them.
    """


class Worker:
    """One thread of the VMM that acts at intervals."""

    inside = False

    def __init__(self, vm: Vm, thread: Thread, spec: WorkerSpec, memory: int) -> None:
        self.vm = vm
        self.thread = thread
        self.spec = spec
        self.first_gpa = memory + (spec.first_page << 12)

    def kick(self, entry: int | None = None) -> None:
        """Ignore an IPI: a worker runs no guest."""

    @property
    def is_done(self) -> bool:
        """Return whether the VM is dead or stopping."""
        return self.vm.dead or self.vm.stopping

    def run(self) -> SimProcess[None]:
        """Sleep and act in turn until the VM is dead or stopping."""
        machine, random = self.vm.machine, self.thread.random
        act = WORKER_KINDS[self.spec.kind]
        pause_ns = self.spec.begin_ms * 1_000_000
        while not self.is_done:
            yield machine.env.timeout(pause_ns or 1 + random.exponential(self.spec.every_us * 1000))
            pause_ns = 0
            yield from self.schedule_in()
            machine.journal.count_act(self.thread.tid, "host", self.thread.now)
            yield from act(self)
            yield from self.schedule_out()

    def schedule_in(self) -> SimProcess[None]:
        """Wait for a CPU."""
        machine = self.vm.machine
        self.thread.cpu = yield from machine.cpus.acquire(self, self.thread.cpu)
        self.thread.now = int(machine.env.now) + self.thread.random.duration(
            machine.durations.switch
        )

    def schedule_out(self) -> SimProcess[None]:
        """Release the CPU."""
        yield from self.vm.machine.sync_clock(self.thread)
        self.vm.machine.cpus.release(self.thread.cpu)

    def random_pages(self, size: int = 4096) -> list[int]:
        """Return addresses of ``batch`` consecutive pages at a random place in its region."""
        n = max(1, self.spec.pages - self.spec.batch + 1)
        first = self.thread.random.below(n)
        return [self.first_gpa + (first + i) * size for i in range(self.spec.batch)]


def _zap(worker: Worker) -> SimProcess[None]:
    """Punch a hole: remove pages that the guest released or converted."""
    yield from zap.zap_range(worker.vm, worker.thread, worker.random_pages())


def _prefault(worker: Worker) -> SimProcess[None]:
    """Map pages before the guest accesses them: KVM_PRE_FAULT_MEMORY.

    A page is retried until it is mapped, regardless of events of a vCPU: kvm_tdp_map_page repeats
    the fault while it returns RET_PF_RETRY, the VM is alive and no signal is pending.
    """
    vm, thread, durations = worker.vm, worker.thread, worker.vm.machine.durations
    for gpa in worker.random_pages():
        while not worker.is_done:
            result = yield from page_fault.populate(vm, thread, gpa, 0)
            if result != page_fault.RETRY:
                break
            thread.now += thread.random.duration(durations.local_turn)
        thread.now += thread.random.duration(durations.zap_step)


def _delete_slot(worker: Worker) -> SimProcess[None]:
    """Delete a memory slot: remove all of its pages in one invalidation."""
    pages = [worker.first_gpa + (i << 12) for i in range(worker.spec.pages)]
    yield from zap.zap_range(worker.vm, worker.thread, pages)


def _churn_blocks(worker: Worker) -> SimProcess[None]:
    """Block a page, wait for its fault, unblock it: an attack, or a migration (``conduct``)."""
    vm, level = worker.vm, int(worker.vm.large_pages)
    gpa = worker.random_pages(abi.page_bytes(level))[0] & -abi.page_bytes(level)
    yield from vm.machine.acquire_lock(worker.thread, vm.mmu_lock, exclusive=True)
    yield from vm.machine.sync_clock(worker.thread)
    vm.mmu_lock.release()
    if vm.sptes.get(gpa | level) == PRESENT:
        hold = worker.spec.hold_us * 1000
        locked = worker.spec.conduct == "honest"
        yield from zap.block_and_unblock(vm, worker.thread, (gpa, level), hold, locked)


def _watch_page(worker: Worker) -> SimProcess[None]:
    """Attack: block a page until the victim faults on it, to detect when it accesses the page."""
    vm, thread, page = worker.vm, worker.thread, (worker.random_pages()[0], 0)
    vm.last_fault_gpa = -1
    if not (yield from zap.block_and_track(vm, thread, page, locked=False)):
        return
    until = thread.now + worker.spec.hold_us * 1000
    while vm.last_fault_gpa != page[0] and thread.now < until and not worker.is_done:
        thread.now += POLL_NS
        yield from vm.machine.sync_clock(thread)
    yield from zap.unblock(vm, thread, page, locked=False)


def _split(worker: Worker) -> SimProcess[None]:
    """Split a 2 MB page: BLOCK, TRACK, kick, and DEMOTE until no interrupt stops it."""
    vm, thread, machine = worker.vm, worker.thread, worker.vm.machine
    gpa = worker.random_pages(page_size.LARGE)[0] & -page_size.LARGE
    yield from machine.acquire_lock(thread, vm.mmu_lock, exclusive=True)
    if vm.is_large(gpa):
        dropped = None
        if worker.spec.conduct == "buggy":
            status, dropped = yield from _block_once(worker, gpa)
        else:
            status = yield from retries.zap_call(vm, thread, "TDH.MEM.RANGE.BLOCK", gpa, 1)
        if not status & abi.ERROR_BIT or dropped is not None:
            status = yield from zap.track(vm, thread)
        if not status & abi.ERROR_BIT:
            status = yield from page_size.split(vm, thread, gpa)
            if status & abi.ERROR_BIT:
                demote = next(c for c in reversed(machine.journal.calls) if c.thread is thread)
                if dropped is not None:
                    machine.journal.broken.append(BrokenRule("dropped_block", demote, dropped))
                vm.kvm_bug_on(thread, page_size.DEMOTE, status)
    yield from machine.sync_clock(thread)
    vm.mmu_lock.release()


def _block_once(worker: Worker, gpa: int) -> SimProcess[tuple[int, Call | None]]:
    """Call BLOCK for a page once and ignore a busy answer, a bug.

    Returns:
        Its status, and the call if it was busy (canonical/tdx issue 213: the wrapper returned
        -EAGAIN, which its caller ignored).
    """
    vm, thread = worker.vm, worker.thread
    request = vm.request("TDH.MEM.RANGE.BLOCK", thread, (gpa, 1))
    call = vm.call("TDH.MEM.RANGE.BLOCK", gpa, 1)
    status = yield from vm.machine.seamcall(thread, request, call, vm.machine.durations.block)
    return status, call if abi.is_busy(status) else None


def _merge(worker: Worker) -> SimProcess[None]:
    """Merge small pages to a 2 MB page, or give up."""
    gpa = worker.random_pages(page_size.LARGE)[0] & -page_size.LARGE
    hold_ns = worker.spec.hold_us * 1000
    yield from page_size.merge(worker.vm, worker.thread, gpa, hold_ns)


def _churn_sizes(worker: Worker) -> SimProcess[None]:
    """Attack: split and merge the same range repeatedly."""
    gpa = worker.random_pages(page_size.LARGE)[0] & -page_size.LARGE
    hold_ns = worker.spec.hold_us * 1000
    yield from page_size.change_back_and_forth(worker.vm, worker.thread, gpa, hold_ns)


def _seamcall(worker: Worker) -> SimProcess[None]:
    """Call a leaf that takes only pages once, with new pages.

    A leaf with a level gets the 2 MB range from which the VM allocates its next pages; further
    pages are outside of this range.
    """
    vm, thread, leaf = worker.vm, worker.thread, worker.spec.leaf
    roles = [row["role"] for row in rows("operands") if row["leaf"] == leaf]
    call = vm.call(leaf)
    n_further = sum(role.startswith("page ") for role in roles)
    outside = vm.new_page(1) if n_further else 0
    call.further_pages = tuple(outside + (n << 12) for n in range(n_further))
    call.level = int("level" in roles)
    call.page = vm.new_page() & -abi.page_bytes(call.level)
    request = vm.request(leaf, thread)
    status = yield from vm.machine.seamcall(thread, request, call, vm.machine.durations.manage)
    if status & abi.ERROR_BIT:
        vm.machine.journal.abandon(request)


def _read_entries(worker: Worker) -> SimProcess[None]:
    """Read one Secure EPT entry repeatedly without mmu_lock, as a debugger does."""
    vm, thread = worker.vm, worker.thread
    gpa = worker.random_pages()[0]
    until = thread.now + worker.spec.hold_us * 1000
    while thread.now < until and not worker.is_done:
        request = vm.request("TDH.MEM.SEPT.RD", thread, (gpa, 0))
        call = vm.call("TDH.MEM.SEPT.RD", gpa)
        yield from vm.machine.seamcall(thread, request, call, vm.machine.durations.manage)


def _nmi(worker: Worker) -> SimProcess[None]:
    """Queue an NMI for a vCPU and kick it, as KVM_NMI does."""
    state = worker.vm.vcpus[worker.thread.random.below(len(worker.vm.vcpus))]
    yield from worker.vm.machine.sync_clock(worker.thread)
    state.nmi_pending = True
    state.kick()


def _update_module(worker: Worker) -> SimProcess[None]:
    """Replace the TDX module: call SEAMLDR.INSTALL on one CPU after the other, all CPUs stopped.

    Linux 7.2 arch/x86/virt/vmx/tdx/seamldr.c: stop_machine with interrupts off; the P-SEAMLDR
    serves one CPU at a time.
    """
    vm, thread, machine = worker.vm, worker.thread, worker.vm.machine
    others = [cpu for cpu in range(len(machine.in_irq_handler)) if cpu != thread.cpu]
    stopped = [thread]
    for cpu in others:
        handler = yield from lifecycle.interrupt_cpu(vm, thread, cpu)
        stopped.append(handler)
    for handler in stopped:
        handler.now = max(handler.now, thread.now)
        call = Call("SEAMLDR.INSTALL", handler)
        call.start_ns, call.cpu = handler.now, handler.cpu
        handler.now += thread.random.duration(machine.durations.install)
        call.end_ns = thread.now = handler.now
        machine.journal.loader_calls.append(call)
        yield from machine.sync_clock(thread)
    for handler in stopped:
        machine.in_irq_handler[handler.cpu] = False


def _stop(worker: Worker) -> SimProcess[None]:
    """Stop the VM and tear its TD down."""
    vm = worker.vm
    vm.stopping = True
    for state in vm.vcpus:
        state.kick()
    while any(state.inside for state in vm.vcpus):
        worker.thread.now += 10_000
        yield from vm.machine.sync_clock(worker.thread)
    yield from lifecycle.tear_down(vm, worker.thread, packages=2)


WORKER_KINDS: Final[dict[str, Callable[[Worker], SimProcess[None]]]] = {
    "zap": _zap,
    "prefault": _prefault,
    "delete_slot": _delete_slot,
    "churn_blocks": _churn_blocks,
    "churn_sizes": _churn_sizes,
    "merge": _merge,
    "nmi": _nmi,
    "read_entries": _read_entries,
    "seamcall": _seamcall,
    "watch_page": _watch_page,
    "split": _split,
    "stop": _stop,
    "update_module": _update_module,
}
