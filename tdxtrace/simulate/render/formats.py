"""Format descriptions of events, as tracefs has them in events/*/*/format.

Transcribed from Linux 6.18's files for kprobe events and KVM's tracepoints.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate import names
from tdxtrace.simulate.kvm_events import KVM_ENTRY, KVM_EXIT, KVM_PAGE_FAULT, KVM_USERSPACE_EXIT
from tdxtrace.simulate.observe import Seen
from tdxtrace.simulate.specs import Spec

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
    "kvm_userspace_exit": 42,
    "kvm_page_fault": 100,
    "kvm_exit": 103,
    "kvm_entry": 115,
}
_TRACE_FLAG_IRQS_OFF: Final = 0x01
_TRACE_FLAG_HARDIRQ: Final = 0x08


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields of an event lie in its record."""

    number: int
    spec: Spec
    offsets: tuple[int, ...]
    size: int

    def record(self, seen: Seen) -> bytes:
        """The record of one event: common fields, addresses of a probe, its own fields."""
        flags = 0
        if seen.irq:
            flags = _TRACE_FLAG_IRQS_OFF | _TRACE_FLAG_HARDIRQ
        elif seen.spec.name in ("kvm_entry", "kvm_exit"):
            flags = _TRACE_FLAG_IRQS_OFF
        out = bytearray(self.size)
        struct.pack_into("<HBBi", out, 0, self.number, flags, int(not seen.irq), seen.tid)
        for offset, code, word in _leading(self.spec):
            struct.pack_into("<" + code, out, offset, word)
        for (_, kind), offset, word in zip(
            self.spec.fields, self.offsets, seen.values, strict=True
        ):
            code = _TYPES[kind][2]
            mask = (1 << 8 * struct.calcsize(code)) - 1
            struct.pack_into("<" + code, out, offset, word & mask if code.isupper() else word)
        return bytes(out)


class Formats:
    """The events of one file, each with a number, its layout and its format text."""

    def __init__(self) -> None:
        self.layouts: dict[Spec, Layout] = {}

    @classmethod
    def of(cls, events: list[Seen]) -> Formats:
        """Number the events that occur, in the order of their first."""
        made = cls()
        for seen in events:
            if seen.spec not in made.layouts:
                made.layouts[seen.spec] = _layout(seen.spec, len(made.layouts))
        return made

    def systems(self) -> dict[str, list[bytes]]:
        """Format texts by system, as trace-cmd stores them."""
        found: dict[str, list[bytes]] = {}
        for spec, layout in self.layouts.items():
            found.setdefault(spec.group, []).append(_text(layout).encode())
        return found


def _leading(spec: Spec) -> list[tuple[int, str, int]]:
    """The addresses in front of a probe's arguments: offset, struct code, word."""
    if spec.kind == "entry":
        return [(8, "Q", names.function_address(spec.function))]
    if spec.kind == "return":
        caller = names.caller_address(spec.function)
        return [(8, "Q", names.function_address(spec.function)), (16, "Q", caller)]
    return []


def _layout(spec: Spec, index: int) -> Layout:
    at = 8 + 8 * len(_leading(spec))
    offsets = []
    for _, kind in spec.fields:
        size = _TYPES[kind][1]
        # A probe's arguments lie side by side, a tracepoint's fields as C aligns them.
        if spec.kind == "tracepoint":
            at = (at + size - 1) & -size
        offsets.append(at)
        at += size
    number = _KVM_IDS.get(spec.name, _FIRST_PROBE_ID + index)
    return Layout(number, spec, tuple(offsets), (at + 3) & -4)


_C_NAMES: Final = {
    ("kvm_entry", "vcpu_id"): "unsigned int",
    ("kvm_exit", "exit_reason"): "unsigned int",
    ("kvm_exit", "vcpu_id"): "unsigned int",
    ("kvm_page_fault", "vcpu_id"): "unsigned int",
    ("kvm_userspace_exit", "reason"): "__u32",
    ("kvm_userspace_exit", "errno"): "int",
}


def _text(layout: Layout) -> str:
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


def _print(spec: Spec) -> str:
    if spec in _KVM_PRINTS:
        return _KVM_PRINTS[spec]
    leading = ("__probe_ip",) if spec.kind == "entry" else ("__probe_func", "__probe_ret_ip")
    where = "(%lx)" if spec.kind == "entry" else "(%lx <- %lx)"
    pairs = "".join(f" {name}={_TYPES[kind][3]}" for name, kind in spec.fields)
    arguments = ", ".join(f"REC->{name}" for name in (*leading, *(n for n, _ in spec.fields)))
    return f'"{where}{pairs}", {arguments}'


# The reasons these runs have; the kernel's own table goes on.
_REASONS: Final = ", ".join(
    f'{{ {number}, "{name}" }}'
    for number, name in (
        (0, "EXCEPTION_NMI"),
        (1, "EXTERNAL_INTERRUPT"),
        (10, "CPUID"),
        (12, "HLT"),
        (30, "IO_INSTRUCTION"),
        (32, "MSR_WRITE"),
        (48, "EPT_VIOLATION"),
        (77, "TDCALL"),
    )
)
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
    KVM_USERSPACE_EXIT: '"reason %s (%d)", REC->errno < 0 ? (REC->errno == -4 ? "restart" : '
    '"error") : __print_symbolic(REC->reason, { 0, "KVM_EXIT_" "UNKNOWN" }, '
    '{ 2, "KVM_EXIT_" "IO" }, { 3, "KVM_EXIT_" "HYPERCALL" }, '
    '{ 17, "KVM_EXIT_" "INTERNAL_ERROR" }), REC->errno < 0 ? -REC->errno : REC->reason',
}
