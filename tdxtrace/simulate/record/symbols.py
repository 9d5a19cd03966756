"""Kernel symbols and addresses: invented values in realistic ranges.

Ranges: kernel pointers of x86-64 with five-level paging (0xff11…: direct map, 0xffd4…:
struct page), text of vmlinux at 0xffffffff81…, of modules at 0xffffffffc0….  Names and
order of arguments: Linux 6.16 ``arch/x86/virt/vmx/tdx/tdx.c``, 7.2 where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tdxtrace.simulate.tables import rows

# Trace clock at the start of a run: an uptime in the range of real captures.
CLOCK_START_NS: Final = 4_189_190_000_000
_TD_BASE: Final = 0xFF11_0001_8A00_0000
_VCPU_BASE: Final = 0xFF11_0001_9000_0000
_PAGE_STRUCTS: Final = 0xFFD4_0000_0000_0000
_STRUCT_PAGE_BYTES: Final = 64

_WRAPPER_ROWS: Final = [row for row in rows("leaves") if row["wrapper"]]
# By leaf: wrapper and its arguments before the first that is only an output.
WRAPPERS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    row["leaf"]: (row["wrapper"], tuple(row["arguments"].split())) for row in _WRAPPER_ROWS
}
PFN_FROM_7_2: Final = frozenset(row["leaf"] for row in _WRAPPER_ROWS if row["pfn_from_7_2"])
"""Leaves whose wrapper takes a page frame number from 7.2 on, and a struct page up to 7.1."""
WITH_OUTPUT: Final = frozenset(row["leaf"] for row in _WRAPPER_ROWS if row["has_output"])
"""SEAMCALLs with outputs, called through __seamcall_ret; others are called through __seamcall:
Linux arch/x86/virt/vmx/tdx/tdx.c, seamcall_ret() and seamcall()."""
VCPU_RUN: Final = "tdx_vcpu_run"

# Caller of each function as the kernel prints it: symbol, offset, size, module.
_CALLERS: Final[Mapping[str, str]] = {
    "tdh_mem_page_aug": "tdx_sept_set_private_spte+0x9b/0x1a0 [kvm_intel]",
    "tdh_mem_sept_add": "tdx_sept_link_private_spt+0x6d/0xf0 [kvm_intel]",
    "tdh_mem_range_block": "tdx_sept_zap_private_spte+0x5e/0x130 [kvm_intel]",
    "tdh_mem_track": "tdx_track+0x47/0x110 [kvm_intel]",
    "tdh_mem_page_remove": "tdx_sept_drop_private_spte+0x71/0x1b0 [kvm_intel]",
    "tdh_phymem_page_wbinvd_hkid": "tdx_sept_drop_private_spte+0xe4/0x1b0 [kvm_intel]",
    "tdh_phymem_page_reclaim": "__tdx_reclaim_page+0x3c/0xe0 [kvm_intel]",
    "tdh_phymem_cache_wb": "smp_func_do_phymem_cache_wb+0x2b/0x60 [kvm_intel]",
    "tdh_vp_flush": "tdx_flush_vp+0x38/0x70 [kvm_intel]",
    VCPU_RUN: "vt_vcpu_run+0x2e/0x60 [kvm_intel]",
}
_FALLBACK: Final = "tdx_vm_ioctl+0x151/0x8a0 [kvm_intel]"
_PLACES: Final = {row["wrapper"]: int(row["place"]) for row in _WRAPPER_ROWS}


def td_address(td: int) -> int:
    """Address of the struct tdx_td of a VM."""
    return _TD_BASE + 0x1_0000 * td + 0x9A8


def vcpu_address(td: int, vcpu: int) -> int:
    """Address of the struct vcpu_tdx of a vCPU, which is also that of its struct kvm_vcpu."""
    return _VCPU_BASE + 0x100_0000 * td + 0x4000 * vcpu


def vp_address(td: int, vcpu: int) -> int:
    """Address of the struct tdx_vp inside a vCPU's struct vcpu_tdx."""
    return vcpu_address(td, vcpu) + 0x2A40


def control_page(td: int, vcpu: int = -1) -> int:
    """Physical address of the TDR of a VM, or of the TDVPR of one of its vCPUs."""
    return (0x20_0000_0000 + td * 0x100_0000) + (vcpu + 1) * 0x1000


def struct_page(page: int) -> int:
    """Address of the struct page of a physical page."""
    return _PAGE_STRUCTS + (page >> 12) * _STRUCT_PAGE_BYTES


def entry_symbol(function: str) -> str:
    """Location of a kprobe on a function's entry, as the kernel prints it."""
    if function == VCPU_RUN:
        return "tdx_vcpu_run+0x4/0x230 [kvm_intel]"
    return f"{function}+0x4/0xb0"


def caller_symbol(function: str) -> str:
    """Return address of a function, as the kernel prints it."""
    if function.startswith("__seamcall"):
        return "tdh_mem_page_aug+0x6f/0xb0"
    return _CALLERS.get(function, _FALLBACK)


def function_symbol(function: str) -> str:
    """Name of a function as printed to the right of a return probe's arrow."""
    return f"{function} [kvm_intel]" if function == VCPU_RUN else function


def function_address(function: str) -> int:
    """Address of a function's first instruction after its endbr64."""
    if function == VCPU_RUN:
        return 0xFFFF_FFFF_C0A5_1240
    if function.startswith("__seamcall"):
        return 0xFFFF_FFFF_8128_F000 + 0x80 * function.count("_")
    return 0xFFFF_FFFF_8129_0000 + 0x100 * _PLACES[function] + 4


def caller_address(function: str) -> int:
    """Return address of a function."""
    name = caller_symbol(function).split("+", maxsplit=1)[0]
    offset = int(caller_symbol(function).split("+")[1].split("/", maxsplit=1)[0], 16)
    return 0xFFFF_FFFF_C0A4_0000 + 0x400 * (sum(name.encode()) % 64) + offset
