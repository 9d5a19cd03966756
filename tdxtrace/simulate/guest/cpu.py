"""The guest side of a vCPU: its current steps, its interrupts, its stepping filter.

Each step has its own RIP: a step that faults is restarted at the same RIP, a completed step is
progress.  Every VM exit, even one that the module handles itself, passes the stepping filter
(intel/tdx-module ``src/td_transitions/td_exit_stepping.c``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import simpy

from tdxtrace.simulate.guest.programs import Frame, Step, VmExit
from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.host.vcpu_state import VcpuState
from tdxtrace.simulate.journal import CountedFault, Episode
from tdxtrace.simulate.module.abi import EXIT_INTERRUPT

# Distance between the RIPs of two steps: more than the 32 bytes that single-stepping is
# suspected within (td_exit_stepping.c, INTEL64_MAX_INST_LEN doubled).
_RIP_STEP: Final = 64
_INTERRUPT_VECTOR: Final = 0x800000EC


class GuestCpu:
    """The program of one vCPU and the stack of its current steps."""

    def __init__(self, state: VcpuState, program: Iterator[Step]) -> None:
        self.state = state
        self.td = state.vcpu.td
        self.env = state.machine.env
        self.program = program
        self.frames: list[Frame] = []
        self.n_progress = 0
        """Number of completed instructions, as far as the model distinguishes them."""
        self._faults: list[CountedFault] = []
        self._last_rip = 0x1000_0000

    def next_rip(self) -> int:
        """Return a new RIP."""
        self._last_rip += _RIP_STEP
        return self._last_rip

    def push(self, step: Step) -> None:
        """Begin a step, at a new RIP."""
        self.frames.append(Frame(step, self.next_rip()))

    def pop(self) -> None:
        """Complete the step on top of the stack; RIP advances."""
        self.state.vcpu.rip = self.frames.pop().rip + 1
        self.n_progress += 1

    def must_exit(self) -> bool:
        """Return whether an IPI or an interrupt of the host CPU is pending."""
        return self.state.ipi_pending or self.state.next_interrupt <= self.env.now

    def apply_stepping_filter(self, rip: int) -> None:
        """Apply the module's filter to a VM exit at ``rip``, whether it reaches the host or not."""
        state, zero_step = self.state, self.state.vcpu.zero_step
        if rip != zero_step.entry_rip:
            self._faults = []
            if state.episode is not None:
                state.episode.cleared_ns = int(self.env.now)
                state.episode = None
        zero_step.on_exit(rip)

    def count_fault(self, gpa: int | None) -> None:
        """Count an EPT violation that becomes a TD exit and counts for zero-step."""
        state = self.state
        entry = self.td.sept.mapping(gpa or 0)
        state.fault = CountedFault(gpa or 0, entry.state, entry.blocked_by)
        self._faults.append(state.fault)
        if state.vcpu.zero_step.on_counted_fault(gpa):
            vcpu, now = state.vcpu, int(self.env.now)
            state.episode = Episode(
                state.thread, self.td.number, vcpu.number, vcpu.rip, gpa or 0, now, 0, self._faults
            )
            state.machine.journal.episodes.append(state.episode)
        if state.episode is not None:
            state.episode.n_faults = len(self._faults)

    def exit_for_interrupt(self) -> VmExit:
        """Return the exit that a pending interrupt causes."""
        state, now = self.state, int(self.env.now)
        state.ipi_pending = False
        if state.next_interrupt <= now:
            state.next_interrupt = now + 1 + state.random.exponential(state.interrupt_mean_ns)
        self.apply_stepping_filter(state.vcpu.rip)
        return VmExit(EXIT_INTERRUPT, interruption=_INTERRUPT_VECTOR)

    def elapse(self, ns: int, masked: bool = False) -> SimProcess[int]:
        """Run the guest for at most ``ns``; returns the ns until it was interrupted.

        Args:
            ns: Maximum time.
            masked: Whether interrupts are masked: in the module, or in a short handler.
        """
        state, env = self.state, self.env
        if not masked:
            if state.ipi_pending:
                return 0
            ns = min(ns, max(0, state.next_interrupt - int(env.now)))
        if ns <= 0:
            return 0
        began = int(env.now)
        state.interruptible = not masked
        try:
            yield env.timeout(ns)
        except simpy.Interrupt:
            state.ipi_pending = True
        state.interruptible = False
        return int(env.now) - began
