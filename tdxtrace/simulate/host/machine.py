"""One host: its clock, its CPUs, its TDX module, and SEAMCALLs of its threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import simpy

from tdxtrace.simulate.durations import Duration, Durations
from tdxtrace.simulate.host.scheduler import CpuScheduler, RwLock, SimProcess
from tdxtrace.simulate.journal import RETRYABLE, Journal, KernelEvent, Request
from tdxtrace.simulate.module.abi import HIGH_HALF, RND_NO_ENTROPY, SUCCESS
from tdxtrace.simulate.module.dispatcher import Module
from tdxtrace.simulate.module.generations import Generation
from tdxtrace.simulate.module.state import BusyReason, Call
from tdxtrace.simulate.thread import Thread

# RDRAND_RETRY_LOOPS: sc_retry() makes at most 10 calls without entropy.
# Linux arch/x86/include/asm/archrandom.h, asm/tdx.h.
ENTROPY_CALLS: Final = 10
# Interval for polling conditions that have no event; a choice of the model.
POLL_NS: Final = 250


class Machine:
    """One host, shared by all of its threads.

    Args:
        generation: Lock generation of its TDX module.
        durations: Distributions of all durations.
        n_cpus: Number of CPUs.
        hp_timeout: Host-priority timeout of the module, in ns.
    """

    def __init__(
        self, generation: Generation, durations: Durations, n_cpus: int, hp_timeout: int
    ) -> None:
        self.env = simpy.Environment()
        self.module = Module(generation)
        self.durations = durations
        self.cpus = CpuScheduler(self.env, n_cpus)
        self.journal = Journal()
        self.hp_timeout_ns = hp_timeout
        # Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_lock: CREATE, CACHE.WB, VPFLUSHDONE, FREEID.
        self.tdx_lock = RwLock(self.env)
        # static u32 max of the policy seed-loop: one for the host, never lowered.
        self.retry_max = 16
        self.in_irq_handler = [False] * n_cpus
        """Whether each CPU makes a SEAMCALL in interrupt context."""
        self._n_wrapper_calls = 0

    def sync_clock(self, thread: Thread) -> SimProcess[None]:
        """Advance the simulation's clock to a thread's, before it interacts with others."""
        ahead = thread.now - self.env.now
        if ahead > 0:
            yield self.env.timeout(ahead)
        else:
            thread.now = int(self.env.now)

    def acquire_lock(self, thread: Thread, lock: RwLock, exclusive: bool) -> SimProcess[None]:
        """Acquire a kernel lock for a thread, waiting if necessary."""
        ahead = thread.now - self.env.now
        if ahead > 0:
            yield self.env.timeout(ahead)
        if exclusive or not lock.try_read():
            thread.irqs_enabled = True
            yield from lock.write() if exclusive else lock.read()
            thread.irqs_enabled = False
        thread.now = int(self.env.now)

    def seamcall(
        self, thread: Thread, request: Request, call: Call, work: Duration
    ) -> SimProcess[int]:
        """Make one SEAMCALL for a request and record it; returns its status.

        Args:
            thread: The calling thread.
            request: The request to which the attempt belongs.
            call: The call, not yet made.
            work: Duration of the leaf's work, during which it holds its locks.
        """
        env, random, durations = self.env, thread.random, self.durations
        if not call.wrapper_call:
            call.wrapper_call = self.next_wrapper_call()
        if self.in_irq_handler[thread.cpu] and not call.in_irq:
            yield from self.wait_for_irq_handler(thread)
        call.thread, call.cpu = thread, thread.cpu
        thread.now += random.duration(durations.entry_probe)
        call.start_ns = thread.now
        thread.now += random.duration(durations.into_module)
        if thread.now > env.now:
            yield env.timeout(thread.now - env.now)
        status = self.module.begin(call, call.version)
        if status == SUCCESS:
            yield env.timeout(random.duration(work))
            status = self.module.finish(call)
        thread.now = int(env.now) + random.duration(durations.out_of_module)
        call.end_ns, call.status, call.entry = thread.now, status, None
        if call.busy_reason is None and status & HIGH_HALF in RETRYABLE:
            call.busy_reason = BusyReason(RETRYABLE[status & HIGH_HALF], (), False)
        self.journal.add_attempt(request, call)
        return status

    def wait_for_irq_handler(self, thread: Thread) -> SimProcess[None]:
        """Wait until no interrupt handler runs on the thread's CPU."""
        yield from self.sync_clock(thread)
        while self.in_irq_handler[thread.cpu]:
            thread.irqs_enabled = True
            yield self.env.timeout(POLL_NS)
        thread.irqs_enabled = False
        thread.now = int(self.env.now)

    def next_wrapper_call(self) -> int:
        """Return a new number for one call of a wrapper function of the kernel (``tdh_*``)."""
        self._n_wrapper_calls += 1
        return self._n_wrapper_calls

    def sc_retry(
        self, thread: Thread, request: Request, make_call: Callable[[], Call], no_entropy: float
    ) -> SimProcess[int]:
        """Repeat a call immediately while the module finds no entropy, as sc_retry does.

        Args:
            thread: The calling thread.
            request: The request to which the attempts belong.
            make_call: Makes the next call.
            no_entropy: Probability that a call finds no entropy.
        """
        wrapper_call, status = self.next_wrapper_call(), RND_NO_ENTROPY
        for _ in range(ENTROPY_CALLS):
            call = make_call()
            call.wrapper_call = wrapper_call
            call.no_entropy = thread.random.chance(no_entropy)
            status = yield from self.seamcall(thread, request, call, self.durations.manage)
            if status != RND_NO_ENTROPY:
                break
        return status

    def log_event(self, thread: Thread, name: str, *fields: object) -> None:
        """Record an event of the kernel, at the thread's time."""
        event = KernelEvent(thread.now, thread.cpu, thread, name, fields)
        self.journal.events.append(event)
