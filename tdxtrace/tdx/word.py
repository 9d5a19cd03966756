"""Bits of a status word (RAX after a SEAMCALL), and words in hexadecimal."""

from __future__ import annotations

from typing import Final

import polars as pl

_BYTES: Final = range(256)
_DIGITS: Final = [f"{byte:02x}" for byte in _BYTES]
# Layout: intel/tdx-module 1.5.01 include/tdx_api_defs.h, union api_error_code_u.
ERROR_BIT: Final = 1 << 63
NON_RECOVERABLE_BIT: Final = 1 << 62
FATAL_BIT: Final = 1 << 61
HOST_HINT_BIT: Final = 1 << 60
LOW_BITS: Final = 0xFFFF_FFFF

# The module sets "fatal" (61) and "host recoverability hint" (60) at run time on codes whose
# headers lack them: 1.5.01 include/tdx_api_defs.h api_error_fatal(), src/td_transitions/td_exit.c
# async_tdexit_internal().  That codes have to be compared without them is inferred from those.
CODE_BITS: Final = ~(FATAL_BIT | HOST_HINT_BIT | LOW_BITS) & (1 << 64) - 1

# Linux names; values in intel/tdx-module 1.5.01 include/auto_gen/tdx_error_codes_defs.h, and
# the kernel's in Linux 6.16 arch/x86/kvm/vmx/tdx_errno.h (7.x: asm/shared/tdx_errno.h).
TDX_SUCCESS: Final = 0x0000_0000_0000_0000
TDX_INTERRUPTED_RESUMABLE: Final = 0x8000_0003_0000_0000
TDX_INTERRUPTED_RESTARTABLE: Final = 0x8000_0004_0000_0000
TDX_OPERAND_INVALID: Final = 0xC000_0100_0000_0000
TDX_OPERAND_BUSY: Final = 0x8000_0200_0000_0000
TDX_PREVIOUS_TLB_EPOCH_BUSY: Final = 0x8000_0201_0000_0000
TDX_SYS_BUSY: Final = 0x8000_0202_0000_0000
TDX_RND_NO_ENTROPY: Final = 0x8000_0203_0000_0000
TDX_HOST_PRIORITY_BUSY_TIMEOUT: Final = 0x9000_0205_0000_0000
TDX_LIFECYCLE_STATE_INCORRECT: Final = 0xC000_0607_0000_0000
TDX_OP_STATE_INCORRECT: Final = 0xC000_0608_0000_0000
TDX_EPT_WALK_FAILED: Final = 0xC000_0B00_0000_0000
TDX_GPA_RANGE_NOT_BLOCKED: Final = 0xC000_0B06_0000_0000
TDX_TLB_TRACKING_NOT_DONE: Final = 0xC000_0B08_0000_0000
# Module only: 1.5.20 include/auto_gen_1_5/tdx_error_codes_defs.h; LIST_FULL 1.5.34, by its name.
TDX_INTERRUPTED_BUSY: Final = 0x8000_0206_0000_0000
TDX_INTERRUPTED_PAMT: Final = 0x8000_0307_0000_0000
TDX_INTERRUPTED_LIST_FULL: Final = 0x8000_000C_0000_0000
# Linux 6.16 arch/x86/include/asm/tdx.h: made by the kernel when the instruction itself fails.
TDX_SW_ERROR: Final = 0x8000_FF00_0000_0000

# Operand ids: same headers; the kernel names RCX, TDR, SEPT and TD_EPOCH.
TDX_OPERAND_ID_RCX: Final = 0x01
TDX_OPERAND_ID_SEPT: Final = 0x92


def bits(status: pl.Expr, mask: int) -> pl.Expr:
    """Mask status words.

    Args:
        status: Status words, UInt64.
        mask: The bits to keep; the others become 0.

    Returns:
        UInt64; null stays null.
    """
    return status & pl.lit(mask, dtype=pl.UInt64)


def status_code(status: pl.Expr) -> pl.Expr:
    """Return the code of status words: bits 63:32 without bits 61 and 60.

    Args:
        status: Status words, UInt64.

    Returns:
        UInt64; null stays null.
    """
    return bits(status, CODE_BITS)


def low32(status: pl.Expr) -> pl.Expr:
    """Return bits 31:0: operand id, exit reason or other detail, depending on the code.

    Args:
        status: Status words, UInt64.

    Returns:
        UInt32; null stays null.
    """
    return bits(status, LOW_BITS).cast(pl.UInt32)


def is_error(status: pl.Expr) -> pl.Expr:
    """Return whether bit 63 is set: the call failed.

    TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE has it too in the module's spelling, although it is an
    exit of a guest that ran.

    Args:
        status: Status words, UInt64.

    Returns:
        Boolean; null stays null.
    """
    return status >= pl.lit(ERROR_BIT, dtype=pl.UInt64)


def is_success(status: pl.Expr) -> pl.Expr:
    """Return whether bit 63 is clear: the call succeeded, or its work was already done.

    After TDH.VP.ENTER such a word is an exit: the guest ran (or seemed to), and bits 31:0 are the
    exit reason.  TDX_NON_RECOVERABLE_*, after which the TD is dead, are among them.

    Args:
        status: Status words, UInt64.

    Returns:
        Boolean; null stays null.
    """
    return ~is_error(status)


def is_busy(status: pl.Expr) -> pl.Expr:
    """Return whether the code is TDX_OPERAND_BUSY, for any operand.

    Args:
        status: Status words, UInt64.

    Returns:
        Boolean; null stays null.

    Sources:
        Linux 6.16 arch/x86/kvm/vmx/tdx.c, ``tdx_operand_busy()``, which compares bits 63:32.
    """
    return status_code(status) == pl.lit(TDX_OPERAND_BUSY, dtype=pl.UInt64)


def is_busy_on(status: pl.Expr, operand: int) -> pl.Expr:
    """Return whether the code is TDX_OPERAND_BUSY, with this operand.

    Args:
        status: Status words, UInt64.
        operand: An operand id: bits 31:0.

    Returns:
        Boolean; null stays null.
    """
    return is_busy(status) & (low32(status) == operand)


def hexadecimal(number: pl.Expr) -> pl.Expr:
    """Format unsigned numbers as the kernel's ``0x%llx`` does.

    Args:
        number: Any unsigned integer.

    Returns:
        String; null stays null.
    """
    word = number.cast(pl.UInt64)
    digits = pl.concat_str(_byte(word, place) for place in range(7, -1, -1))
    significant = digits.str.strip_chars_start("0")
    return pl.lit("0x") + pl.when(significant == "").then(pl.lit("0")).otherwise(significant)


def _byte(word: pl.Expr, place: int) -> pl.Expr:
    """Return the two digits of byte ``place`` of ``word``; 0 is the lowest."""
    byte = (word // pl.lit(1 << 8 * place, dtype=pl.UInt64)) & pl.lit(0xFF, dtype=pl.UInt64)
    return byte.replace_strict(_BYTES, _DIGITS, return_dtype=pl.String)
