"""The state of one vCPU, shared by KVM's run loop, its exit handlers and the guest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import simpy

from tdxtrace.simulate.durations import Durations
from tdxtrace.simulate.host.machine import Machine
from tdxtrace.simulate.journal import CountedFault, Episode
from tdxtrace.simulate.module.state import Call, Vcpu
from tdxtrace.simulate.thread import RandomStream, Thread


@dataclass(slots=True, eq=False)
class VcpuState:
    """One vCPU: its thread, the module's record of it, pending interrupts, counters.

    All times are ns of the simulation's clock.
    """

    machine: Machine
    vcpu: Vcpu
    thread: Thread
    interrupt_mean_ns: int = 1_000_000
    """Mean time between interrupts of the host CPU."""
    event_mean_ns: int = 1_000_000
    """Mean time between the guest's own interrupts."""
    userspace_share: float = 0.0
    """Share of the I/O exits that are passed to the VMM."""
    ignored_faults: int = 0
    """KVM_EXIT_MEMORY_FAULT exits in a row that the VMM ignores before it converts the page."""
    refuses_faults: bool = False
    """Whether the host does not handle private faults: a zero-step attack."""
    single_steps: bool = False
    """Whether the host interrupts each entry after one instruction."""
    vmcall_arguments: tuple[Any, ...] = ()
    """Arguments of the guest's last TDG.VP.VMCALL: for MapGPA the pages, and whether shared."""
    inside: bool = False
    """Whether a TDH.VP.ENTER is in progress."""
    n_entries: int = 0
    entering: Call | None = None
    """The TDH.VP.ENTER that runs the guest now."""
    process: simpy.Process | None = None
    ipi_pending: bool = False
    """Whether an IPI arrived that has not yet caused an exit."""
    interruptible: bool = False
    """Whether an IPI interrupts the guest's current wait immediately."""
    entry_delay_ns: int = 0
    """Time of the entry before the guest's first step."""
    next_interrupt: int = 0
    """Time of the host CPU's next interrupt."""
    next_event: int = 0
    """Time of the guest's own next interrupt: a timer, an IPI."""
    episode: Episode | None = None
    """The zero-step episode in progress, if the gate is armed."""
    handler: Iterator[Any] = field(default_factory=lambda: iter(()))
    """Steps of the guest's interrupt handlers, one for each interrupt."""
    last_status: int = 0
    """Status of its last TDH.VP.ENTER: vp_enter_ret."""
    last_gpa: int = 0
    """R8 of that entry: exit_gpa."""
    nmi_pending: bool = False
    """Whether the host has an NMI to inject before the next entry."""
    fault: CountedFault | None = None
    """The last fault that the module counted, until KVM has handled it."""
    random: RandomStream = field(init=False)
    durations: Durations = field(init=False)

    def __post_init__(self) -> None:
        self.random = self.thread.random
        self.durations = self.machine.durations

    def kick(self, entry: int | None = None) -> None:
        """Deliver an IPI; ignored unless the vCPU is still in entry number ``entry``."""
        if not self.inside or entry not in (None, self.n_entries):
            return
        if self.interruptible and self.process is not None:
            self.interruptible = False
            self.process.interrupt()
        else:
            self.ipi_pending = True

    def has_event(self) -> bool:
        """Return whether an event is pending (kvm_vcpu_has_events), which ends the local loop."""
        return self.next_event <= self.thread.now
