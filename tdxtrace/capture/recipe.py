"""Recipes: probes, events, clock and buffer for a kernel, and questions left unanswered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from tdxtrace.capture.btf import Btf
from tdxtrace.capture.options import Detail
from tdxtrace.capture.probes import RATE, Fetch, Probe, Tracepoint, size_kb
from tdxtrace.capture.symbols import NOINSTR, Symbols, function_of_tracepoint
from tdxtrace.tdx import wrappers
from tdxtrace.tdx.firmware import MARK_PORTS

GROUP: Final = "tdxtrace"
CLOCK: Final = "mono"
# Return probes can fetch the arguments of the function: Linux 6.9, commit 25f00e40ce79
# (tracing/probes: Support $argN in return probe); also listed in tracefs' README.
RETURN_ARGS_SINCE: Final = (6, 9)
# KVM's tracepoints: Linux arch/x86/kvm/trace.h and include/trace/events/kvm.h.  The instruction
# pointer of a TD is hidden from the host and printed as 0.
_MINIMAL_EVENTS: Final = ("kvm_entry", "kvm_exit")
_STOCK_EVENTS: Final = (*_MINIMAL_EVENTS, "kvm_page_fault", "kvm_userspace_exit", "kvm_pio")
# Linux virt/kvm/kvm_main.c under CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES, which TDX selects.
_ATTRIBUTES_EVENT: Final = "kvm_vm_set_mem_attributes"
# A write (KVM_PIO_OUT is 1 in arch/x86/kvm/trace.h) to a port for marks of firmware: no
# question here needs the other transfers.
_PIO_FILTER: Final = f"rw == 1 && ({' || '.join(f'port == {port:#x}' for port in MARK_PORTS)})"
_RIP_FIELD: Final = {"kvm_entry": "rip", "kvm_exit": "guest_rip", "kvm_page_fault": "guest_rip"}
# Calls of the fault path and of zaps, which are answered busy most often, and TDH.VP.ENTER.
_MINIMAL: Final = (
    "tdh_mem_page_aug",
    "tdh_mem_sept_add",
    "tdh_mem_range_block",
    "tdh_mem_track",
    "tdh_mem_page_remove",
    "tdh_vp_enter",
)
# Arguments to record, by the words of wrappers.csv, and their types.
_TYPES: Final = {
    **dict.fromkeys(("td", "vp", "gpa", "pfn", "fn", *wrappers.PAGES), "x64"),
    "level": "s32",
}
_SEAMCALL_FUNCTIONS: Final = ("__seamcall", "__seamcall_ret")


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """Options of a recipe."""

    detail: Detail = Detail.full
    seamcalls: bool = False
    """Probe __seamcall and __seamcall_ret too."""
    only_tds: bool = False
    """Leave out the KVM events of VMs that are no TDs."""
    rate: int = RATE
    """Events per second expected on the busiest CPU."""
    group: str = GROUP


@dataclass(frozen=True, slots=True)
class Kernel:
    """Kernel to trace."""

    release: str
    symbols: Symbols
    btf: Btf | None = None
    return_args: bool | None = None
    """Whether return probes can fetch arguments; None: derived from the release."""
    locations: Mapping[str, str] = field(default_factory=dict)
    """``PATH:0xOFFSET`` of each function, if a program is traced instead of the kernel."""

    @property
    def has_return_args(self) -> bool:
        """Whether return probes can fetch arguments."""
        if self.return_args is not None:
            return self.return_args
        return version_of(self.release) >= RETURN_ARGS_SINCE


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a recording, independent of the tool."""

    release: str
    options: RecipeOptions
    probes: tuple[Probe, ...]
    events: tuple[Tracepoint, ...]
    clock: str
    buffer_kb: int
    """KiB per CPU."""
    level_base: int | None
    cannot: tuple[str, ...]
    """Questions that the recording will not answer."""
    notes: tuple[str, ...]


