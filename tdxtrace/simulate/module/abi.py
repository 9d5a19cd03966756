"""The numbers of the module's ABI: status codes, operand ids, leaves, entry states, levels.

Transcribed from the module's headers, independently of ``tdxtrace.tdx``: a simulator that
shared its numbers with the readers would reproduce their mistakes.

Sources: intel/tdx-module 1.5.01 ``include/tdx_api_defs.h`` (status codes and operand
ids), ``src/vmm_dispatcher/tdx_vmm_dispatcher.h`` (leaf numbers, in data/leaves.csv), the SEPT entry
states of ``src/common/memory_handlers/sept_manager.h``.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.tables import rows

SUCCESS: Final = 0x0
INTERRUPTED_RESUMABLE: Final = 0x8000_0003_0000_0000
INTERRUPTED_RESTARTABLE: Final = 0x8000_0004_0000_0000
OPERAND_BUSY: Final = 0x8000_0200_0000_0000
PREVIOUS_TLB_EPOCH_BUSY: Final = 0x8000_0201_0000_0000
RND_NO_ENTROPY: Final = 0x8000_0203_0000_0000
HOST_PRIORITY_BUSY: Final = 0x8000_0204_0000_0000
HOST_PRIORITY_BUSY_TIMEOUT: Final = 0x9000_0205_0000_0000
INTERRUPTED_BUSY: Final = 0x8000_0206_0000_0000
OP_STATE_INCORRECT: Final = 0xC000_0608_0000_0000
VCPU_STATE_INCORRECT: Final = 0xC000_0700_0000_0000
VCPU_ASSOCIATED: Final = 0x8000_0701_0000_0000
VCPU_NOT_ASSOCIATED: Final = 0x8000_0702_0000_0000
EPT_WALK_FAILED: Final = 0xC000_0B00_0000_0000
GPA_RANGE_NOT_BLOCKED: Final = 0xC000_0B06_0000_0000
GPA_RANGE_ALREADY_BLOCKED: Final = 0x0000_0B07_0000_0000
TLB_TRACKING_NOT_DONE: Final = 0xC000_0B08_0000_0000
EPT_ENTRY_STATE_INCORRECT: Final = 0xC000_0B0D_0000_0000

ERROR_BIT: Final = 1 << 63
HIGH_HALF: Final = 0xFFFF_FFFF_0000_0000

OPERAND: Final = {
    "RCX": 1,
    "RDX": 2,
    "R8": 8,
    "TDR": 128,
    "SEPT_TREE": 146,
    "RTMR": 168,
    "TD_EPOCH": 169,
    "MIGSC": 171,
    "OP_STATE": 172,
    "MIG": 173,
    "SERVTD_BINDINGS": 174,
    "KOT": 186,
    "KET": 187,
    "WBCACHE": 188,
}

# SEAMCALL leaves, RAX bits 15:0.
LEAF: Final = {row["leaf"]: int(row["number"]) for row in rows("leaves")}

# States of a Secure EPT entry, as RDX bits 15:8 show them.
FREE: Final = 0
BLOCKED: Final = 1
PENDING: Final = 2
PENDING_BLOCKED: Final = 3
MAPPED: Final = 4
NL_BLOCKED: Final = 129
NL_MAPPED: Final = 132

# Levels of the Secure EPT: 0 is 4K, 1 is 2M, 2 is 1G, 3 is 512G.
ROOT_LEVEL: Final = 3
PAGE_BYTES: Final = tuple(1 << (12 + 9 * level) for level in range(5))

# VMX exit reasons (Intel SDM vol. 3, appendix C) in RAX bits 31:0 of TDH.VP.ENTER.
EXIT_INTERRUPT: Final = 1
EXIT_CPUID: Final = 10
EXIT_HLT: Final = 12
EXIT_IO: Final = 30
EXIT_MSR_WRITE: Final = 32
EXIT_EPT_VIOLATION: Final = 48
EXIT_TDCALL: Final = 77
# P-SEAMLDR: selected by bit 63 of RAX at entry (qizhangz/seam-loader pseamldr_api_defs.h).
LOADER_BIT: Final = 1 << 63
LOADER_LEAF: Final = {"SEAMLDR.INSTALL": 1}


def is_busy(status: int) -> bool:
    """Return whether a status is OPERAND_BUSY, for any operand."""
    return status & HIGH_HALF == OPERAND_BUSY


def page_bytes(level: int) -> int:
    """Return the size of a page of ``level``, in bytes."""
    return PAGE_BYTES[level]
