"""The probes of ``tdxtrace capture``, transcribed from the scripts that ``capture plan`` prints.

``capture`` is its level full, ``capture-minimal`` its level minimal, ``capture-seamcalls`` its
level full with ``--seamcalls``; its level stock is ``stock``.  The simulated kernel has the types
(BTF) and the return probes with arguments (Linux 6.9) that tdx_vcpu_run needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.record import tracepoints
from tdxtrace.simulate.record.symbols import PFN_FROM_7_2, VCPU_RUN, WRAPPERS
from tdxtrace.simulate.record.tracepoints import EventSpec, Fields

CAPTURES: Final = ("capture", "capture-minimal", "capture-seamcalls")
SEAMCALLS: Final = ("__seamcall", "__seamcall_ret")
_GROUP: Final = "tdxtrace"
_STATUS: Final = ("ret", "x64")
_REGISTERS: Final = (("fn", "x64"), ("rcx", "x64"), ("rdx", "x64"), ("r8", "x64"))
# Arguments that are fetched; hkid, resume, source and others are not.
_FETCHED: Final = {
    **dict.fromkeys(("td", "vp", "gpa", "page", "pfn"), "x64"),
    "level": "s32",
}
_EXTENDED: Final = (("ext1", "x64"), ("ext2", "x64"))
# Functions whose pointers to RCX and RDX are among the first six arguments.
_OUTPUTS: Final = frozenset(
    {
        "tdh_mem_page_add",
        "tdh_mem_page_aug",
        "tdh_mem_page_demote",
        "tdh_mem_page_remove",
        "tdh_mem_range_block",
        "tdh_mem_range_unblock",
        "tdh_mem_sept_add",
        "tdh_mem_sept_remove",
        "tdh_mr_extend",
    }
)
# In the series of January 2026 the outputs are on the stack, after the new S-EPT page and the PAMT
# cache.
_OUTPUTS_ON_STACK: Final = frozenset({"tdh_mem_page_demote"})
# In the series of 2022 and 2023 its arguments are a TD, an address, a level and the outputs.
_WITHOUT_PAGE: Final = frozenset({"tdh_mem_page_promote"})
# Ports in the filter of kvm_pio.
_PIO_PORTS: Final = (0xF4, 0x402, 0x80)
_MINIMAL: Final = frozenset(
    {
        "tdh_mem_page_aug",
        "tdh_mem_sept_add",
        "tdh_mem_range_block",
        "tdh_mem_track",
        "tdh_mem_page_remove",
    }
)


@dataclass(frozen=True, slots=True)
class CallProbes:
    """The probes on one function; ``entry`` is None if only its return is probed."""

    entry: EventSpec | None
    return_probe: EventSpec

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments that the entry, or else the return, fetches."""
        fields = self.return_probe.fields[1:] if self.entry is None else self.entry.fields
        return tuple(name for name, _ in fields)


def wrapper_probes(probes: str, level_base: int) -> dict[str, CallProbes]:
    """Return the probes on each wrapper, by its leaf.

    Args:
        probes: One of CAPTURES.
        level_base: Number of the 4K level in the kernel's wrappers; 1 from Linux 7.2 on, which
            passes page frame numbers.
    """
    made = {}
    for leaf, (function, arguments) in WRAPPERS.items():
        if "pfn" in arguments and not level_base:
            continue  # Dynamic PAMT, whose wrappers never take a struct page.
        takes_pfn = bool(level_base) and leaf in PFN_FROM_7_2
        named = ("pfn" if takes_pfn and name == "page" else name for name in arguments)
        missing = {"page", "pfn"} if function in _WITHOUT_PAGE else set()
        request = tuple((n, _FETCHED[n]) for n in named if n in _FETCHED and n not in missing)
        hidden = takes_pfn and function in _OUTPUTS_ON_STACK
        outputs = _EXTENDED if function in _OUTPUTS and not hidden else ()
        if probes == "capture-minimal":
            if function in _MINIMAL:
                made[leaf] = CallProbes(None, _return(function, (_STATUS, *request)))
        else:
            return_probe = _return(function, (_STATUS, *outputs))
            made[leaf] = CallProbes(_entry(function, request), return_probe)
    return made


def seamcall_probes(probes: str) -> dict[str, CallProbes]:
    """Return the probes on __seamcall and __seamcall_ret by function, for capture-seamcalls."""
    if probes != "capture-seamcalls":
        return {}
    return {f: CallProbes(_entry(f, _REGISTERS), _return(f, (_STATUS,))) for f in SEAMCALLS}


VCPU_RUN_RETURN: Final = EventSpec(
    _GROUP,
    f"{VCPU_RUN}_return",
    "return",
    (("status", "x64"), ("gpa", "x64"), ("vcpu", "s32")),
    VCPU_RUN,
)
"""The probe on vCPU entries; kvm_entry, traced in the function, has the time of their start."""


def kvm_events(probes: str) -> tuple[EventSpec, ...]:
    """Return the tracepoints of KVM that are recorded."""
    both = (tracepoints.KVM_ENTRY, tracepoints.KVM_EXIT)
    if probes == "capture-minimal":
        return both
    others = (tracepoints.KVM_PAGE_FAULT, tracepoints.KVM_USERSPACE_EXIT)
    return (*both, *others, tracepoints.KVM_PIO, tracepoints.KVM_ATTRIBUTES)


def passes_filter(spec: EventSpec, values: tuple[int, ...]) -> bool:
    """Return whether the filter of a tracepoint records an event: writes to some ports only."""
    return spec is not tracepoints.KVM_PIO or (values[0] == 1 and values[1] in _PIO_PORTS)


def _entry(function: str, fields: Fields) -> EventSpec:
    return EventSpec(_GROUP, f"{function}_entry", "entry", fields, function)


def _return(function: str, fields: Fields) -> EventSpec:
    return EventSpec(_GROUP, f"{function}_return", "return", fields, function)
