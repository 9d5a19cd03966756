"""Binary layouts of events and their format files, events/*/*/format in tracefs.

Transcribed from Linux 6.18's files for kprobe events and KVM's tracepoints.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.record import symbols
from tdxtrace.simulate.record.recording import TraceEvent
from tdxtrace.simulate.record.tracepoints import (
    EXIT_REASONS,
    KVM_ATTRIBUTES,
    KVM_ENTRY,
    KVM_EXIT,
    KVM_PAGE_FAULT,
    KVM_PIO,
    KVM_USERSPACE_EXIT,
    EventSpec,
)

COMMON: Final = (
    "\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n"
    "\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;\n"
    "\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;\n"
    "\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n"
)
# C type, size, struct code and print format of each type a field can have.
_TYPES: Final = {
    "x64": ("u64", 8, "Q", "0x%Lx"),
    "u64": ("u64", 8, "Q", "%Lu"),
    "u32": ("u32", 4, "I", "%u"),
    "s32": ("s32", 4, "i", "%d"),
    "u8": ("u8", 1, "B", "%u"),
    "ulong": ("unsigned long", 8, "Q", ""),
    "bool": ("bool", 1, "?", ""),
}
_FIRST_PROBE_ID: Final = 2326
_KVM_IDS: Final = {
    "kvm_vm_set_mem_attributes": 39,
    "kvm_pio": 112,
    "kvm_userspace_exit": 42,
    "kvm_page_fault": 100,
    "kvm_exit": 103,
    "kvm_entry": 115,
}
_TRACE_FLAG_IRQS_OFF: Final = 0x01
_TRACE_FLAG_HARDIRQ: Final = 0x08


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Offsets of an event's fields in its binary record."""

    number: int
    spec: EventSpec
    offsets: tuple[int, ...]
    size: int

    def record(self, event: TraceEvent) -> bytes:
        """Encode one event: common fields, addresses of a probe, its own fields."""
        flags = 0
        if event.irq:
            flags = _TRACE_FLAG_IRQS_OFF | _TRACE_FLAG_HARDIRQ
        elif event.spec.name in ("kvm_entry", "kvm_exit"):
            flags = _TRACE_FLAG_IRQS_OFF
        out = bytearray(self.size)
        struct.pack_into("<HBBi", out, 0, self.number, flags, int(not event.irq), event.tid)
        for offset, code, word in _leading(self.spec):
            struct.pack_into("<" + code, out, offset, word)
        for (_, kind), offset, word in zip(
            self.spec.fields, self.offsets, event.values, strict=True
        ):
            code = _TYPES[kind][2]
            mask = (1 << 8 * struct.calcsize(code)) - 1
            struct.pack_into("<" + code, out, offset, word & mask if code.isupper() else word)
        return bytes(out)


class EventFormats:
    """The kinds of events in one file, with number, layout and format file of each."""

    def __init__(self) -> None:
        self.layouts: dict[EventSpec, RecordLayout] = {}

    @classmethod
    def of(cls, events: list[TraceEvent]) -> EventFormats:
        """Number the kinds of ``events``, in the order of their first event."""
        formats = cls()
        for event in events:
            if event.spec not in formats.layouts:
                formats.layouts[event.spec] = _layout(event.spec, len(formats.layouts))
        return formats

    def systems(self) -> dict[str, list[bytes]]:
        """Format files by system, as trace-cmd stores them."""
        systems: dict[str, list[bytes]] = {}
        for spec, layout in self.layouts.items():
            systems.setdefault(spec.group, []).append(_text(layout).encode())
        return systems


def _leading(spec: EventSpec) -> list[tuple[int, str, int]]:
    """Return the addresses before a probe's arguments: offset, struct code, value."""
    if spec.kind == "entry":
        return [(8, "Q", symbols.function_address(spec.function))]
    if spec.kind == "return":
        caller = symbols.caller_address(spec.function)
        return [(8, "Q", symbols.function_address(spec.function)), (16, "Q", caller)]
    return []


def _layout(spec: EventSpec, index: int) -> RecordLayout:
    at = 8 + 8 * len(_leading(spec))
    offsets = []
    for _, kind in spec.fields:
        size = _TYPES[kind][1]
        # A probe's arguments are packed, a tracepoint's fields aligned as in C.
        if spec.kind == "tracepoint":
            at = (at + size - 1) & -size
        offsets.append(at)
        at += size
    number = _KVM_IDS.get(spec.name, _FIRST_PROBE_ID + index)
    return RecordLayout(number, spec, tuple(offsets), (at + 3) & -4)


