"""The P-SEAMLDR, which loads and updates the TDX module: its leaves and statuses.

A SEAMCALL with bit 63 of RAX set at entry calls it instead of the module (Linux 7.2
arch/x86/virt/vmx/tdx/seamldr.c).  It has its own numbers of leaves and statuses.  Its status words
cannot be distinguished from unknown status words of the module, so a word is decoded by the leaf
that returned it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final

import polars as pl

from tdxtrace.tdx.facts import facts

LOADER_BIT: Final = 1 << 63
"""Bit of RAX at entry that selects the P-SEAMLDR."""
_LEAF_BITS: Final = 0xFFFF


@cache
def loader_leaf_table() -> pl.DataFrame:
    """Return the leaves of the P-SEAMLDR, one row per leaf.

    Returns:
        Columns leaf (UInt16, without bit 63), name and source.
    """
    return facts("loader_leaves", leaf=pl.UInt16)


@cache
def loader_status_table() -> pl.DataFrame:
    """Return the statuses of the P-SEAMLDR, one row per word.

    Returns:
        Columns status (UInt64, whole words), name, host_retry (a key of
        :data:`tdxtrace.tdx.status.HOST_RETRY`), meaning and source.
    """
    return facts("loader_status_codes", status=pl.UInt64)


def loader_leaf_name(leaf: pl.Expr) -> pl.Expr:
    """Name leaves of the P-SEAMLDR: SEAMLDR.INSTALL.

    Args:
        leaf: Leaf numbers without bit 63, UInt16.

    Returns:
        String; "P-SEAMLDR leaf 7" for an unknown number, null for null.
    """
    table = loader_leaf_table()
    names = leaf.replace_strict(table["leaf"], table["name"], default=None, return_dtype=pl.String)
    return pl.coalesce(names, pl.format("P-SEAMLDR leaf {}", leaf))


def loader_status_name(status: pl.Expr) -> pl.Expr:
    """Name status words that the P-SEAMLDR returned: PSEAMLDR_EINTERRUPT.

    Args:
        status: RAX after a SEAMCALL that had bit 63 set at entry, UInt64; the names are not valid
            for other calls.

    Returns:
        String; null for null and for an unknown word.
    """
    table = loader_status_table()
    return status.replace_strict(
        table["status"], table["name"], default=None, return_dtype=pl.String
    )


def parse_loader_leaf(text: str) -> int | None:
    """Parse a leaf of the P-SEAMLDR, as written by users and logs.

    Args:
        text: A name in any case (SEAMLDR.INSTALL, seamldr_install), or RAX at entry in decimal or
            0x hexadecimal, with bit 63 set.

    Returns:
        Leaf number without bit 63, which need not be a known one; None if the text names no leaf
        of the P-SEAMLDR.

    Example:
        >>> parse_loader_leaf("SEAMLDR_INSTALL"), parse_loader_leaf("0x8000000000000001")
        (1, 1)
    """
    word = text.strip().upper()
    if re.fullmatch(r"[0-9]{1,20}|0X[0-9A-F]{1,16}", word):
        fn = int(word, 16 if word.startswith("0X") else 10)
        return fn & _LEAF_BITS if fn & ~_LEAF_BITS == LOADER_BIT else None
    numbers = dict(loader_leaf_table().select("name", "leaf").iter_rows())
    return numbers.get(word.replace("_", "."))
