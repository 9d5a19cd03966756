"""VMX exit reasons, as the kernel's kvm_exit event prints them, and the zero-step threshold."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

import polars as pl

from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.word import hexadecimal

# Intel SDM volume 3, 27.1.7, bit 31; the only flag that kvm_exit names (Linux 6.18).
FAILED_VMENTRY: Final = 0x8000_0000
_BASIC: Final = 0xFFFF

# Counted EPT violations at one RIP before the module logs pages, from the next one
# on: STEPPING_EPF_THRESHOLD, TDX module 1.0.00 to 1.5.25, td_exit_stepping.h.
STEPPING_EPF_THRESHOLD: Final = 6

# Exit reason that KVM traces when TDH.VP.ENTER returned none: after a busy answer (SEPT tree or TD
# epoch) or an error.  Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_to_vmx_exit_reason().
NOT_ENTERED: Final = 0xFFFF_FFFF
_NOT_ENTERED_NAME: Final = "FAILED_VMENTRY (-1)"
# libtraceevent's KVM plugin prints "UNKNOWN (4294967295)".
_NUMBER_IN_BRACKETS: Final = re.compile(r"^\w+ \((-?\d{1,20})\)")


@cache
def exit_reason_table() -> pl.DataFrame:
    """Return the exit reasons that the kernel names, one row per reason.

    Returns:
        Columns number (UInt16), name, alias (printed by older kernels and tools), source.
    """
    return facts("exit_reasons", number=pl.UInt16)


def exit_reason_name(reason: pl.Expr) -> pl.Expr:
    """Name exit reasons as ``kvm_exit`` does: EPT_VIOLATION, INVALID_STATE FAILED_VMENTRY, 0x4c.

    Bits 15:0 are named, or written in hexadecimal; then come FAILED_VMENTRY for bit 31 and the
    other high bits.  All ones is written "FAILED_VMENTRY (-1)", where the kernel prints
    0xffff FAILED_VMENTRY 0x7fff0000.

    Args:
        reason: Exit reasons, UInt32.

    Returns:
        String; null stays null.
    """
    table = exit_reason_table()
    basic = reason & pl.lit(_BASIC, dtype=pl.UInt32)
    rest = reason & pl.lit(~(FAILED_VMENTRY | _BASIC) & 0xFFFF_FFFF, dtype=pl.UInt32)
    known = basic.cast(pl.UInt16).replace_strict(
        table["number"], table["name"], default=None, return_dtype=pl.String
    )
    failed = pl.when(reason >= FAILED_VMENTRY).then(pl.lit("FAILED_VMENTRY"))
    words = pl.concat_str(
        pl.coalesce(known, hexadecimal(basic)),
        failed,
        pl.when(rest != 0).then(hexadecimal(rest)),
        separator=" ",
        ignore_nulls=True,
    )
    return (
        pl.when(reason.is_null())
        .then(None)
        .when(reason == NOT_ENTERED)
        .then(pl.lit(_NOT_ENTERED_NAME))
        .otherwise(words)
    )


def exit_reason_number(name: str) -> int | None:
    """Parse the reason of a ``kvm_exit`` line, as any tool prints it.

    Args:
        name: The text between "reason" and "rip": a name or hexadecimal, then flags, or
            libtraceevent's "UNKNOWN (77)".

    Returns:
        The exit reason with its high bits, or None if a word is not a VMX exit reason.
    """
    text = name.strip()
    if bracketed := _NUMBER_IN_BRACKETS.fullmatch(text):
        return int(bracketed[1]) & NOT_ENTERED
    number = 0
    for place, word in enumerate(text.split(" ")):
        value = FAILED_VMENTRY if place and word == "FAILED_VMENTRY" else _word(word)
        if value is None:
            return None
        number |= value
    return number


def _word(word: str) -> int | None:
    """Return the value of one word of a reason; None if unknown."""
    if re.fullmatch(r"0x[0-9a-f]{1,8}", word):
        return int(word, 16)
    return _numbers().get(word)


@cache
def _numbers() -> dict[str, int]:
    """Return exit reasons by name and by alias."""
    rows = exit_reason_table().select("number", "name", "alias").rows()
    return {name: number for number, *names in rows for name in names if name}
