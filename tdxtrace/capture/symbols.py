"""Functions of a kernel that can be probed for SEAMCALLs, and the kprobe blacklist."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tdxtrace.capture.host import Host, read
from tdxtrace.errors import FormatError, InputError
from tdxtrace.tables.text import one_line

# noinstr, hence in .noinstr.text and on the kprobe blacklist: Linux 6.16
# arch/x86/virt/vmx/tdx/tdx.c (tdh_vp_enter), seamcall.S (__seamcall_saved_ret),
# arch/x86/kvm/vmx/tdx.c (tdx_vcpu_enter_exit); kernel/kprobes.c,
# populate_kprobe_blacklist.
NOINSTR: Final = frozenset({"tdh_vp_enter", "__seamcall_saved_ret", "tdx_vcpu_enter_exit"})
_SEAMCALL_FUNCTION: Final = re.compile(
    r"^(?P<address>[0-9a-fA-F]{1,16}) [tTwW] "
    r"(?P<name>tdh_\w{1,60}|__seamcall\w{0,20}|tdx_vcpu_run|tdx_handle_exit|tdx_vcpu_enter_exit"
    r"|__traceiter_kvm_\w{1,60})"
    r"(?P<rest>\.[\w.]+)?(?:\s+\[(?P<module>\w+)\])?$",
    re.MULTILINE,
)
_SYMBOL: Final = re.compile(r"^[0-9a-fA-F]{1,16} [A-Za-z] \S", re.MULTILINE)
_BLACKLISTED: Final = re.compile(r"^0x[0-9a-f]+-0x[0-9a-f]+\s+(?P<name>\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Symbols:
    """SEAMCALL functions of a kernel."""

    names: frozenset[str] | None = None
    """Names in the kernel's symbol list; None: no list, those of the release are assumed."""
    blacklisted: frozenset[str] = NOINSTR
    """Functions that kprobes refuse."""
    source: str = "the kernel's version"

    def has(self, function: str) -> bool:
        """Return whether the kernel has the function, or may have it."""
        return self.names is None or function in self.names

    def may_probe(self, function: str) -> bool:
        """Return whether a kprobe on the function is possible."""
        return self.has(function) and function not in self.blacklisted


def function_of_tracepoint(event: str) -> str:
    """Return the function that a kernel with this tracepoint has: include/linux/tracepoint.h."""
    return f"__traceiter_{event}"


def from_kallsyms(text: str, shown: str) -> Symbols:
    """Parse the text of /proc/kallsyms.

    Clones such as ``name.constprop.0`` are skipped: their arguments differ.

    Raises:
        FormatError: If the text is not a symbol list.
    """
    if not _SYMBOL.search(text):
        raise FormatError(f"{shown} is not kallsyms; expected lines 'ADDRESS t NAME'")
    names = frozenset(
        found["name"] for found in _SEAMCALL_FUNCTION.finditer(text) if not found["rest"]
    )
    return Symbols(names, NOINSTR, shown)


def from_file(path: Path) -> Symbols:
    """Read a copy of /proc/kallsyms.

    Raises:
        InputError: If it cannot be read.
        FormatError: If it is not a symbol list.
    """
    shown = one_line(str(path))
    found = read(path)
    if found.text is None:
        raise InputError(f"cannot read {shown}: {found.why}")
    return from_kallsyms(found.text, shown)


def of_host(host: Host) -> Symbols:
    """Return symbols and kprobe blacklist of the running kernel, as far as readable."""
    text = host.read("proc/kallsyms").text
    if not text or not _SYMBOL.search(text):
        return Symbols()
    listed = host.read("sys/kernel/debug/kprobes/blacklist").text or ""
    refused = {found["name"] for found in _BLACKLISTED.finditer(listed)}
    names = from_kallsyms(text, "/proc/kallsyms").names
    return Symbols(names, NOINSTR | refused, "/proc/kallsyms")
