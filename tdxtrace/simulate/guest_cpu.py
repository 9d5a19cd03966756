"""A vCPU inside its guest: what it does until it comes out, and with which exit.

A guest is a stream of steps (``guests``).  Each has a RIP of its own: a step that
faults is begun again at the same RIP, one that is done is progress.  Every VM exit,
also one that the module handles inside, passes the stepping filter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Final

import simpy

from tdxtrace.simulate import tdcalls
from tdxtrace.simulate.journal import Episode
from tdxtrace.simulate.steps import (
    ACCEPT,
    ATTR,
    CALL,
    REPEAT,
    RUN,
    TOUCH,
    Exit,
    Frame,
    Guest,
    Step,
)
from tdxtrace.simulate.words import (
    EXIT_EPT_VIOLATION,
    EXIT_INTERRUPT,
    EXIT_TDCALL,
    MAPPED,
    PENDING,
)

if TYPE_CHECKING:
    from tdxtrace.simulate.vcpu import VcpuTask

# Extended exit qualification of an EPT violation, type in bits 3:0: 6 is a pending page
# (Linux 6.16 arch/x86/kvm/vmx/tdx.h, EXT_EXIT_QUAL_TYPE_PENDING_EPT_VIOLATION).
PENDING_VIOLATION: Final = 6
# How far apart the RIPs of two steps are: more than the 32 bytes that single-stepping is
# suspected within (td_exit_stepping.c, INTEL64_MAX_INST_LEN doubled).
_RIP_STEP: Final = 64
# RCX of a TDG.VP.VMCALL exit tells which registers the guest passes on; of no meaning here.
_VMCALL_REGISTERS: Final = 0xFC00
_COPY_PAGE_NS: Final = 400
_INTERRUPT_VECTOR: Final = 0x800000EC


class GuestCpu:
    """The guest's side of one vCPU."""

    def __init__(self, task: VcpuTask, program: Iterator[Step]) -> None:
        self.task = task
        self.program = program
        self.frames: list[Frame] = []
        self.kicked = False
        self.interruptible = False
        self.lead_ns = 0
        """Time of the entry itself that is still to pass before the guest's first step."""
        self.next_interrupt = 0
        """When the host's processor is interrupted next, in ns."""
        self.next_event = 0
        """When the guest itself is interrupted next: a timer, an IPI."""
        self.episode: Episode | None = None
        self.n_faults = 0
        self._rips = 0x1000_0000

    def run(self) -> Guest:
        """Run from entry to exit; returns the exit."""
        env, task = self.task.machine.env, self.task
        if self.frames and self.frames[-1].step[0] == ACCEPT:
            pass  # its first wait takes the time of the entry in
        elif self.lead_ns:
            lead, self.lead_ns = self.lead_ns, 0
            yield env.timeout(lead)
        if self.next_event <= env.now:
            self.next_event = int(env.now) + task.draws.exponential(task.event_mean_ns)
            yield from self.elapse(task.draws.span(task.times.guest_interrupt), masked=True)
        while True:
            if self.kicked or self.next_interrupt <= env.now:
                return self._interrupted()
            if not self.frames:
                self.push(next(self.program))
            frame = self.frames[-1]
            task.vcpu.rip = frame.rip
            exit_ = yield from self._step(frame)
            if exit_ is not None:
                return exit_

    def _step(self, frame: Frame) -> Guest:
        kind = frame.step[0]
        if kind == RUN:
            yield from self._run(frame)
            return None
        if kind == TOUCH:
            return (yield from self._touch(frame, frame.step[1]))
        if kind == REPEAT:
            return (yield from self._repeat(frame))
        if kind in (ACCEPT, ATTR):
            return (yield from tdcalls.tdcall(self, frame))
        assert kind == CALL
        self.passes_filter(frame.rip)
        self.pop()
        self.task.asked = frame.step[2:]
        return Exit(EXIT_TDCALL, _VMCALL_REGISTERS, asked=frame.step[1])

    def push(self, step: Step) -> None:
        """Begin a step, at a RIP of its own."""
        self._rips += _RIP_STEP
        self.frames.append(Frame(step, self._rips))

    def pop(self) -> None:
        """A step is done: the guest stands behind it."""
        self.task.vcpu.rip = self.frames.pop().rip + 1

    def _run(self, frame: Frame) -> Generator[simpy.Event, object, None]:
        left = frame.step[1] - frame.done
        took = yield from self.elapse(left)
        frame.done += took
        if took:
            self._rips += _RIP_STEP
            self.task.vcpu.rip = frame.rip = self._rips
        if took >= left:
            self.pop()

    def _touch(self, frame: Frame, gpa: int) -> Guest:
        exit_ = self._fault(frame, gpa)
        if exit_ is None and self.frames[-1] is frame:
            self.pop()
        elif exit_ is None:
            yield from self.elapse(self.task.draws.span(self.task.times.handle_ve), masked=True)
        return exit_

    def _repeat(self, frame: Frame) -> Guest:
        pages = frame.step[2]
        while frame.done < len(pages):
            exit_ = self._fault(frame, pages[frame.done])
            if exit_ is not None or self.frames[-1] is not frame:
                return exit_
            frame.done += 1
            yield from self.elapse(_COPY_PAGE_NS, masked=True)
            if self.kicked or self.next_interrupt <= self.task.machine.env.now:
                return None
        self.pop()
        return None

    def _fault(self, frame: Frame, gpa: int) -> Exit | None:
        """Access a page: nothing, #VE (a frame on top), or an EPT violation to the host."""
        td = self.task.vm.td
        state = td.sept.mapping(gpa).state
        if state == MAPPED:
            return None
        self.passes_filter(frame.rip)
        pending = state == PENDING
        if pending and not td.pending_ve_disable:
            self.push((ACCEPT, gpa & -4096, 0))
            return None
        self.count_fault(gpa)
        access = frame.step[-1]
        assert isinstance(access, int)
        extended = PENDING_VIOLATION if pending else 0
        return Exit(EXIT_EPT_VIOLATION, access, extended, gpa & -4096)

    def passes_filter(self, rip: int) -> None:
        """A VM exit at ``rip``, seen by the module whether the host sees it or not."""
        zero_step = self.task.vcpu.zero_step
        if rip != zero_step.entry_rip:
            self.n_faults = 0
            if self.episode is not None:
                self.episode.cleared_ns = int(self.task.machine.env.now)
                self.episode = None
        zero_step.on_exit(rip)

    def count_fault(self, gpa: int | None) -> None:
        """An EPT violation that becomes a TD exit, of the kind that counts for zero-step."""
        task = self.task
        self.n_faults += 1
        if task.vcpu.zero_step.on_counted_fault(gpa):
            now = int(task.machine.env.now)
            self.episode = Episode(
                task.thread, task.vm.number, task.vcpu.number, task.vcpu.rip, gpa or 0, now, 0
            )
            task.machine.journal.episodes.append(self.episode)
        if self.episode is not None:
            self.episode.n_faults = self.n_faults

    def _interrupted(self) -> Exit:
        now, task = int(self.task.machine.env.now), self.task
        self.kicked = False
        if self.next_interrupt <= now:
            self.next_interrupt = now + 1 + task.draws.exponential(task.interrupt_mean_ns)
        self.passes_filter(task.vcpu.rip)
        return Exit(EXIT_INTERRUPT, interruption=_INTERRUPT_VECTOR)

    def elapse(self, ns: int, masked: bool = False) -> Generator[simpy.Event, object, int]:
        """Let the guest run for ``ns``; returns how long it did before it was interrupted.

        Args:
            ns: How long at most.
            masked: Whether interrupts wait: inside the module, or in a short handler.
        """
        env = self.task.machine.env
        if not masked:
            if self.kicked:
                return 0
            ns = min(ns, max(0, self.next_interrupt - int(env.now)))
        if ns <= 0:
            return 0
        began = int(env.now)
        self.interruptible = not masked
        try:
            yield env.timeout(ns)
        except simpy.Interrupt:
            self.kicked = True
        self.interruptible = False
        return int(env.now) - began