def recipe(kernel: Kernel, options: RecipeOptions) -> Recipe:
    """Choose probes, events and buffer size.

    Args:
        kernel: Kernel to trace.
        options: Level of detail, expected rate and other options.

    Returns:
        The recipe.  On a kernel whose wrapper signatures are unknown, __seamcall and
        __seamcall_ret are probed, whose arguments are the same in all kernels.
    """
    probes: list[Probe] = []
    if options.detail is not Detail.stock:
        if wrappers.level_base(kernel.release) is not None:
            probes += _wrappers(kernel, options)
        if options.seamcalls or not probes:
            probes += _seamcalls(kernel, options)
        probes += _vp_enter(kernel, options)
    if kernel.locations:
        probes = [replace(probe, location=kernel.locations[probe.function]) for probe in probes]
    names = () if kernel.locations else _event_names(kernel, options.detail)
    events = tuple(_event(name, options) for name in names)
    return Recipe(
        kernel.release,
        options,
        tuple(probes),
        events,
        CLOCK,
        size_kb(probes, options.rate),
        wrappers.level_base(kernel.release),
        tuple(_unanswered(kernel, options, probes)),
        tuple(_notes(kernel, options, probes)),
    )


def version_of(release: str) -> tuple[int, int]:
    """Return major and minor number of a kernel release; (0, 0) if it does not begin with them."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def merged(functions: frozenset[str] | None) -> list[str]:
    """Return the wrappers among a kernel's ``functions``; None: all wrappers of mainline Linux."""
    return [
        function
        for function, source in wrappers.sources().items()
        if function.startswith("tdh_")
        and (source.startswith("Linux ") if functions is None else function in functions)
    ]


def _wrappers(kernel: Kernel, options: RecipeOptions) -> list[Probe]:
    names = _MINIMAL if options.detail is Detail.minimal else merged(kernel.symbols.names)
    probes: list[Probe] = []
    for function in names:
        words = wrappers.signature(function, kernel.release)
        if words and kernel.symbols.may_probe(function):
            probes += _wrapper_probes(function, words, kernel, options)
    return probes


def _wrapper_probes(
    function: str, words: tuple[str, ...], kernel: Kernel, options: RecipeOptions
) -> list[Probe]:
    """Return entry and return probe; for the minimal level one return probe with arguments."""
    request = tuple(
        Fetch.argument(word, place, _TYPES[word])
        for place, word in enumerate(words, 1)
        if word in _TYPES
    )
    status = Fetch.result("ret")
    errors = tuple(
        Fetch.memory(f"ext{word[-1]}", words.index(word) + 1, 0)
        for word in ("ext_err1", "ext_err2")
        if word in words and words.index(word) < 6 and kernel.has_return_args
    )
    if options.detail is Detail.minimal and kernel.has_return_args:
        return [Probe(options.group, function, True, (status, *request))]
    return [
        Probe(options.group, function, False, request),
        Probe(options.group, function, True, (status, *errors)),
    ]


def _seamcalls(kernel: Kernel, options: RecipeOptions) -> list[Probe]:
    """Return probes on __seamcall and __seamcall_ret(fn, args); args points to rcx, rdx, r8, ...

    Offsets: struct tdx_module_args, Linux arch/x86/include/asm/shared/tdx.h.
    """
    registers = tuple(Fetch.memory(r, 2, at) for r, at in (("rcx", 0), ("rdx", 8), ("r8", 16)))
    probes = []
    for function in _SEAMCALL_FUNCTIONS:
        if kernel.symbols.may_probe(function):
            entry = (Fetch.argument("fn", 1, "x64"), *registers)
            probes.append(Probe(options.group, function, False, entry))
            probes.append(Probe(options.group, function, True, (Fetch.result("ret"),)))
    return probes


def _vp_enter(kernel: Kernel, options: RecipeOptions) -> list[Probe]:
    """Return the probe on tdx_vcpu_run, which reads TDH.VP.ENTER's status from struct vcpu_tdx.

    struct kvm_vcpu is the first member of struct vcpu_tdx: Linux 6.16 arch/x86/kvm/vmx/tdx.h.

    Only the return is probed: the start of TDH.VP.ENTER is the time of kvm_entry, which
    tdx_vcpu_run traces just before it (arch/x86/kvm/vmx/tdx.c; tdh_vp_enter itself is noinstr) and
    every level records.  A probe on the entry of tdx_vcpu_run would double the cost, and would also
    fire when KVM holds the vCPU back and does not call TDH.VP.ENTER.
    """
    places = offsets(kernel.btf)
    if not kernel.has_return_args or not kernel.symbols.may_probe("tdx_vcpu_run"):
        return []
    if places is None:
        return []
    status, gpa, vcpu = places
    fetched = (
        Fetch.memory("status", 1, status),
        Fetch.memory("gpa", 1, gpa),
        Fetch.memory("vcpu", 1, vcpu, "s32"),
    )
    return [Probe(options.group, "tdx_vcpu_run", True, fetched)]


