"""Layouts of binary event records by event ID: offsets of fields and the slots that they fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import SLOTS, FieldLayouts, I64Array
from tdxtrace.ingest.events.fields import OUT_OF_TREE
from tdxtrace.ingest.events.registry import Event, EventRegistry, function_named
from tdxtrace.ingest.loops.pages import CommonFields
from tdxtrace.ingest.records.formats import Common, EventFormat, Field, common_of
from tdxtrace.ingest.stats import SourceStats

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
    "kvm_pio": {
        **{"rw": "is_write", "val": "value"},
        **{name: name for name in ("port", "size", "count")},
    },
    "kvm_userspace_exit": {"reason": "reason", "errno": "signed_errno"},
    "kvm_vm_set_mem_attributes": {"start": "gfn", "end": "gfn_end", "attr": "value"},
}
# Required slots: other architectures have events of these names with other fields.
_KVM_NEEDS: Final = {"kvm_entry": "vcpu_id", "kvm_exit": "exit_reason", "kvm_page_fault": "gpa"}
# Fields of out-of-tree SEAMCALL tracepoints (see OUT_OF_TREE).
_PROPOSED_SLOTS: Final = {
    "entry": {"op": "fn", "fn": "fn", "gpa": "gpa", "hpa": "page", "level": "level"}
    | {name: name for name in ("rcx", "rdx", "r8")},
    "return": {"op": "fn", "fn": "fn", "err": "status", "rcx": "out_rcx", "rdx": "out_rdx"},
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How to read the records of one event ID."""

    event: int
    """Index into the registry's events."""
    kind: str
    """Kind of the event: ``call``, ``noise``…; ``undecoded`` if it lacks required fields."""
    name: str
    reads: Mapping[str, Field]
    """The field to read for each slot."""
    size: int
    """Least bytes of a record, so that every field lies within it."""

    @property
    def is_used(self) -> bool:
        """Whether its records become rows."""
        return self.kind not in ("noise", "unmapped", "undecoded")


def layout_of(
    event_format: EventFormat, name: str, registry: EventRegistry, symbol: str | None = None
) -> Layout:
    """Return the layout of an event's records.

    Args:
        event_format: The event's format.
        name: The event's name as the recording's own tool prints it.
        registry: Registry in which the event is looked up or added.
        symbol: The kernel function at its probe, if the recording has it.
    """
    index = registry.event_id(name, _as_text(event_format, symbol))
    event = registry.events[index]
    reads = {} if event.kind in ("noise", "unmapped") else _reads(event_format, event)
    needs = tuple("fn" if need == "leaf" else need for need in event.needs)
    kind: str = event.kind
    if any(need not in reads for need in (*needs, *_needs_of(event_format.name))):
        kind, reads = "undecoded", {}
    size = max((record_field.end for record_field in reads.values()), default=0)
    return Layout(index, kind, name, reads, size)


def _needs_of(name: str) -> tuple[str, ...]:
    return (_KVM_NEEDS[name],) if name in _KVM_NEEDS else ()


def _as_text(event_format: EventFormat, symbol: str | None) -> str:
    """Return text like the event's printed lines, with enough of its probe to classify it.

    The kernel prints a probe's address as a symbol, tools print it as a number.
    """
    keys = " ".join(f"{key}=" for key in event_format.fields if not key.startswith("common_"))
    if symbol is None:
        return keys
    if "__probe_ret_ip" in event_format.fields:
        return f"(caller <- {symbol}) {keys}"
    return f"({symbol}+0x0/0x0) {keys}"


def _reads(event_format: EventFormat, event: Event) -> dict[str, Field]:
    slots = _KVM_SLOTS.get(event_format.name, event.slots)
    if event.probe == "tracepoint" and event_format.name in OUT_OF_TREE:
        slots = _PROPOSED_SLOTS[OUT_OF_TREE[event_format.name][0]]
    reads: dict[str, Field] = {}
    for key, record_field in event_format.fields.items():
        slot = None if key.startswith("common_") else slots.get(key.lower())
        if slot is not None and record_field.is_number:
            reads.setdefault(slot, record_field)
    return reads


PADDING: Final = 32
"""Bytes that must follow the last record, so that reads of its common fields stay in bounds."""


def int64_at(data: NDArray[np.uint8]) -> I64Array:
    """Return the 64-bit number that begins at each byte: a view that needs no alignment.

    Args:
        data: Records of a little-endian machine, and PADDING bytes.
    """
    return np.ndarray((max(0, len(data) - 7),), "<i8", data.data, strides=(1,))


def common_fields_of(common: Common) -> CommonFields:
    """Return the offsets of the common fields; fields of unusual sizes count as absent."""
    kind = common.type
    return (
        kind.offset,
        0xFF if kind.size == 1 else 0xFFFF,
        _offset(common.pid, 4),
        _offset(common.flags, 1),
        _offset(common.preempt_count, 1),
    )


def _offset(record_field: Field | None, size: int) -> int:
    return (
        record_field.offset
        if record_field and record_field.is_number and record_field.size == size
        else -1
    )


