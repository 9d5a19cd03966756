"""Slots that the fields of binary events fill: the same rules as for text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tdxtrace.ingest.events import out_of_tree
from tdxtrace.ingest.events.registry import Event, EventRegistry
from tdxtrace.ingest.records.formats import EventFormat, Field

# Fields of KVM's tracepoints, Linux arch/x86/kvm/trace.h and include/trace/events/kvm.h.
_KVM_SLOTS: Final[Mapping[str, Mapping[str, str]]] = {
    "kvm_entry": {"vcpu_id": "vcpu_id", "immediate_exit": "immediate_exit"},
    "kvm_exit": {
        "exit_reason": "exit_reason",
        "guest_rip": "rip",
        "isa": "isa",
        **{name: name for name in ("info1", "info2", "intr_info", "error_code", "requests")},
        "vcpu_id": "vcpu_id",
    },
    "kvm_page_fault": {
        "vcpu_id": "vcpu_id",
        "guest_rip": "rip",
        "fault_address": "gpa",
        "error_code": "error_code",
    },
    "kvm_userspace_exit": {"reason": "reason", "errno": "signed_errno"},
}
# What an event cannot do without; other architectures have events of these names
# with other fields.
_KVM_NEEDS: Final = {"kvm_entry": "vcpu_id", "kvm_exit": "exit_reason", "kvm_page_fault": "gpa"}
# SEAMCALL tracepoints out of tree: their registers and what they call them (out_of_tree.py).
_PROPOSED_SLOTS: Final = {
    "entry": {"op": "fn", "gpa": "gpa", "hpa": "page", "level": "level"}
    | {name: name for name in ("rcx", "rdx", "r8")},
    "return": {"op": "fn", "err": "status", "rcx": "out_rcx", "rdx": "out_rdx"},
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How records of one event number are read."""

    event: int
    """Index into the registry's events."""
    kind: str
    """Of the event: ``call``, ``noise``…; ``undecoded`` where its fields are not those known."""
    name: str
    reads: Mapping[str, Field]
    """The field to read for each slot."""
    size: int
    """Bytes a record must have, so that every field lies in it."""

    @property
    def is_wanted(self) -> bool:
        """Whether its records become rows."""
        return self.kind not in ("noise", "unmapped", "undecoded")


def layout_of(
    made: EventFormat, name: str, registry: EventRegistry, symbol: str | None = None
) -> Layout:
    """Say how to read the records of an event.

    Args:
        made: Its format.
        name: What the recording's own tool prints as its name.
        registry: Where the event is looked up, and added.
        symbol: The kernel function at its probe, where the recording tells.
    """
    index = registry.event_id(name, _as_text(made, symbol))
    event = registry.events[index]
    reads = {} if event.kind in ("noise", "unmapped") else _reads(made, event)
    needs = tuple("fn" if need == "leaf" else need for need in event.needs)
    kind: str = event.kind
    if any(need not in reads for need in (*needs, *_needs_of(made.name))):
        kind, reads = "undecoded", {}
    size = max((place.end for place in reads.values()), default=0)
    return Layout(index, kind, name, reads, size)


def _needs_of(name: str) -> tuple[str, ...]:
    return (_KVM_NEEDS[name],) if name in _KVM_NEEDS else ()


def _as_text(made: EventFormat, symbol: str | None) -> str:
    """What a line of the event would show of its probe: enough to recognise it by.

    A probe's address is printed as a symbol by the kernel, as a number by tools.
    """
    keys = " ".join(f"{key}=" for key in made.fields if not key.startswith("common_"))
    if symbol is None:
        return keys
    if "__probe_ret_ip" in made.fields:
        return f"(caller <- {symbol}) {keys}"
    return f"({symbol}+0x0/0x0) {keys}"


def _reads(made: EventFormat, event: Event) -> dict[str, Field]:
    slots = _KVM_SLOTS.get(made.name, event.slots)
    if made.name in out_of_tree.DECODERS:
        slots = _PROPOSED_SLOTS[out_of_tree.DECODERS[made.name][0]]
    reads: dict[str, Field] = {}
    for key, place in made.fields.items():
        slot = None if key.startswith("common_") else slots.get(key.lower())
        if slot is not None and place.is_number:
            reads.setdefault(slot, place)
    return reads