def offsets(btf: Btf | None) -> tuple[int, int, int] | None:
    """Return offsets of vp_enter_ret, exit_gpa and vcpu_id in struct vcpu_tdx; None: unknown."""
    if btf is None:
        return None
    status = btf.offset_of("vcpu_tdx", "vp_enter_ret")
    gpa = btf.offset_of("vcpu_tdx", "exit_gpa")
    vcpu = btf.offset_of("kvm_vcpu", "vcpu_id")
    return None if status is None or gpa is None or vcpu is None else (status, gpa, vcpu)


def _event_names(kernel: Kernel, detail: Detail) -> tuple[str, ...]:
    if detail is Detail.minimal:
        return _MINIMAL_EVENTS
    has_attributes = kernel.symbols.has(function_of_tracepoint(_ATTRIBUTES_EVENT))
    return (*_STOCK_EVENTS, *([_ATTRIBUTES_EVENT] if has_attributes else []))


def _event(name: str, options: RecipeOptions) -> Tracepoint:
    if name == "kvm_pio":
        return Tracepoint("kvm", name, _PIO_FILTER)
    rip = _RIP_FIELD.get(name)
    return Tracepoint("kvm", name, f"{rip} == 0" if rip and options.only_tds else "")


def _unanswered(kernel: Kernel, options: RecipeOptions, probes: list[Probe]) -> list[str]:
    """Return the questions that a recording with these probes does not answer.

    Sources: Linux 6.16 arch/x86/kvm/vmx/tdx.c, KVM's trace.h.
    """
    texts = []
    names = {probe.function for probe in probes}
    if not names:
        texts.append("which SEAMCALL was busy, how often, and on what: KVM's events show none")
        texts.append("retries within one page fault: KVM's events do not show repeated calls")
        texts.append("chains, limits and causes: only failed entries of vCPUs can be counted")
    elif options.detail is Detail.minimal and kernel.has_return_args:
        texts.append("how long an attempt took, and who held the lock: only returns are probed")
        texts.append("requests other than AUG, SEPT.ADD, BLOCK, TRACK and REMOVE")
    if names and not names & set(_SEAMCALL_FUNCTIONS):
        texts.append(
            "retries for lack of entropy: a wrapper makes up to 10 calls and shows one; "
            "add --seamcalls"
        )
    if not names & {"tdx_vcpu_run", "tdh_vp_enter"}:
        texts.append(
            "why an entry of a vCPU failed: zero-step mitigation (SEPT), a TRACK (TD_EPOCH) and "
            f"other errors all show as exit reason -1; {_how_vp_enter(kernel, options)}"
        )
    if probes and not names - {"tdx_vcpu_run"}:
        texts.append("SEAMCALLs: none of the functions that issue them can be probed here")
    return texts


def _how_vp_enter(kernel: Kernel, options: RecipeOptions) -> str:
    if options.detail is Detail.stock:
        return "use --level minimal or full"
    if not kernel.has_return_args:
        return "needs return probes that fetch arguments, Linux 6.9 or later"
    if not kernel.symbols.may_probe("tdx_vcpu_run"):
        return "this kernel has no tdx_vcpu_run to probe; load kvm_intel with tdx=1"
    return "name the kernel's BTF: --btf /sys/kernel/btf/vmlinux --btf /sys/kernel/btf/kvm_intel"


def _notes(kernel: Kernel, options: RecipeOptions, probes: list[Probe]) -> list[str]:
    notes = []
    base = wrappers.level_base(kernel.release)
    if base is None:
        notes.append(
            f"the wrappers of Linux {kernel.release or '?'} are unknown: __seamcall is probed "
            "instead, which is the same from 6.16 on"
        )
    else:
        notes.append(f"a 4K page has level {base} in these probes")
    if any(probe.function == "tdx_vcpu_run" for probe in probes):
        notes.append(
            "an entry begins at the kvm_entry before the return of tdx_vcpu_run; without a "
            "kvm_entry before it, KVM held the vCPU back for a zap, and the status is that of the "
            "previous entry"
        )
    if options.only_tds:
        notes.append("--only-tds treats VMs whose instruction pointer KVM does not know as TDs")
    missing = [f for f in _MINIMAL if not kernel.symbols.has(f) and f not in NOINSTR]
    if missing and options.detail is not Detail.stock:
        notes.append(f"not in {kernel.symbols.source}: {', '.join(missing)}")
    return notes
