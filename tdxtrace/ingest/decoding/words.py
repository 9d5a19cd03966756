"""What the arguments and registers of a call say: fields of the attempt, as words."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.ingest.raw import Fields, U64Array, Words
from tdxtrace.tdx import leaves

# GPA and level share RCX of the MEM leaves: bits 51:12 and 2:0.  Linux
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
    table = leaves.leaf_table()
    found: dict[str, dict[str, NDArray[np.uint16]]] = {}
    for column, register in (
        ("gpa", "gpa_register"),
        ("td_id", "td_register"),
        ("vp_id", "vp_register"),
        ("page", "page_register"),
    ):
        found[column] = {
            name.lower(): table.filter(pl.col(register) == name)["leaf"].to_numpy()
            for name in table[register].drop_nulls().unique()
        }
    return found


def from_registers(first: Fields, leaf: U64Array) -> dict[str, Words]:
    """What the input registers of a SEAMCALL say, for probes on ``__seamcall*``."""
    words: dict[str, Words] = {}
    if first.names().isdisjoint(("rcx", "rdx", "r8")):
        return words
    n = len(first)
    read = {name: of(first, name) for name in ("rcx", "rdx", "r8")}
    for column, by_register in _registers().items():
        value, there = np.zeros(n, np.uint64), np.zeros(n, np.bool_)
        for register, users in by_register.items():
            found, has = read[register]
            here = np.isin(leaf, users) & has
            value = np.where(here, found, value)
            there |= here
        words[column] = value, there
    gpa, has_gpa = words["gpa"]
    words["level"] = gpa & _LEVEL_MASK, has_gpa
    words["gpa"] = gpa & _PAGE_MASK, has_gpa
    return words
