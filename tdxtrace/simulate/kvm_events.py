"""KVM's tracepoints: their fields, and the text the kernel prints of them.

Transcribed from the ``print fmt`` of Linux 6.18's format files (events/kvm/*/format).
"""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.journal import Event
from tdxtrace.simulate.specs import Spec
from tdxtrace.simulate.state import Call
from tdxtrace.simulate.words import ERROR_BIT, EXIT_TDCALL

# VMX_EXIT_REASONS: what these runs have of it; a number without a name is printed in hex.
_REASONS: Final = {
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
    """The three %s of kvm_exit: symbol, a blank, flags."""
    text = _REASONS.get(reason & 0xFFFF, f"{reason & 0xFFFF:#x}")
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


KVM_ENTRY: Final = Spec(
    "kvm",
    "kvm_entry",
    "tracepoint",
    (
        ("vcpu_id", "u32"),
        ("rip", "ulong"),
        ("immediate_exit", "bool"),
        ("intr_info", "u32"),
        ("error_code", "u32"),
    ),
    text=_entry_text,
)
KVM_EXIT: Final = Spec(
    "kvm",
    "kvm_exit",
    "tracepoint",
    (
        ("exit_reason", "u32"),
        ("guest_rip", "ulong"),
        ("isa", "u32"),
        ("info1", "u64"),
        ("info2", "u64"),
        ("intr_info", "u32"),
        ("error_code", "u32"),
        ("vcpu_id", "u32"),
        ("requests", "u64"),
    ),
    text=_exit_text,
)
KVM_PAGE_FAULT: Final = Spec(
    "kvm",
    "kvm_page_fault",
    "tracepoint",
    (("vcpu_id", "u32"), ("guest_rip", "ulong"), ("fault_address", "u64"), ("error_code", "u64")),
    text=_fault_text,
)
KVM_USERSPACE_EXIT: Final = Spec(
    "kvm",
    "kvm_userspace_exit",
    "tracepoint",
    (("reason", "u32"), ("errno", "s32")),
    text=_userspace_text,
)


def exit_of(call: Call, vcpu: int) -> tuple[Spec, tuple[int, ...]]:
    """The kvm_exit that follows a TDH.VP.ENTER: what tdx_to_vmx_exit_reason makes of RAX.

    A guest's hypercall shows as the exit it stands for; an answer without an exit
    reason, busy or another error, as -1 and zeros.
    """
    if call.status & ERROR_BIT:
        return KVM_EXIT, (_NOT_ENTERED, 0, _VMX, 0, 0, 0, 0, vcpu, 0)
    reason = call.status & 0xFFFF
    if reason == EXIT_TDCALL and call.asked:
        reason = call.asked
    return KVM_EXIT, (reason, 0, _VMX, call.out_rcx, call.out_rdx, call.operand, 0, vcpu, 0)


def event_of(event: Event) -> tuple[Spec, tuple[int, ...]]:
    """Any other tracepoint of KVM's that a run has."""
    fields = tuple(int(str(value)) for value in event.fields)
    if event.name == "kvm_page_fault":
        vcpu, gpa, code = fields
        return KVM_PAGE_FAULT, (vcpu, 0, gpa, code)
    assert event.name == "kvm_userspace_exit"
    (reason,) = fields
    return KVM_USERSPACE_EXIT, (max(0, reason), min(0, reason))
