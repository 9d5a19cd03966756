"""Parse an event's text: key=value pairs, KVM tracepoints, out-of-tree SEAMCALL tracepoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from tdxtrace.ingest.stats import OF_AMD
from tdxtrace.tdx.exit_reasons import exit_reason_number
from tdxtrace.tdx.leaves import parse_leaf
from tdxtrace.tdx.loader import LOADER_BIT, parse_loader_leaf

_WORD_MASK: Final = (1 << 64) - 1
_HEX_DIGITS: Final = 16
# "-9223372036854775808" and "18446744073709551615"; anything longer is not a 64-bit word.
_MAX_DIGITS: Final = 20
_U32_MASK: Final = (1 << 32) - 1


@dataclass(slots=True)
class Fields:
    """The values of one event by slot, and the spans of its text that they were read from."""

    values: dict[str, int] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Start and end in the text, only for values that are printed unchanged."""
    hexadecimal: set[str] = field(default_factory=set)
    """Slots that the format prints in hex, with or without 0x."""
    unread: Callable[[str], Iterable[tuple[int, int]]] = lambda _: ()
    """Returns spans of numbers that vary from line to line and that no table needs; it may include
    those of ``spans``."""
    unknown: str = ""
    """Text printed in place of a number, if its number is unknown."""

    def put(self, slot: str, found: re.Match[str], group: str, base: int = 0) -> None:
        """Set a slot to the number that ``group`` matched, if it matched a number."""
        text = found[group]
        word = None if text is None else to_word(text, base)
        if word is not None:
            self.values[slot] = word
            self.spans[slot] = found.span(group)
            if base == 16:
                self.hexadecimal.add(slot)


def to_word(text: str, base: int = 0) -> int | None:
    """Return the 64-bit word printed as ``text``; None if it is no number.

    Tools print the same word as 0x hex, bare hex (libtraceevent, pointers),
    unsigned or signed decimal; trace-cmd 3.1's -R prints zero as nothing after
    ``0x``, or as nothing at all.

    Sixteen digits without ``0x`` are bare hex even where none is a letter: no
    status, address or page has sixteen decimal digits.

    Args:
        text: Digits, without blanks.
        base: 16 where numbers are known to be bare hex; 0: detect from the text.

    Example:
        >>> hex(to_word("-9223369837831520110"))
        '0x8000020000000092'
    """
    digits = text.lower()
    if digits in ("", "0x"):
        return 0
    if len(digits) > _MAX_DIGITS:
        return None
    bare = len(digits) == _HEX_DIGITS or not digits.lstrip("-").isdigit()
    try:
        value = int(digits, 16 if digits.startswith("0x") or base == 16 or bare else 10)
    except ValueError:
        return None
    return value & _WORD_MASK if -(1 << 63) <= value <= _WORD_MASK else None


_PLAIN = re.compile(r"0x[0-9a-f]+|\d+")
_ADDRESS = re.compile(r"(?:0x|(?<![0-9a-f]))[0-9a-f]++(?=\)| <-)")
_PAIR = re.compile(
    r"(?:^|(?<=[\s(,]))(?P<key>[A-Za-z_]\w*)="
    r'(?P<value>"[^"]*"|\{[^{}]*+\}|\([^()]*+\)|\(?[^\s,()]*)'
)


def pairs(args: str, slots: Mapping[str, str]) -> Fields:
    """Parse ``key=value`` pairs; ``slots`` maps lower-case keys to slots, others are ignored."""
    fields = Fields(unread=_unread_of_pairs)
    for found in _PAIR.finditer(args):
        slot = slots.get(found["key"].lower())
        if slot is not None and slot not in fields.values:
            fields.put(slot, found, "value")
    return fields


def _unread_of_pairs(args: str) -> Iterable[tuple[int, int]]:
    """Yield the spans of addresses before the pairs, and of all plain numbers in pairs."""
    where = args.partition(")")[0] + ")" if args.startswith("(") else ""
    values = (found.span("value") for found in _PAIR.finditer(args))
    yield from (found.span() for found in _ADDRESS.finditer(where))
    yield from (span for span in values if _PLAIN.fullmatch(args, *span))


