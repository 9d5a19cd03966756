"""Threads of the VMM beside the vCPUs: who zaps, prefaults, splits, deletes, attacks.

Each kind is a function of a worker and of what the scenario says of it; it works when
it has a processor and gives it back when it sleeps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final

import simpy

from tdxtrace.simulate import calls, fault, lifecycle, zap
from tdxtrace.simulate.machine import Steps
from tdxtrace.simulate.state import Call
from tdxtrace.simulate.threads import Thread
from tdxtrace.simulate.vm import PRESENT, Vm
from tdxtrace.simulate.words import ERROR_BIT, INTERRUPTED_BUSY, INTERRUPTED_RESTARTABLE

_LARGE: Final = 1 << 21


@dataclass(frozen=True, slots=True)
class Work:
    """What a scenario says of one worker: its kind, its region of pages, its rhythm."""

    kind: str
    first_page: int = 0
    """First page of its region, counted from the start of the TD's memory."""
    pages: int = 64
    every_us: int = 1000
    """Mean time between two of its actions."""
    batch: int = 1
    """Pages per action."""
    hold_us: int = 20
    """How long an attacker keeps a page blocked."""
    begin_ms: int = 0
    """When it acts first; 0: after a pause like any other."""


class Worker:
    """One thread of the VMM, and what it is told to do."""

    inside = False

    def __init__(self, vm: Vm, thread: Thread, work: Work, memory: int) -> None:
        self.vm = vm
        self.thread = thread
        self.work = work
        self.base = memory + (work.first_page << 12)

    def kick(self, entry: int | None = None) -> None:
        """Nothing: it is in no guest."""

    @property
    def over(self) -> bool:
        """Whether there is nothing more to do: the VM is dead or stopped."""
        return self.vm.dead or self.vm.stopping

    def live(self) -> Steps:
        """Sleep, act, sleep, until the VM is over."""
        machine, draws = self.vm.machine, self.thread.draws
        act = KINDS[self.work.kind]
        pause_ns = self.work.begin_ms * 1_000_000
        while not self.over:
            yield machine.env.timeout(pause_ns or 1 + draws.exponential(self.work.every_us * 1000))
            pause_ns = 0
            yield from self.on_cpu()
            yield from act(self)
            yield from self.off_cpu()

    def on_cpu(self) -> Steps:
        """Get a processor."""
        machine = self.vm.machine
        self.thread.cpu = yield from machine.cpus.take(self, self.thread.cpu)
        self.thread.now = int(machine.env.now) + self.thread.draws.span(machine.times.switch)

    def off_cpu(self) -> Generator[simpy.Event, object, None]:
        """Give the processor back."""
        yield from self.vm.machine.catch_up(self.thread)
        self.vm.machine.cpus.give(self.thread.cpu)

    def some_pages(self, size: int = 4096) -> list[int]:
        """A run of ``batch`` pages somewhere in its region."""
        n = max(1, self.work.pages - self.work.batch + 1)
        first = self.thread.draws.below(n)
        return [self.base + (first + i) * size for i in range(self.work.batch)]


def _zap(worker: Worker) -> Steps:
    """Punch a hole: remove pages that the guest gave back, or that are converted."""
    yield from zap.zap(worker.vm, worker.thread, worker.some_pages())


def _prefault(worker: Worker) -> Steps:
    """KVM_PRE_FAULT_MEMORY: map pages before the guest asks for them."""
    for gpa in worker.some_pages():
        if worker.over:
            return
        yield from fault.populate(worker.vm, worker.thread, gpa, 0)
        worker.thread.now += worker.thread.draws.span(worker.vm.machine.times.zap_step)


def _delete_slot(worker: Worker) -> Steps:
    """Delete a memory slot: all of its pages go in one invalidation."""
    pages = [worker.base + (i << 12) for i in range(worker.work.pages)]
    yield from zap.zap(worker.vm, worker.thread, pages)


def _churn_blocks(worker: Worker) -> Steps:
    """Attack: block a page of the victim's, watch for the fault, unblock it."""
    vm = worker.vm
    gpa = worker.some_pages()[0]
    yield from vm.machine.lock(worker.thread, vm.mmu_lock, alone=True)
    yield from vm.machine.catch_up(worker.thread)
    vm.mmu_lock.release()
    if vm.sptes.get(gpa) == PRESENT:
        hold = worker.work.hold_us * 1000
        yield from zap.block_and_unblock(vm, worker.thread, gpa, hold)


def _split(worker: Worker) -> Steps:
    """Split a 2 MB page: BLOCK, TRACK, kick, DEMOTE, again while interrupts stop it."""
    vm, thread, machine = worker.vm, worker.thread, worker.vm.machine
    gpa = worker.some_pages(_LARGE)[0] & -_LARGE
    yield from machine.lock(thread, vm.mmu_lock, alone=True)
    if vm.sptes.get(gpa | 1) == PRESENT and gpa not in vm.sptes:
        status = yield from calls.change(vm, thread, "TDH.MEM.RANGE.BLOCK", gpa, 1)
        if not status & ERROR_BIT:
            status = yield from zap.track(vm, thread)
        if not status & ERROR_BIT:
            yield from _demote(worker, gpa)
    yield from machine.catch_up(thread)
    vm.mmu_lock.release()


def _demote(worker: Worker, gpa: int) -> Steps:
    vm, thread, times = worker.vm, worker.thread, worker.vm.machine.times
    request = vm.request("TDH.MEM.PAGE.DEMOTE", thread, (gpa, 1))
    page = vm.new_page()
    while not vm.dead:
        call: Call = vm.call("TDH.MEM.PAGE.DEMOTE", gpa, 1)
        call.page = page
        # An interrupt comes with the rate of the host's, during the work of the leaf.
        work_ns = times.demote.median
        call.interrupted = thread.draws.chance(work_ns / max(1, vm.interrupt_mean_ns))
        status = yield from vm.machine.attempt(thread, request, call, times.demote)
        if status not in (INTERRUPTED_RESTARTABLE, INTERRUPTED_BUSY):
            break
        thread.now += thread.draws.span(times.wrapper_turn)
    if status & ERROR_BIT:
        vm.bug(thread, "TDH.MEM.PAGE.DEMOTE", status)
        return
    for i in range(512):
        vm.sptes[gpa + (i << 12)] = PRESENT


def _stop(worker: Worker) -> Steps:
    """Shut the VM down and take it apart."""
    vm = worker.vm
    vm.stopping = True
    for task in vm.tasks:
        task.kick()
    while any(task.inside for task in vm.tasks):
        worker.thread.now += 10_000
        yield from vm.machine.catch_up(worker.thread)
    yield from lifecycle.tear_down(vm, worker.thread, packages=2)


KINDS: Final[dict[str, Callable[[Worker], Steps]]] = {
    "zap": _zap,
    "prefault": _prefault,
    "delete_slot": _delete_slot,
    "churn_blocks": _churn_blocks,
    "split": _split,
    "stop": _stop,
}
