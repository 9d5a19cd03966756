"""The host: its clock, its processors, and how a thread makes a SEAMCALL on it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final

import simpy

from tdxtrace.simulate.draws import Span
from tdxtrace.simulate.generations import Generation
from tdxtrace.simulate.journal import UNSETTLED, Event, Journal, Request
from tdxtrace.simulate.module import Module
from tdxtrace.simulate.mutex import Cpus, RwLock
from tdxtrace.simulate.state import Call, Refusal
from tdxtrace.simulate.threads import Thread
from tdxtrace.simulate.times import Times
from tdxtrace.simulate.words import HIGH_HALF, RND_NO_ENTROPY, SUCCESS

Steps = Generator[simpy.Event, object, None]
Asked = Generator[simpy.Event, object, int]

# RDRAND_RETRY_LOOPS: sc_retry() makes at most 10 calls while there is no entropy.
# Linux arch/x86/include/asm/archrandom.h, asm/tdx.h.
ENTROPY_CALLS: Final = 10
# How often a condition is looked at that has no event of its own; a choice of the model.
POLL_NS: Final = 250


class Machine:
    """One host: what its threads share."""

    def __init__(self, generation: Generation, times: Times, n_cpus: int, hp_timeout: int) -> None:
        self.env = simpy.Environment()
        self.module = Module(generation)
        self.times = times
        self.cpus = Cpus(self.env, n_cpus)
        self.journal = Journal()
        self.hp_timeout_ns = hp_timeout
        # Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_lock: CREATE, CACHE.WB, VPFLUSHDONE, FREEID.
        self.tdx_lock = RwLock(self.env)
        # static u32 max of the seed's loop: one for the host, never lowered.
        self.retry_max = 16
        self.in_handler = [False] * n_cpus
        """Whether a call is made in interrupt context on each processor."""
        self._wrappers = 0

    def catch_up(self, thread: Thread) -> Steps:
        """Let the clock come to where a thread is: before it meets others."""
        behind = thread.now - self.env.now
        if behind > 0:
            yield self.env.timeout(behind)
        else:
            thread.now = int(self.env.now)

    def lock(self, thread: Thread, lock: RwLock, alone: bool) -> Steps:
        """Let a thread take a lock of the kernel's, waiting for it if need be."""
        behind = thread.now - self.env.now
        if behind > 0:
            yield self.env.timeout(behind)
        if alone or not lock.try_read():
            thread.parked = True
            yield from lock.write() if alone else lock.read()
            thread.parked = False
        thread.now = int(self.env.now)

    def attempt(self, thread: Thread, request: Request, call: Call, work: Span) -> Asked:
        """Make one SEAMCALL for a request, and write it down; returns its status."""
        env, draws, times = self.env, thread.draws, self.times
        if not call.wrapper:
            call.wrapper = self.new_wrapper()
        if self.in_handler[thread.cpu] and not call.in_irq:
            yield from self.not_interrupted(thread)
        call.thread, call.cpu = thread, thread.cpu
        thread.now += draws.span(times.entry_probe)
        call.start_ns = thread.now
        thread.now += draws.span(times.into_module)
        if thread.now > env.now:
            yield env.timeout(thread.now - env.now)
        status = self.module.begin(call, call.version)
        if status == SUCCESS:
            yield env.timeout(draws.span(work))
            status = self.module.finish(call)
        thread.now = int(env.now) + draws.span(times.out_of_module)
        call.end_ns, call.status, call.entry = thread.now, status, None
        if call.refusal is None and status & HIGH_HALF in UNSETTLED:
            call.refusal = Refusal(UNSETTLED[status & HIGH_HALF], (), False)
        self.journal.answered(request, call)
        return status

    def not_interrupted(self, thread: Thread) -> Steps:
        """Stand aside while an interrupt handler has the thread's processor."""
        yield from self.catch_up(thread)
        while self.in_handler[thread.cpu]:
            thread.parked = True
            yield self.env.timeout(POLL_NS)
        thread.parked = False
        thread.now = int(self.env.now)

    def new_wrapper(self) -> int:
        """A number for one call of a wrapper function of the kernel's."""
        self._wrappers += 1
        return self._wrappers

    def with_entropy(
        self, thread: Thread, request: Request, make: Callable[[], Call], scarcity: float
    ) -> Asked:
        """Make a call as sc_retry() does: again, at once, while the module finds no entropy."""
        wrapper, status = self.new_wrapper(), RND_NO_ENTROPY
        for _ in range(ENTROPY_CALLS):
            call = make()
            call.wrapper = wrapper
            call.no_entropy = thread.draws.chance(scarcity)
            status = yield from self.attempt(thread, request, call, self.times.manage)
            if status != RND_NO_ENTROPY:
                break
        return status

    def note(self, thread: Thread, name: str, *fields: object) -> None:
        """Write down an event of the kernel's own, at the thread's time."""
        self.journal.events.append(Event(thread.now, thread.cpu, thread, name, fields))
