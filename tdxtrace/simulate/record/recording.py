"""The contents of a tracer's buffer after a run: events and losses in order."""

from __future__ import annotations

from dataclasses import dataclass

from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.record.tracepoints import EventSpec, field_text


@dataclass(slots=True)
class TraceEvent:
    """One event in the tracer's buffer; ``ts_ns`` is on the trace's clock."""

    ts_ns: int
    cpu: int
    tid: int
    tgid: int
    comm: str
    irq: bool
    spec: EventSpec
    values: tuple[int, ...]
    calls: tuple[Call, ...] = ()
    """SEAMCALLs that start at this entry event, or end at this return event or kvm_exit."""

    def flags(self) -> str:
        """irqs-off, need-resched, context, preempt depth, migrate-disable, as printed."""
        if self.irq:
            return "d.h1."
        if self.spec.name in ("kvm_entry", "kvm_exit"):
            return "d..1."
        # Fault and zap paths hold mmu_lock, a spinlock: preemption is off.
        in_lock = self.spec.function.startswith(("tdh_mem_", "__seamcall"))
        return "...1." if in_lock else "....."

    def fields_text(self) -> str:
        """The fetched arguments of a probe as text, each preceded by a blank."""
        return "".join(
            f" {name}={field_text(kind, value)}"
            for (name, kind), value in zip(self.spec.fields, self.values, strict=True)
        )


@dataclass(frozen=True, slots=True)
class LostEvents:
    """A gap: events of one CPU that did not fit into the buffer."""

    ts_ns: int
    cpu: int
    n_events: int
    tid: int = 0
    comm: str = "<idle>"
    is_counted: bool = True
    """Whether the ring buffer stored the number of lost events."""


@dataclass(slots=True)
class Recording:
    """Events and losses in the order in which they are read back."""

    items: list[TraceEvent | LostEvents]
    n_cpus: int
    kernel: str
    n_written: int = 0
    """Events written to the buffer, including overwritten ones."""
    repeat: int = 1
    """Number of times that the events are written, for a large file."""
    cut_share: float = 0.0
    """Share of the file that is truncated at its end."""

    def events(self) -> list[TraceEvent]:
        """The events that were not lost."""
        return [item for item in self.items if isinstance(item, TraceEvent)]


RenderedLines = list[tuple[str, TraceEvent | LostEvents | None]]
"""Lines, each with the event or the loss that it prints; None for a header line."""