_VCPU = re.compile(r"\bvcpu(?:_id=|\s+)(?P<n>\d+)")
_RIP = re.compile(r"\b(?:guest_)?rip[ =](?P<n>0x[0-9a-f]+)")
_NUMBER: Final = {
    **{
        name: re.compile(rf"\b{name}[ =](?P<n>0x[0-9a-f]*)")
        for name in ("info1", "info2", "intr_info", "requests")
    },
    "error_code": re.compile(r"\berror_code[ =](?P<n>(?:0x)?[0-9a-f]*)"),
}
# Before 5.10: "info QUALIFICATION INTR_INFO", bare hex.
_OLD_INFO = re.compile(r"\binfo (?P<a>[0-9a-f]+) (?P<b>[0-9a-f]+)\b")
_REASON = re.compile(
    r"\breason (?P<text>.+?)(?= rip | info| intr_info | error_code |$)|\bexit_reason=(?P<n>\w+)",
    re.DOTALL,
)
_ENTRY_REST = re.compile(r"\b(?:rip|intr_info|error_code)[ =](?P<n>0x[0-9a-f]+)")


def kvm_entry(args: str) -> Fields:
    """Parse ``kvm_entry`` in every layout since 2.6.31; empty for other architectures."""
    fields = _search(args, {"vcpu_id": _VCPU})
    fields.unread = lambda text: (found.span("n") for found in _ENTRY_REST.finditer(text))
    if "vcpu_id" in fields.values:
        glued = "[immediate exit]" in args or re.search(r"\bimmediate_exit=(?!0\b|0x0\b)\w", args)
        fields.values["immediate_exit"] = int(bool(glued))
    return fields


def kvm_exit(args: str) -> Fields:
    """Parse ``kvm_exit`` in every layout since 2.6.31, including that of libtraceevent's plugin."""
    found = _REASON.search(args)
    if found is None or not (found["n"] or found["text"].strip()):
        return Fields()
    fields = _search(args, {"vcpu_id": _VCPU, "rip": _RIP, **_NUMBER})
    old = _OLD_INFO.search(args)
    if old is not None:
        fields.put("info1", old, "a", 16)
        fields.put("intr_info", old, "b", 16)
    if found["n"]:
        fields.put("exit_reason", found, "n")
        return fields
    reason = exit_reason(found["text"])
    if reason is not None:
        fields.values["exit_reason"] = reason
    else:
        text = found["text"].strip()
        # libtraceevent, plugins/plugin_kvm.c: SVM_EXIT_REASONS; KVM prints them in lower case.
        is_svm = text.startswith("EXIT_") or (text.islower() and text[0].isalpha())
        fields.unknown = f"exit reason {text}{f' {OF_AMD}' if is_svm else ''}"
    return fields


def exit_reason(text: str) -> int | None:
    """Return the exit reason that KVM printed as a symbol with flags, or None.

    The grammar is ``NAME[ FLAG…]``; a name or flag unknown to the kernel that
    printed it is a hex number (Linux, trace/events/kvm.h, kvm_print_exit_reason).

    Example:
        >>> hex(exit_reason("0xffff FAILED_VMENTRY 0x7fff0000"))
        '0xffffffff'
    """
    number = exit_reason_number(text)
    # 2.6.3x printed the names in lower case.
    return exit_reason_number(text.upper()) if number is None else number


_FAULT = re.compile(
    r"\b(?:address|fault_address)[ =](?P<gpa>(?:0x)?[0-9a-f]+) "
    r"error_code[ =](?P<error_code>(?:0x)?[0-9a-f]+)"
)


def kvm_page_fault(args: str) -> Fields:
    """Parse ``kvm_page_fault``; before Linux 6.1 it prints hex numbers without 0x."""
    fields = _search(args, {"vcpu_id": _VCPU, "rip": _RIP})
    found = _FAULT.search(args)
    if found is None:
        return Fields()
    fields.put("gpa", found, "gpa", 16)
    fields.put("error_code", found, "error_code", 16)
    return fields