_C_NAMES: Final = {
    ("kvm_entry", "vcpu_id"): "unsigned int",
    ("kvm_exit", "exit_reason"): "unsigned int",
    ("kvm_exit", "vcpu_id"): "unsigned int",
    ("kvm_page_fault", "vcpu_id"): "unsigned int",
    **{("kvm_pio", name): "unsigned int" for name in ("rw", "port", "size", "count", "val")},
    ("kvm_vm_set_mem_attributes", "start"): "gfn_t",
    ("kvm_vm_set_mem_attributes", "end"): "gfn_t",
    ("kvm_userspace_exit", "reason"): "__u32",
    ("kvm_userspace_exit", "errno"): "int",
}


def _text(layout: RecordLayout) -> str:
    spec = layout.spec
    lines = []
    leading = ("__probe_ip",) if spec.kind == "entry" else ("__probe_func", "__probe_ret_ip")
    for (offset, _, _), name in zip(_leading(spec), leading, strict=False):
        lines.append(f"\tfield:unsigned long {name};\toffset:{offset};\tsize:8;\tsigned:0;\n")
    for (name, kind), offset in zip(spec.fields, layout.offsets, strict=True):
        c_type, size, code, _ = _TYPES[kind]
        c_type = _C_NAMES.get((spec.name, name), c_type)
        signed = int(code == "i")
        lines.append(
            f"\tfield:{c_type} {name};\toffset:{offset};\tsize:{size};\tsigned:{signed};\n"
        )
    fields = COMMON + "\n" + "".join(lines)
    return f"name: {spec.name}\nID: {layout.number}\nformat:\n{fields}\nprint fmt: {_print(spec)}\n"


def _print(spec: EventSpec) -> str:
    if spec in _KVM_PRINTS:
        return _KVM_PRINTS[spec]
    leading = ("__probe_ip",) if spec.kind == "entry" else ("__probe_func", "__probe_ret_ip")
    where = "(%lx)" if spec.kind == "entry" else "(%lx <- %lx)"
    pairs = "".join(f" {name}={_TYPES[kind][3]}" for name, kind in spec.fields)
    arguments = ", ".join(f"REC->{name}" for name in (*leading, *(n for n, _ in spec.fields)))
    return f'"{where}{pairs}", {arguments}'


_REASONS: Final = ", ".join(f'{{ {number}, "{name}" }}' for number, name in EXIT_REASONS.items())
_KVM_PRINTS: Final = {
    KVM_ENTRY: '"vcpu %u, rip 0x%lx intr_info 0x%08x error_code 0x%08x%s", REC->vcpu_id, '
    "REC->rip, REC->intr_info, REC->error_code, "
    'REC->immediate_exit ? "[immediate exit]" : ""',
    KVM_EXIT: '"vcpu %u reason %s%s%s rip 0x%lx info1 0x%016llx info2 0x%016llx intr_info 0x%08x '
    'error_code 0x%08x requests 0x%016llx", REC->vcpu_id, __print_symbolic(REC->exit_reason & '
    f"0xffff, {_REASONS}), "
    '(REC->isa == 1 && REC->exit_reason & ~0xffff) ? " " : "", '
    '(REC->isa == 1) ? __print_flags(REC->exit_reason & ~0xffff, " ", '
    '{ 0x80000000, "FAILED_VMENTRY" }) : "", REC->guest_rip, REC->info1, REC->info2, '
    "REC->intr_info, REC->error_code, REC->requests",
    KVM_PAGE_FAULT: '"vcpu %u rip 0x%lx address 0x%016llx error_code 0x%llx", REC->vcpu_id, '
    "REC->guest_rip, REC->fault_address, REC->error_code",
    KVM_PIO: '"pio_%s at 0x%x size %d count %d val 0x%x %s", REC->rw ? "write" : "read", '
    'REC->port, REC->size, REC->count, REC->val, REC->count > 1 ? "(...)" : ""',
    KVM_ATTRIBUTES: '"%#016llx -- %#016llx [0x%lx]", REC->start, REC->end, REC->attr',
    KVM_USERSPACE_EXIT: '"reason %s (%d)", REC->errno < 0 ? (REC->errno == -4 ? "restart" : '
    '"error") : __print_symbolic(REC->reason, { 0, "KVM_EXIT_" "UNKNOWN" }, '
    '{ 2, "KVM_EXIT_" "IO" }, { 3, "KVM_EXIT_" "HYPERCALL" }, '
    '{ 17, "KVM_EXIT_" "INTERNAL_ERROR" }), REC->errno < 0 ? -REC->errno : REC->reason',
}
