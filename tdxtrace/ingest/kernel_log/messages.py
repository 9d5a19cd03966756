"""Kernel messages about TDX: the pattern of each, and the fields that are read from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from tdxtrace.tdx import leaves, releases, word
from tdxtrace.tdx.status import status_table

MessageFields = dict[str, Any]
_HEX: Final = r"0x[0-9a-fA-F]{1,16}"
# A register has at most 16 digits.
_WORD: Final = rf"(?P<status>{_HEX})(?![0-9a-fA-F])"
# Among the registers printed after a status, only RCX and RDX are read: for memory leaves they hold
# the SEPT entry, and its level and state.  Linux 6.16 pr_tdx_error_N names them rcx, rdx (with a
# stray comma in PAGE.RECLAIM), 6.19 TDX_BUG_ON_N entry and level_state, 6.8 of Ubuntu RCX and RDX.
RCX: Final = re.compile(rf"\b(?:rcx|entry),? (?P<word>{_HEX})\b", re.IGNORECASE)
RDX: Final = re.compile(rf"\b(?:rdx|level_state),? (?P<word>{_HEX})\b", re.IGNORECASE)
# Matches up to the first "tdx: " of a line.  Atomic: retrying from each of several occurrences
# takes time that is quadratic in their number, and any user can write text into a message.
_AFTER_TDX: Final = r"^(?>.*?tdx: )"
# Lines with registers only, after a failure: Linux 6.8 arch/x86/virt/vmx/tdx/tdx.c
# seamcall_err_ret, 6.5 of Ubuntu "additional output".
REGISTERS: Final = re.compile(
    rf"^(?:(?:virt/)?tdx: )?(?:additional output: rcx|RCX|R0?[89]|R1[0-5]) {_HEX}\b.*$",
    re.IGNORECASE,
)
_LEAF_WORD: Final = re.compile(r"[\w.]+", re.ASCII)
# KVM functions that warn about the status of one leaf, which is then in RAX: Linux 6.16
# arch/x86/kvm/vmx/tdx.c, 6.19 (tdx_mem_page_add), tip x86/tdx of September 2026 (tdx_pamt_*).
# Functions that call several leaves (tdx_sept_drop_private_spte) are not among them.
WARNING_LEAVES: Final = {
    function: leaves.parse_leaf(leaf)[0]
    for function, leaf in (
        ("__tdx_reclaim_page", "TDH.PHYMEM.PAGE.RECLAIM"),
        ("smp_func_do_phymem_cache_wb", "TDH.PHYMEM.CACHE.WB"),
        ("tdx_do_tdh_mng_key_config", "TDH.MNG.KEY.CONFIG"),
        ("tdx_flush_vp", "TDH.VP.FLUSH"),
        ("tdx_flush_vp_on_cpu", "TDH.VP.FLUSH"),
        ("tdx_mem_page_add", "TDH.MEM.PAGE.ADD"),
        ("tdx_mem_page_aug", "TDH.MEM.PAGE.AUG"),
        ("tdx_pamt_get", "TDH.PHYMEM.PAMT.ADD"),
        ("tdx_pamt_put", "TDH.PHYMEM.PAMT.REMOVE"),
        ("tdx_sept_link_private_spt", "TDH.MEM.SEPT.ADD"),
        ("tdx_sept_zap_private_spte", "TDH.MEM.RANGE.BLOCK"),
        ("tdx_td_finalize", "TDH.MR.FINALIZE"),
        ("tdx_track", "TDH.MEM.TRACK"),
    )
}
# First line of the register dump of a warning.
RAX: Final = re.compile(r"^RAX: (?P<word>[0-9a-f]{16}) RBX: ")
END_TRACE: Final = re.compile(r"^---\[ end trace ")
# Files and functions of the kernel whose warnings are about TDX.
_ABOUT: Final = re.compile(r"tdx|seamcall|tdh_|sept|kvm/vmx|virt/kvm|arch/x86/kvm", re.IGNORECASE)


def _failed(found: re.Match[str]) -> MessageFields:
    rest = found.string[found.end("status") :]
    rcx, rdx = RCX.search(rest), RDX.search(rest)
    return {
        "leaf": _leaf(found["leaf"]),
        "status": int(found["status"], 16),
        "rcx": int(rcx["word"], 16) if rcx else None,
        "rdx": int(rdx["word"], 16) if rdx else None,
    }


def _leaf(text: str | None) -> int | None:
    """Return the leaf number for a leaf name, or a hexadecimal or decimal number; None if unknown.

    The number may have a version above bit 16.  ``TDH_MEM_RD(12)`` has a name and a number: the
    first known one counts.
    """
    for name in _LEAF_WORD.findall((text or "").strip("[]()").split("[")[0]):
        try:
            return leaves.parse_leaf(name)[0]
        except ValueError:
            continue
    return None


def status_of_warning(function: str | None, rax: int) -> MessageFields:
    """Return the leaf and status of a warning; empty if RAX may be something other than a status.

    The function must be one that warns about a single leaf, and RAX must have the error bit and a
    status code of the module: by the time the registers are printed, RAX may hold any value.
    """
    leaf = WARNING_LEAVES.get(function or "")
    if leaf is None or rax < word.ERROR_BIT or rax & word.CODE_BITS not in _codes():
        return {}
    return {"leaf": leaf, "status": rax}


@cache
def _codes() -> frozenset[int]:
    """Return the status codes of the TDX module, masked with CODE_BITS."""
    return frozenset(code & word.CODE_BITS for code in status_table()["status"])


def _failed_on(found: re.Match[str]) -> MessageFields:
    return _failed(found) | {"cpu": _number(found["cpu"], 4)}


def _entered(found: re.Match[str]) -> MessageFields:
    return {"leaf": 0, "status": int(found["status"], 16), "tid": int(found["tid"])}


def _warned(found: re.Match[str]) -> MessageFields | None:
    place = found["place"]
    if _ABOUT.search(place) is None:
        return None
    function = found["function"]
    where = {"function": function.partition("+")[0] if function else None}
    numbers = {"cpu": _number(found["cpu"], 4), "tid": _number(found["tid"], 9)}
    return {**where, **numbers}


def _suppressed(found: re.Match[str]) -> MessageFields | None:
    """Return function and count of rate-limited messages; None if it is not one of TDX or KVM."""
    if not re.search(r"tdx|seamcall|sept|tdh_|vmx|kvm|vcpu", found["function"], re.IGNORECASE):
        return None
    return {"function": found["function"], "n_events": int(found["n"])}


def _number(text: str | None, max_digits: int) -> int | None:
    return int(text) if text is not None and len(text) <= max_digits else None


Reader = Callable[[re.Match[str]], MessageFields | None]
# Message, its pattern, and the reader of a match.  The first reader that returns fields wins.
_PATTERNS: Final[tuple[tuple[str, str, Reader], ...]] = (
    # Linux 6.5 of Ubuntu, canonical/tdx issue 25: "SEAMCALL failed: CPU 94: leaf 33, error 0x…";
    # before it without the CPU.
    (
        "seamcall_failed",
        rf"SEAMCALL failed: (?:CPU (?P<cpu>\d+): )?leaf (?P<leaf>\d{{1,8}}), error {_WORD}",
        _failed_on,
    ),
    # Out of tree, before 6.5: "SEAMCALL[NAME] failed on cpu n: NAME (0x…)", "SEAMCALL[NAME(12)]
    # failed: Unknown SEAMCALL status code(0x…)", "SEAMCALL[12] failed: 0x…".
    (
        "seamcall_failed",
        r"SEAMCALL(?P<leaf>\[[\w.]{1,40}(?:\(\w{1,18}\))?\]) failed(?: on cpu (?P<cpu>\d+))?: "
        rf"[A-Za-z_ ]{{0,40}}\(?{_WORD}",
        _failed_on,
    ),
    # 6.16 to 7.2 arch/x86/kvm/vmx/tdx.c, pr_tdx_error*, TDX_BUG_ON*; 6.8
    # arch/x86/virt/vmx/tdx/tdx.c, seamcall_err: "SEAMCALL (0x…) failed: 0x…".
    ("seamcall_failed", rf"SEAMCALL (?P<leaf>\(\w{{1,18}}\)|[A-Z][\w.]+) failed: {_WORD}", _failed),
    # TDH_VP_RD[TD_VMCS.0x…] failed 0x…, TDH_VP_WR[….0x…] = 0x… failed: 0x…, TDH_MNG_RD[…].
    (
        "seamcall_failed",
        rf"(?P<leaf>TDH_[A-Z_]{{1,40}})\[[^\]]{{1,40}}\].{{0,24}}? failed:? {_WORD}",
        _failed,
    ),
    # "TDH.SYS.DISABLE failed: 0x…"; VMware: "TDH.MNG.INIT failed with status: 0x…".
    (
        "seamcall_failed",
        rf"(?P<leaf>TDH[._][A-Z._]{{1,40}}) failed(?: with status)?: {_WORD}",
        _failed,
    ),
    # 6.16 tdx_handle_exit; the number is the ID of the current thread (kvm_host.h, kvm_err).
    ("vp_enter_ret", rf"kvm \[(?P<tid>\d{{1,9}})\]: TD vp_enter_ret {_WORD}", _entered),
    # Out of tree: "TD exit 0x…, 0 hkid 0x41 hkid pa 0x…".
    ("vp_enter_ret", rf"kvm \[(?P<tid>\d{{1,9}})\]: TD exit {_WORD}, ", _entered),
    (
        "exceeded_retries",
        r"Exceeded (?P<n>\d{1,10}) retries for S-EPT operation",
        lambda found: {"n_events": int(found["n"])},
    ),
    ("crashing", r"Crashing due to lock contention in the TDX module", lambda _: {}),
    # Linux kernel/panic.c __warn, to 6.17; the function is missing if there are no symbols.
    (
        "warning",
        r"^WARNING: CPU: (?P<cpu>\d+) PID: (?P<tid>\d+) "
        r"(?P<place>at (?>\S+:\d+)(?: (?P<function>\S++))?+.*)$",
        _warned,
    ),
    # The same in later kernels.
    (
        "warning",
        r"^WARNING: (?=.*/\d++$)(?P<place>\S+:\d++ at (?P<function>[^\s,]++).*), "
        r"CPU#(?P<cpu>\d++): .*/(?P<tid>\d++)$",
        _warned,
    ),
    (
        "kernel_bug",
        r"^(?:kernel BUG at|BUG: ) ?(?P<place>.*)$",
        lambda found: {} if _ABOUT.search(found["place"]) else None,
    ),
    # Linux lib/ratelimit.c ___ratelimit; the function is the one that printed.
    (
        "suppressed",
        r"^(?:kvm_intel: )?(?P<function>\w+): (?P<n>\d{1,10}) callbacks suppressed",
        _suppressed,
    ),
    ("hkid_leaked", r"tdh_mng_\w{1,40}\(\) failed\. HKID -?\d+ is leaked", lambda _: {}),
    (
        "guest_access",
        r"Guest access before accepting (?P<gpa>0x[0-9a-f]{1,16}) on vCPU (?P<vcpu>\d{1,9})",
        lambda found: {"gpa": int(found["gpa"], 16), "vcpu_id": int(found["vcpu"])},
    ),
    # No mainline release before 7.2 prints it.
    (
        "module_version",
        "(?m)" + _AFTER_TDX + ".*" + releases.VERSION_LINE.pattern,
        lambda found: {"module_version": found["version"]},
    ),
    # Up to 6.8: "TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, minor_version 5,
    # build_date 20240129, build_num 698".
    (
        "module_version",
        "(?m)" + r"^(?>.*?(?=TDX module: ))" + releases.BUILD_LINE.pattern,
        lambda found: {"module_version": releases.named_by_build(**found.groupdict())},
    ),
    (
        "module_state",
        "(?im)" + _AFTER_TDX + r"(?:(?>.*?module ).*failed"
        r"|.*(?:module (?:not loaded|initiali[sz]|disabled|shut ?down)"
        r"|BIOS enabled|not enabled by BIOS|Disable ACPI S3|not supported by the host"
        r"|module is not loaded|initialization failed))|Failed to initialize TDX module"
        r"|All packages need to have online CPU|TDX requires all packages to have an online CPU",
        lambda _: {},
    ),
)
PATTERNS: Final = tuple((name, re.compile(text, re.ASCII), read) for name, text, read in _PATTERNS)
"""Compiled ``_PATTERNS``; digits and words are ASCII only."""
# Every pattern requires one of these words; most lines of a log have none of them.
_HINT: Final = re.compile(
    r"tdx|SEAMCALL|TDH|vp_enter_ret|TD exit|S-EPT|WARNING: |BUG|suppressed|HKID|before accepting"
    r"|packages"
)


# Words in any other message about TDX.  They must be whole words: names of CPU models may end in
# the same letters.  tdx_host is the device of Linux 7.2 (drivers/virt/coco/tdx-host), NO_RBP_MOD a
# feature of the module that KVM of 6.16 misses, an HKID the key of a TD.
_OF_TDX: Final = re.compile(
    r"\btdx: |\bTDX\b|\btdx[_-](?:host|module|mig)\b|\bSEAMCALL\b|\bTDVMCALL\b|\bvp_enter"
    r"|\bHKIDs?\b|\bNO_RBP_MOD\b|\b(?:P-)?(?i:seamldr)"
)


def is_about_tdx(text: str) -> bool:
    """Return whether a kernel message mentions TDX, even if :func:`parse_message` returns None.

    Such a message is kept with its text only, for people to read.
    """
    return _OF_TDX.search(text) is not None


def parse_message(text: str) -> tuple[str, MessageFields] | None:
    """Return the name of a message about TDX and its non-null fields; None for other messages."""
    if _HINT.search(text) is None and "TDX" not in text:
        return None
    for message, pattern, read in PATTERNS:
        found = pattern.search(text)
        if found is not None and (fields := read(found)) is not None:
            return message, {name: value for name, value in fields.items() if value is not None}
    return None