_USERSPACE = re.compile(r"\breason (?P<name>\S+) \((?P<n>\d+)\)")
_USERSPACE_RAW = re.compile(r"\breason=(?P<reason>\w+) errno=(?P<errno>-?\w+)")


def kvm_userspace_exit(args: str) -> Fields:
    """Parse ``kvm_userspace_exit``: a KVM_EXIT_* number, or an errno as a positive number."""
    fields = Fields()
    found = _USERSPACE.search(args)
    if found is not None:
        slot = "errno" if found["name"] in ("error", "restart") else "reason"
        fields.put(slot, found, "n")
        return fields
    raw = _USERSPACE_RAW.search(args)
    if raw is not None:
        errno = to_word(raw["errno"]) or 0
        signed = (errno & _U32_MASK) - (1 << 32) if errno & (1 << 31) else errno
        if signed < 0:
            fields.values["errno"] = -signed
        else:
            fields.put("reason", raw, "reason")
    return fields


_PIO = re.compile(
    r"\bpio_(?P<to>read|write) at (?P<port>0x[0-9a-f]{1,8}) size (?P<size>\d{1,9}) "
    r"count (?P<count>\d{1,9})(?: val (?P<value>0x[0-9a-f]{1,8}))?"
)
_PIO_RAW = re.compile(
    r"\brw=(?P<to>\w+) port=(?P<port>\w+) size=(?P<size>\w+) count=(?P<count>\w+)"
    r"(?: val=(?P<value>\w+))?"
)


def kvm_pio(args: str) -> Fields:
    """Parse ``kvm_pio``: a transfer through an I/O port; values are printed since Linux 3.15."""
    fields = Fields()
    found = _PIO.search(args)
    if found is not None:
        fields.values["is_write"] = int(found["to"] == "write")
    else:
        found = _PIO_RAW.search(args)
        if found is None:
            return fields
        fields.put("is_write", found, "to")
    for name in ("port", "size", "count", "value"):
        fields.put(name, found, name)
    return fields


# Linux 6.8 to 7.3 include/trace/events/kvm.h: "%#016llx -- %#016llx [0x%lx]", frame numbers.
_ATTRIBUTES = re.compile(
    r"(?P<gfn>(?:0x)?[0-9a-f]{1,16}) -- (?P<gfn_end>(?:0x)?[0-9a-f]{1,16}) "
    r"\[(?P<value>0x[0-9a-f]{1,16})\]"
)
_ATTRIBUTES_RAW = re.compile(r"\bstart=(?P<gfn>\w+) end=(?P<gfn_end>\w+) attr=(?P<value>\w+)")


def kvm_vm_set_mem_attributes(args: str) -> Fields:
    """Parse ``kvm_vm_set_mem_attributes``: memory that becomes private or shared.

    ``gfn`` is the first frame and ``gfn_end`` the frame after the last one, as in
    KVM_SET_MEMORY_ATTRIBUTES.
    """
    fields = Fields()
    found = _ATTRIBUTES.search(args)
    base = 16
    if found is None:
        found, base = _ATTRIBUTES_RAW.search(args), 0
    if found is not None:
        for name in ("gfn", "gfn_end", "value"):
            fields.put(name, found, name, base)
    return fields


def _search(args: str, patterns: Mapping[str, re.Pattern[str]]) -> Fields:
    fields = Fields()
    for slot, pattern in patterns.items():
        found = pattern.search(args)
        if found is not None:
            base = 16 if slot == "error_code" else 0
            fields.put(slot, found, "n", base)
    return fields


KVM_DECODERS: Final[Mapping[str, Callable[[str], Fields]]] = {
    "kvm_entry": kvm_entry,
    "kvm_exit": kvm_exit,
    "kvm_page_fault": kvm_page_fault,
    "kvm_pio": kvm_pio,
    "kvm_userspace_exit": kvm_userspace_exit,
    "kvm_vm_set_mem_attributes": kvm_vm_set_mem_attributes,
}


