"""Event specifications: probes and KVM's tracepoints, their fields and printed text.

KVM's tracepoints are transcribed from the ``print fmt`` of Linux 6.18's format files
(events/kvm/*/format).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.journal import KernelEvent
from tdxtrace.simulate.module.abi import ERROR_BIT, EXIT_TDCALL
from tdxtrace.simulate.module.state import Call

Fields = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class EventSpec:
    """One kind of event: a kprobe, a kretprobe, or a tracepoint of the kernel."""

    group: str
    name: str
    kind: str
    """``entry`` and ``return`` of a probed function, or ``tracepoint``."""
    fields: Fields
    """Name and type of each argument, in order."""
    function: str = ""
    text: Callable[[tuple[int, ...]], str] | None = None
    """Formats a tracepoint's fields as the kernel does."""


def field_text(kind: str, value: int) -> str:
    """A fetched argument as text: kernel/trace/trace_probe.c, DEFINE_BASIC_PRINT_TYPE_FUNC."""
    return f"{value & _U64:#x}" if kind == "x64" else str(value)


_U64: Final = (1 << 64) - 1
# VMX_EXIT_REASONS that occur in runs; a number without a name is printed in hex.
EXIT_REASONS: Final = {
    0: "EXCEPTION_NMI",
    1: "EXTERNAL_INTERRUPT",
    10: "CPUID",
    12: "HLT",
    30: "IO_INSTRUCTION",
    32: "MSR_WRITE",
    48: "EPT_VIOLATION",
    77: "TDCALL",
}
_USERSPACE: Final = {2: "KVM_EXIT_IO", 3: "KVM_EXIT_HYPERCALL", 17: "KVM_EXIT_INTERNAL_ERROR"}
_EINTR: Final = -4
_NOT_ENTERED: Final = 0xFFFF_FFFF
_VMX: Final = 1


def _entry_text(values: tuple[int, ...]) -> str:
    vcpu, rip, immediate, info, code = values
    suffix = "[immediate exit]" if immediate else ""
    return f"vcpu {vcpu}, rip {rip:#x} intr_info 0x{info:08x} error_code 0x{code:08x}{suffix}"


def reason_text(reason: int) -> str:
    """The three %s of kvm_exit: symbol, blank, flags."""
    text = EXIT_REASONS.get(reason & 0xFFFF, f"{reason & 0xFFFF:#x}")
    flags = reason & ~0xFFFF
    if not flags:
        return text
    known = "FAILED_VMENTRY" if flags & 0x8000_0000 else ""
    rest = flags & 0x7FFF_0000
    return f"{text} {' '.join(filter(None, [known, f'{rest:#x}' if rest else '']))}"


def _exit_text(values: tuple[int, ...]) -> str:
    reason, rip, _isa, info1, info2, intr_info, code, vcpu, requests = values
    return (
        f"vcpu {vcpu} reason {reason_text(reason)} rip {rip:#x} info1 0x{info1:016x} "
        f"info2 0x{info2:016x} intr_info 0x{intr_info:08x} error_code 0x{code:08x} "
        f"requests 0x{requests:016x}"
    )


def _fault_text(values: tuple[int, ...]) -> str:
    vcpu, rip, address, code = values
    return f"vcpu {vcpu} rip {rip:#x} address 0x{address:016x} error_code {code:#x}"


def _userspace_text(values: tuple[int, ...]) -> str:
    reason, errno = values
    if errno < 0:
        return f"reason {'restart' if errno == _EINTR else 'error'} ({-errno})"
    return f"reason {_USERSPACE.get(reason, hex(reason))} ({reason})"


def _pio_text(values: tuple[int, ...]) -> str:
    is_write, port, size, count, value = values
    way = "write" if is_write else "read"
    more = "(...)" if count > 1 else ""
    return f"pio_{way} at {port:#x} size {size} count {count} val {value:#x} {more}"


def _attributes_text(values: tuple[int, ...]) -> str:
    # %#016llx counts the 0x in its width.
    first, end, attributes = values
    return f"{first:#016x} -- {end:#016x} [{attributes:#x}]"


def _kvm(name: str, fields: str, text: Callable[[tuple[int, ...]], str]) -> EventSpec:
    """Return a tracepoint of KVM, its fields written as "NAME TYPE, ..."."""
    named = ((field, kind) for field, kind in map(str.split, fields.split(",")))
    return EventSpec("kvm", name, "tracepoint", tuple(named), text=text)


KVM_ENTRY: Final = _kvm(
    "kvm_entry",
    "vcpu_id u32, rip ulong, immediate_exit bool, intr_info u32, error_code u32",
    _entry_text,
)
KVM_EXIT: Final = _kvm(
    "kvm_exit",
    "exit_reason u32, guest_rip ulong, isa u32, info1 u64, info2 u64, intr_info u32, "
    "error_code u32, vcpu_id u32, requests u64",
    _exit_text,
)
KVM_PAGE_FAULT: Final = _kvm(
    "kvm_page_fault",
    "vcpu_id u32, guest_rip ulong, fault_address u64, error_code u64",
    _fault_text,
)
KVM_PIO: Final = _kvm("kvm_pio", "rw u32, port u32, size u32, count u32, val u32", _pio_text)
KVM_ATTRIBUTES: Final = _kvm(
    "kvm_vm_set_mem_attributes", "start u64, end u64, attr ulong", _attributes_text
)
KVM_USERSPACE_EXIT: Final = _kvm("kvm_userspace_exit", "reason u32, errno s32", _userspace_text)


_OTHER_EVENTS: Final = {spec.name: spec for spec in (KVM_PIO, KVM_ATTRIBUTES)}


def kvm_exit(call: Call, vcpu: int) -> tuple[EventSpec, tuple[int, ...]]:
    """Return specification and values of the kvm_exit after a TDH.VP.ENTER.

    By tdx_to_vmx_exit_reason, a TDG.VP.VMCALL is printed as the exit that it replaces; a status
    without an exit reason, busy or another error, as -1 and zeros.
    """
    if call.status & ERROR_BIT:
        return KVM_EXIT, (_NOT_ENTERED, 0, _VMX, 0, 0, 0, 0, vcpu, 0)
    reason = call.status & 0xFFFF
    if reason == EXIT_TDCALL and call.vmcall_reason:
        reason = call.vmcall_reason
    return KVM_EXIT, (reason, 0, _VMX, call.out_rcx, call.out_rdx, call.operand, 0, vcpu, 0)


def kvm_event(event: KernelEvent) -> tuple[EventSpec, tuple[int, ...]]:
    """Return specification and values of any other event of KVM in a run."""
    fields = tuple(int(str(value)) for value in event.fields)
    if event.name == "kvm_page_fault":
        vcpu, gpa, code = fields
        return KVM_PAGE_FAULT, (vcpu, 0, gpa, code)
    if event.name in _OTHER_EVENTS:
        return _OTHER_EVENTS[event.name], fields
    assert event.name == "kvm_userspace_exit"
    (reason,) = fields
    return KVM_USERSPACE_EXIT, (max(0, reason), min(0, reason))
