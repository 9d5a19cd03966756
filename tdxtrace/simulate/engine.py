"""Run a scenario with a seed: set up the host, its VMs and threads, and simulate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.guest.programs import (
    HOSTILE_PROGRAMS,
    VcpuPlace,
    interrupt_handler,
    program_named,
)
from tdxtrace.simulate.host.machine import Machine
from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.host.vcpu_state import VcpuState
from tdxtrace.simulate.journal import Actor, Journal
from tdxtrace.simulate.kvm import lifecycle
from tdxtrace.simulate.kvm.policies import policy_named
from tdxtrace.simulate.kvm.vcpu_run import VcpuRun
from tdxtrace.simulate.kvm.vm import NO_VCPU, PRESENT, Vm
from tdxtrace.simulate.kvm.vmm_threads import Worker, WorkerSpec
from tdxtrace.simulate.module.abi import MAPPED, NL_MAPPED, ROOT_LEVEL, page_bytes
from tdxtrace.simulate.module.generations import GENERATIONS
from tdxtrace.simulate.module.state import RUNNABLE, Call, Vcpu
from tdxtrace.simulate.scenario import Scenario, TdSpec
from tdxtrace.simulate.thread import RandomStream, Thread

# Start of the private memory of a TD: 4 GB, where QEMU places high memory.
MEMORY: Final = 0x1_0000_0000
# Process ID of the first VM, and the distance to the next; arbitrary.
_FIRST_TGID: Final = 4242
_TGID_STEP: Final = 1500
_BUILD_PAGES: Final = 16
# Random streams reserved for one VM: main thread, vCPUs, workers.
_STREAMS: Final = 1 << 16
# Number of progress reports of a run.
_REPORTS: Final = 100


@dataclass(frozen=True, slots=True)
class Run:
    """A simulated scenario: its journal and its VMs."""

    scenario: Scenario
    seed: int
    journal: Journal
    vms: tuple[Vm, ...]
    end_ns: int
    """Length of the run, in ns; its times count from 0."""
    unfinished_entries: tuple[Call, ...] = ()
    """TDH.VP.ENTER calls that had not returned when the run ended."""


def run(scenario: Scenario, seed: int, report: Callable[[int], None] = lambda _: None) -> Run:
    """Simulate a scenario.

    Args:
        scenario: The scenario.
        seed: Seed of all random streams; the same scenario and seed give the same run on
            every machine.
        report: Called with the simulated ns so far, about a hundred times.

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
    vms = tuple(_make_vm(machine, scenario, spec, i, seed) for i, spec in enumerate(specs))
    end_ns = scenario.duration_ms * 1_000_000
    with _gc_paused():
        for now_ns in range(end_ns // _REPORTS, end_ns, max(end_ns // _REPORTS, 1)):
            machine.env.run(until=now_ns)
            report(now_ns)
        machine.env.run(until=end_ns)
    journal = machine.journal
    # A thread runs ahead of the clock up to its next interaction: its calls after the end of the
    # run are dropped.
    journal.truncate(end_ns)
    unfinished = (v.entering for vm in vms for v in vm.vcpus if v.entering is not None)
    return Run(scenario, seed, journal, vms, end_ns, tuple(unfinished))


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause the garbage collector.

    A run keeps nearly all of its objects; scanning them repeatedly took half of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _make_vm(machine: Machine, scenario: Scenario, spec: TdSpec, number: int, seed: int) -> Vm:
    vm = Vm(machine, number, policy_named(scenario.policy))
    vm.td.pending_ve_disable = spec.pending_ve_disable
    vm.large_pages = spec.large_pages
    vm.racing_init = spec.racing_init
    vm.fault_serial_ns, vm.fault_per_vcpu_ns = spec.fault_serial_ns, spec.fault_per_vcpu_ns
    vm.interrupt_mean_ns = scenario.interrupt_us * 1000
    tgid = _FIRST_TGID + number * _TGID_STEP
    vcpus = [_make_vcpu(vm, scenario, spec, i, (seed, tgid)) for i in range(spec.vcpus)]
    vm.vcpus = [vcpu.state for vcpu in vcpus]
    first = spec.guest.first_page
    vm.shared_pages = {MEMORY + (first + i << 12) for i in range(spec.mismatched)}
    main = Thread(tgid, tgid, "qemu-system-x86", RandomStream(seed, number * _STREAMS))
    actors = machine.journal.actors
    actors.append(Actor(main.tid, number, NO_VCPU, "host", "main", "honest"))
    for vcpu in vcpus:
        actors += _actors_of(vm, vcpu.state, spec)
    machine.env.process(_start_vm(vm, main, spec, scenario.no_entropy, vcpus))
    for i, work in enumerate(spec.workers):
        stream = number * _STREAMS + _STREAMS // 2 + i
        thread = Thread(tgid + 1000 + i, tgid, "worker", RandomStream(seed, stream))
        conduct = _host_conduct(vm, work.conduct)
        actors.append(Actor(thread.tid, number, NO_VCPU, "host", work.kind, conduct))
        machine.env.process(Worker(vm, thread, work, MEMORY).run())
    return vm


def _host_conduct(vm: Vm, conduct: str) -> str:
    """Return the conduct of a thread of the host; honest becomes buggy if the kernel has a bug."""
    is_buggy = vm.policy.zaps_shared or vm.racing_init
    return "buggy" if conduct == "honest" and is_buggy else conduct


def _actors_of(vm: Vm, state: VcpuState, spec: TdSpec) -> tuple[Actor, Actor]:
    """Return the actors of a vCPU: its thread on the host, and its guest."""
    ids = state.thread.tid, state.vcpu.td.number, state.vcpu.number
    is_attacked = state.refuses_faults or state.single_steps
    program = spec.guest.program
    is_hostile = program in HOSTILE_PROGRAMS
    return (
        Actor(
            *(*ids, "host", "vcpu"),
            _host_conduct(vm, "hostile" if is_attacked else "honest"),
        ),
        Actor(*ids, "guest", program, "hostile" if is_hostile else "honest"),
    )


def _make_vcpu(vm: Vm, scenario: Scenario, spec: TdSpec, i: int, ids: tuple[int, int]) -> VcpuRun:
    seed, tgid = ids
    random = RandomStream(seed, vm.number * _STREAMS + 1 + i)
    # QEMU's names of vCPU threads (system/cpus.c); the kernel keeps 15 characters.
    thread = Thread(tgid + 3 + i, tgid, f"CPU {i}/KVM", random)
    thread.cpu = i % scenario.cpus
    state = VcpuState(
        vm.machine,
        Vcpu(vm.td, i, vm.machine.module.generation),
        thread,
        interrupt_mean_ns=scenario.interrupt_us * 1000,
        event_mean_ns=scenario.event_us * 1000,
        userspace_share=spec.userspace_share,
        ignored_faults=spec.ignored_faults,
        refuses_faults=spec.refuses_faults and i == 0,
        single_steps=spec.single_steps and i == 0,
    )
    program = program_named(spec.guest.program)
    place = VcpuPlace(i, spec.vcpus, random, MEMORY)
    state.handler = interrupt_handler(spec.guest, place)
    return VcpuRun(vm, state, program(spec.guest, place))


def _start_vm(
    vm: Vm, main: Thread, spec: TdSpec, no_entropy: float, vcpus: list[VcpuRun]
) -> SimProcess[None]:
    """Build the TD, unless it was built before the trace, and start its vCPUs."""
    env = vm.machine.env
    if spec.build:
        main.cpu = yield from vm.machine.cpus.acquire(Worker(vm, main, WorkerSpec("zap"), 0), 0)
        gpas = [(1 << 20) + (i << 12) for i in range(_BUILD_PAGES)]
        yield from lifecycle.build(vm, main, gpas, no_entropy)
        yield from vm.machine.sync_clock(main)
        vm.machine.cpus.release(main.cpu)
    else:
        vm.td.op_state = RUNNABLE
        yield env.timeout(0)
    premap(vm, spec.accepted, in_blocks=any(work.kind == "merge" for work in spec.workers))
    for vcpu in vcpus:
        vcpu.state.process = env.process(vcpu.run())


def premap(vm: Vm, n_pages: int, in_blocks: bool = False) -> None:
    """Map and accept the first pages of a TD without a SEAMCALL, as before the trace.

    Args:
        vm: The VM.
        n_pages: Number of 4K pages.
        in_blocks: Whether the small pages of each 2 MB range are one aligned 2 MB block, as for
            memory whose pages the host will merge.
    """
    block = 0
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
        if level:
            vm.large_pages_at.add(gpa)
        entry = vm.td.sept.entry(gpa, level)
        if in_blocks and page % 512 == 0:
            block = vm.new_page(1)
        entry.state = MAPPED
        entry.page = block + (page % 512 << 12) if in_blocks else vm.new_page(level)
