"""A scenario and a seed become a run: what happened, with every cause known."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate import lifecycle
from tdxtrace.simulate.draws import Draws
from tdxtrace.simulate.generations import GENERATIONS
from tdxtrace.simulate.guests import Seat, program_named
from tdxtrace.simulate.journal import Journal
from tdxtrace.simulate.machine import Machine, Steps
from tdxtrace.simulate.policies import policy_named
from tdxtrace.simulate.scenario import Scenario, TdSpec
from tdxtrace.simulate.sept import ROOT_LEVEL, page_bytes
from tdxtrace.simulate.state import RUNNABLE, Call
from tdxtrace.simulate.threads import Thread
from tdxtrace.simulate.vcpu import VcpuTask
from tdxtrace.simulate.vm import PRESENT, Vm
from tdxtrace.simulate.words import MAPPED, NL_MAPPED
from tdxtrace.simulate.workers import Work, Worker

# Private memory of a TD begins here: above 4 GB, as QEMU places high memory.
MEMORY: Final = 0x1_0000_0000
# Process numbers: the first VM's, and how far the VMs are apart.  Any would do.
_FIRST_TGID: Final = 4242
_TGID_STEP: Final = 1500
_BUILD_PAGES: Final = 16
# Actors (streams of chance) of one VM: main thread, vCPUs, workers.
_ACTORS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a scenario with one seed."""

    scenario: Scenario
    seed: int
    journal: Journal
    vms: tuple[Vm, ...]
    end_ns: int
    """Length of the run, in ns; its times count from 0."""
    inside: tuple[Call, ...] = ()
    """Entries that had not come out when the run ended."""


def run(scenario: Scenario, seed: int) -> Run:
    """Simulate a scenario.

    Args:
        scenario: What to simulate.
        seed: Chance; the same scenario and seed give the same run on every machine.

    Returns:
        The run, whose times are ns from its start.
    """
    machine = Machine(
        GENERATIONS[scenario.generation],
        scenario.durations(),
        scenario.cpus,
        scenario.hp_timeout_us * 1000,
    )
    specs = [td for td in scenario.tds for _ in range(td.count)]
    vms = tuple(_vm(machine, scenario, spec, i, seed) for i, spec in enumerate(specs))
    end_ns = scenario.duration_ms * 1_000_000
    with _without_collections():
        machine.env.run(until=end_ns)
    journal = machine.journal
    # A thread runs ahead of the clock to where it next meets others: what it did after the
    # end of the run belongs to no trace.
    journal.cut_off(end_ns)
    inside = (t.entering for vm in vms for t in vm.tasks if t.entering is not None)
    return Run(scenario, seed, journal, vms, end_ns, tuple(inside))


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause the search for unreachable cycles.

    Nearly all that a run makes is kept: looking through it again and again took half of the
    time of a run.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _vm(machine: Machine, scenario: Scenario, spec: TdSpec, number: int, seed: int) -> Vm:
    vm = Vm(machine, number, policy_named(scenario.policy))
    vm.td.pending_ve_disable = spec.pending_ve_disable
    vm.large_pages = spec.large_pages
    vm.interrupt_mean_ns = scenario.interrupt_us * 1000
    tgid = _FIRST_TGID + number * _TGID_STEP
    vm.tasks = [_task(vm, scenario, spec, i, (seed, tgid)) for i in range(spec.vcpus)]
    first = spec.guest.first_page
    vm.shared_pages = {MEMORY + (first + i << 12) for i in range(spec.mismatched)}
    main = Thread(tgid, tgid, "qemu-system-x86", Draws(seed, number * _ACTORS))
    machine.env.process(_start(vm, main, spec, scenario.no_entropy))
    for i, work in enumerate(spec.workers):
        actor = number * _ACTORS + _ACTORS // 2 + i
        thread = Thread(tgid + 1000 + i, tgid, "worker", Draws(seed, actor))
        machine.env.process(Worker(vm, thread, work, MEMORY).live())
    return vm


def _task(vm: Vm, scenario: Scenario, spec: TdSpec, i: int, of: tuple[int, int]) -> VcpuTask:
    seed, tgid = of
    draws = Draws(seed, vm.number * _ACTORS + 1 + i)
    # QEMU names its vCPU threads so (system/cpus.c); the kernel keeps 15 characters.
    thread = Thread(tgid + 3 + i, tgid, f"CPU {i}/KVM", draws)
    program = program_named(spec.guest.program)
    task = VcpuTask(vm, i, thread, program(spec.guest, Seat(i, spec.vcpus, draws, MEMORY)))
    task.interrupt_mean_ns = scenario.interrupt_us * 1000
    task.event_mean_ns = scenario.event_us * 1000
    task.userspace_share = spec.userspace_share
    task.ignored_faults = spec.ignored_faults
    task.refuses = spec.refuses_faults and i == 0
    thread.cpu = i % scenario.cpus
    return task


def _start(vm: Vm, main: Thread, spec: TdSpec, scarcity: float) -> Steps:
    """Build the TD or find it built, then let its vCPUs go."""
    env = vm.machine.env
    if spec.build:
        main.cpu = yield from vm.machine.cpus.take(Worker(vm, main, Work("zap"), 0), 0)
        gpas = [(1 << 20) + (i << 12) for i in range(_BUILD_PAGES)]
        yield from lifecycle.build(vm, main, gpas, scarcity)
        yield from vm.machine.catch_up(main)
        vm.machine.cpus.give(main.cpu)
    else:
        vm.td.op_state = RUNNABLE
        yield env.timeout(0)
    premap(vm, spec.accepted)
    for task in vm.tasks:
        task.process = env.process(task.live())


def premap(vm: Vm, n_pages: int) -> None:
    """Map and accept the first pages of a TD without a call: it happened before the trace."""
    size = 512 if vm.large_pages else 1
    for page in range(0, n_pages, size):
        gpa = MEMORY + (page << 12)
        level = 1 if vm.large_pages else 0
        for above in range(ROOT_LEVEL, level, -1):
            key = gpa & -page_bytes(above) | above
            if vm.sptes.setdefault(key, PRESENT) == PRESENT:
                table = vm.td.sept.entry(gpa, above)
                table.state, table.page = NL_MAPPED, table.page or vm.new_page()
        vm.sptes[gpa | level] = PRESENT
        entry = vm.td.sept.entry(gpa, level)
        entry.state, entry.page = MAPPED, vm.new_page(level)
