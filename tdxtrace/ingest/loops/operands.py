"""RAX at entry names leaf and version of a SEAMCALL, and the leaf says what its registers hold."""

from __future__ import annotations

from typing import Final

import numpy as np

from tdxtrace.ingest.batch import BoolArray, I8Array, I32Array, U64Array
from tdxtrace.tdx.wrappers import PAGES

REGISTERS: Final = ("rcx", "rdx", "r8")
IN_REGISTERS: Final = ("td_id", "vp_id", "gpa", *PAGES, "level")
"""What registers can hold."""
FIELDS: Final = (*IN_REGISTERS, "fn", "leaf", "version", "gfn", *REGISTERS)
"""Rows of ``value`` and ``seen`` that :func:`read_operands` looks at."""
NO_REGISTER: Final = -1
_N_OPERANDS: Final = len(IN_REGISTERS)
_GPA, _LEVEL = FIELDS.index("gpa"), FIELDS.index("level")
_FN, _LEAF, _VERSION = FIELDS.index("fn"), FIELDS.index("leaf"), FIELDS.index("version")
_GFN, _FIRST_REGISTER = FIELDS.index("gfn"), FIELDS.index("rcx")
# RAX at entry: leaf in bits 15:0, version in 23:16 (see tdx.leaves.split_fn).
_LEAF_MASK: Final = np.uint64(0xFFFF)
_VERSION_SHIFT: Final = np.uint64(16)
_VERSION_MASK: Final = np.uint64(0xFF)
_PAGE_SHIFT: Final = np.uint64(12)
# An address and a level that share a register: bits 51:12 and 2:0.  Linux
# arch/x86/virt/vmx/tdx/tdx.c passes gpa | level; TDX module ABI, TDH.MEM.PAGE.AUG.
_PAGE_MASK: Final = np.uint64(0x000F_FFFF_FFFF_F000)
_LEVEL_MASK: Final = np.uint64(0x7)


def read_operands(registers: I8Array, value: U64Array, seen: BoolArray, leaf: I32Array) -> None:
    """Fill leaf, version and operands of each call from its registers, where not yet known.

    Args:
        registers: By leaf and place in IN_REGISTERS: place in REGISTERS of what holds it,
            or NO_REGISTER.
        value: One row per field of FIELDS, one entry per call.
        seen: Where a value is known, of the same shape.
        leaf: Of each call as its probe tells, -1: it does not.
    """
    for row in range(len(leaf)):
        if seen[_FN, row]:
            fn = value[_FN, row]
            leaf[row] = np.int32(fn & _LEAF_MASK)
            if not seen[_VERSION, row]:
                value[_VERSION, row] = fn >> _VERSION_SHIFT & _VERSION_MASK
                seen[_VERSION, row] = True
        if seen[_LEAF, row]:
            leaf[row] = np.int32(value[_LEAF, row] & _LEAF_MASK)
        if seen[_GFN, row] and not seen[_GPA, row]:
            value[_GPA, row] = value[_GFN, row] << _PAGE_SHIFT
            seen[_GPA, row] = True
        number = leaf[row]
        if number < 0 or number >= len(registers):
            continue
        of_level = registers[number, _LEVEL]
        for field in range(_N_OPERANDS):
            register = registers[number, field]
            if register == NO_REGISTER or not seen[_FIRST_REGISTER + register, row]:
                continue
            word = value[_FIRST_REGISTER + register, row]
            if field == _LEVEL:
                word = word & _LEVEL_MASK
            elif field == _GPA or register == of_level:
                word = word & _PAGE_MASK
            if not seen[field, row]:
                value[field, row] = word
                seen[field, row] = True
            if field == _GPA and of_level == NO_REGISTER and not seen[_LEVEL, row]:
                # An address in guest memory without a level is that of a 4K page.
                value[_LEVEL, row] = 0
                seen[_LEVEL, row] = True