# kvm:kvm_tdx_seamcall_enter / _exit: RFC v2 08/69 of the KVM TDX series, 2021-07-02.
# kvm:kvm_sept_seamcall: the same series.  tdx_seam:tdx_seamcall / tdx_seamret:
# Intel's tree, arch/x86/kvm/vmx/tdx_trace.h; its registers are bare hex.
# seam:seamcall_enter "cpuid: %d op: %s" and six registers, in older trees without cpuid;
# seam:seamcall_exit "cpuid: %d op: %s err: %s(%llx)" and six registers: Intel's trees.
_OP = re.compile(r"\bop: (?P<name>[\w.]+)(?:\((?P<number>[0-9a-f]+)\))?")
_REGISTER = re.compile(r"\b(?P<name>rcx|rdx|r8): (?P<n>0x[0-9a-f]+)")
_ERROR = re.compile(r"\berr (?:\S*) (?P<n>0x[0-9a-f]{1,16})\b")
_BARE_ERROR = re.compile(r"\berr: \S*?\((?P<n>[0-9a-f]{1,16})\)")
_BARE = re.compile(
    r"(?:(?<=\) )|\bop: [\w.]++ )(?P<rcx>[0-9a-f]+) (?P<rdx>[0-9a-f]+) (?P<r8>[0-9a-f]+)\b"
)
_SEPT = re.compile(r"\bgpa: (?P<gpa>0x[0-9a-f]+) hpa: (?P<page>0x[0-9a-f]+) level: (?P<level>\d+)")


def _leaf(fields: Fields, args: str) -> None:
    found = _OP.search(args)
    if found is None:
        return
    op = f"0x{found['number']}" if found["number"] else found["name"]
    loader = parse_loader_leaf(op.removeprefix("P_"))
    if loader is not None:
        fields.values |= {"leaf": loader, "fn": LOADER_BIT | loader}
        return
    try:
        leaf, version = parse_leaf(op)
    except ValueError:
        return
    fields.values |= {"leaf": leaf, "version": version}


def _enter(args: str) -> Fields:
    fields = Fields()
    _leaf(fields, args)
    for found in _REGISTER.finditer(args):
        fields.put(found["name"], found, "n")
    bare = _BARE.search(args)
    if bare is not None:
        for name in ("rcx", "rdx", "r8"):
            fields.put(name, bare, name, 16)
    return fields


def _exit(args: str) -> Fields:
    fields = Fields()
    _leaf(fields, args)
    error = _ERROR.search(args) or _BARE_ERROR.search(args)
    if error is not None:
        fields.put("status", error, "n", 16)
    for found in _REGISTER.finditer(args):
        if found["name"] != "r8":
            fields.put(f"out_{found['name']}", found, "n")
    bare = _BARE.search(args, error.end() - 1) if error else None
    if bare is not None:
        fields.put("out_rcx", bare, "rcx", 16)
        fields.put("out_rdx", bare, "rdx", 16)
    return fields


def _sept(args: str) -> Fields:
    fields = Fields()
    _leaf(fields, args)
    found = _SEPT.search(args)
    if found is not None:
        for name in ("gpa", "page", "level"):
            fields.put(name, found, name)
    return fields


Decoder = Callable[[str], Fields]
OUT_OF_TREE: Final[Mapping[str, tuple[Literal["entry", "return"], Decoder]]] = {
    "kvm_tdx_seamcall_enter": ("entry", _enter),
    "kvm_tdx_seamcall_exit": ("return", _exit),
    "tdx_seamcall": ("entry", _enter),
    "tdx_seamcall_enter": ("entry", _enter),
    "tdx_seamcall_exit": ("return", _exit),
    "tdx_seamret": ("return", _exit),
    "kvm_sept_seamcall": ("entry", _sept),
    "seamcall_enter": ("entry", _enter),
    "seamcall_exit": ("return", _exit),
}