@dataclass(slots=True)
class FieldTables:
    """Tables of layouts and their fields: arrays for ``loops.pages``."""

    slots: FieldLayouts = field(default_factory=FieldLayouts)
    """The slots that the words of records fill."""
    n: int = 0
    """Number of layouts."""
    n_fields: int = 0
    layouts: I64Array = field(default_factory=lambda: np.zeros((16, 5), np.int64))
    """By layout: FIRST_FIELD, its first row in ``fields``; FIELDS_END, the row after its last one;
    MIN_BYTES of a record, -1 if its records become no rows; EVENT, index in the registry's list;
    and index of its SLOTS in FieldLayouts. The array has unused rows at the end."""
    fields: I64Array = field(default_factory=lambda: np.zeros((64, 3), np.int64))
    """By field: OFFSET in bytes, MASK, and SIGN bit; 0: unsigned."""

    def add(self, layout: Layout) -> None:
        """Append a layout."""
        reads = {s: x for s, x in layout.reads.items() if s in SLOTS} if layout.is_used else {}
        while self.n == len(self.layouts):
            self.layouts = np.concatenate([self.layouts, np.zeros_like(self.layouts)])
        while self.n_fields + len(reads) > len(self.fields):
            self.fields = np.concatenate([self.fields, np.zeros_like(self.fields)])
        first = self.n_fields
        for record_field in reads.values():
            self.fields[self.n_fields] = _numbers(record_field)
            self.n_fields += 1
        min_bytes = layout.size if layout.is_used else -1
        slots = self.slots.intern(tuple(reads))
        self.layouts[self.n] = first, self.n_fields, min_bytes, layout.event, slots
        self.n += 1


def _numbers(record_field: Field) -> tuple[int, int, int]:
    bits = 8 * record_field.size
    if bits == 64:
        return record_field.offset, -1, 0
    return record_field.offset, (1 << bits) - 1, 1 << bits - 1 if record_field.signed else 0


NOT_INTERNED: Final = -1
_NUMBERS: Final = 1 << 16  # common_type has 16 bits: struct trace_entry
_SYNTHETIC_IDS: Final = 1 << 10


def _no_index() -> I64Array:
    return np.full(_NUMBERS + _SYNTHETIC_IDS + 1, NOT_INTERNED, np.int64)


@dataclass(slots=True)
class EventCatalog:
    """Makes the layout of each event ID when its first record occurs, and counts records."""

    formats: Mapping[int, EventFormat]
    registry: EventRegistry
    stats: SourceStats
    printed_name: Callable[[EventFormat], str]
    """Returns the name of an event as the recording's own tool prints it."""
    symbol_at: Callable[[int], str | None] = lambda _: None
    """Returns the name of the kernel function at an address, or None."""
    tables: FieldTables = field(default_factory=FieldTables)
    """The layouts as arrays."""
    layouts: list[Layout] = field(default_factory=list)
    index: I64Array = field(default_factory=_no_index)
    """By event ID: index into ``layouts``, or NOT_INTERNED."""
    common: Common = field(init=False)
    _numbers: list[int] = field(default_factory=list)
    """By layout: its event ID."""

    def __post_init__(self) -> None:
        self.common = common_of(self.formats.values())

    def intern(self, number: int, int64_at: I64Array, record: int) -> int:
        """Return the index of an event ID's layout, made from its first record if it is new.

        Args:
            number: Event ID in the record.
            int64_at: The 64-bit number that begins at each byte of a block.
            record: Byte of the block at which the record begins.
        """
        if self.index[number] == NOT_INTERNED:
            event_format = self.formats.get(number)
            if event_format is None:
                layout = Layout(0, "undecoded", f"event {number} without a format", {}, 0)
            else:
                symbol = self._symbol(event_format, int64_at, record)
                layout = layout_of(
                    event_format, self.printed_name(event_format), self.registry, symbol
                )
            self._add(number, layout)
        return int(self.index[number])

    def add_synthetic_event(self, kind: str, name: str) -> int:
        """Return a synthetic event ID for records of which only kind and name are known."""
        free = np.flatnonzero(self.index[_NUMBERS:-1] == NOT_INTERNED)
        number = _NUMBERS + (int(free[0]) if len(free) else _SYNTHETIC_IDS)
        self._add(number, Layout(0, kind, name, {}, 0))
        return number

    def _add(self, number: int, layout: Layout) -> None:
        self.index[number] = len(self.layouts)
        self.layouts.append(layout)
        self.tables.add(layout)
        self._numbers.append(number)

    def _symbol(self, event_format: EventFormat, int64_at: I64Array, record: int) -> str | None:
        """Return the function at an event's probe, or None if the event's name contains it."""
        record_field = event_format.fields.get("__probe_func") or event_format.fields.get(
            "__probe_ip"
        )
        if (
            record_field is None
            or not record_field.is_number
            or function_named(event_format.name) is not None
        ):
            return None
        at = record + record_field.offset
        word = int(int64_at[at]) if at < len(int64_at) else 0
        return self.symbol_at(word & (1 << 8 * record_field.size) - 1)

    def used_event_ids(self) -> Iterator[int]:
        """Return the interned event IDs whose records become rows."""
        pairs = zip(self._numbers, self.layouts, strict=True)
        return (number for number, layout in pairs if layout.is_used)

    def count(self, counts: I64Array) -> None:
        """Add records to the statistics: those with rows by name, others as losses.

        Args:
            counts: By layout: number of records and line of the first one; number of records too
                short for their fields, which become no rows, and line of the first one.
        """
        n, line, n_short, short_line = (column.tolist() for column in counts.T)
        for _, number in sorted((self._numbers[x], x) for x in range(len(self.layouts)) if n[x]):
            layout = self.layouts[number]
            if layout.is_used:
                self.stats.events[layout.name] += n[number] - n_short[number]
            else:
                self.stats.count(layout.kind, layout.name, line[number], n[number])
        short = [x for x in range(len(self.layouts)) if n_short[x]]
        for number in sorted(short, key=lambda x: short_line[x]):
            name = self.layouts[number].name
            self.stats.count("undecoded", name, short_line[number], n_short[number])
