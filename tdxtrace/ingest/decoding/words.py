"""What the arguments and registers of a call say: fields of the attempt, as words."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.raw import Fields, U64Array, Words
from tdxtrace.tdx.operands import operand_table
from tdxtrace.tdx.wrappers import PAGES

# An address and a level that share a register: bits 51:12 and 2:0.  Linux
# arch/x86/virt/vmx/tdx/tdx.c passes gpa | level; TDX module ABI, TDH.MEM.PAGE.AUG.
_PAGE_MASK: Final = np.uint64(0x000F_FFFF_FFFF_F000)
_LEVEL_MASK: Final = np.uint64(0x7)


def of(fields: Fields, name: str) -> Words:
    """A field of events that need not have it."""
    if name in fields.names():
        return fields.get(name)
    return np.zeros(len(fields), np.uint64), np.zeros(len(fields), np.bool_)


def either(first: Fields, last: Fields, name: str) -> Words:
    """A field as the entries have it, else as the returns have it."""
    value, early = of(first, name)
    # Most fields are always of the entry or always of the return: then half is not looked at.
    if name not in last.names() or early.all():
        return value, early
    other, late = last.get(name)
    if not early.any():
        return other, late
    if not late.any():
        return value, early
    return np.where(early, value, other), early | late


def prefer(words: Words, other: Words) -> Words:
    """Return ``words``, and ``other`` where there is none."""
    if words[1].all() or not other[1].any():
        return words
    return np.where(words[1], words[0], other[0]), words[1] | other[1]


@cache
def _registers() -> dict[str, dict[str, NDArray[np.uint16]]]:
    """For each column and SEAMCALL input register: the leaves that pass it there."""
    found: dict[str, dict[str, NDArray[np.uint16]]] = {}
    for (column, register), rows in operand_table().group_by(
        "column", "register", maintain_order=True
    ):
        leaves = rows["leaf"].to_numpy()
        found.setdefault(str(column), {})[str(register).lower()] = leaves
    return found


def from_registers(first: Fields, leaf: U64Array) -> dict[str, Words]:
    """What the input registers of a SEAMCALL say, for probes on ``__seamcall*``."""
    words: dict[str, Words] = {}
    by_column = _registers()
    registers = {register for users in by_column.values() for register in users}
    if first.names().isdisjoint(registers):
        return words
    n = len(first)
    read = {name: of(first, name) for name in registers}
    has_level = {name: np.isin(leaf, users) for name, users in by_column["level"].items()}
    for column, by_register in by_column.items():
        value, there = np.zeros(n, np.uint64), np.zeros(n, np.bool_)
        for register, users in by_register.items():
            found, has = read[register]
            here = np.isin(leaf, users) & has
            if column == "level":
                found = found & _LEVEL_MASK
            elif register in has_level:
                found = np.where(has_level[register], found & _PAGE_MASK, found)
            value = np.where(here, found, value)
            there |= here
        if there.any() or column not in PAGES[1:]:
            words[column] = value, there
    # An address in guest memory without a level is that of a 4K page.
    gpa, has_gpa = words["gpa"]
    level, has_level_ = words["level"]
    words["gpa"], words["level"] = (gpa & _PAGE_MASK, has_gpa), (level, has_level_ | has_gpa)
    return words
