"""SEAMCALL leaves: numbers, names, versions and the objects that identify a request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from typing import Final

import polars as pl

from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.wrappers import wrapper_table

# RAX at entry: leaf in 15:0, version in 23:16.  intel/tdx-module 1.5.01
# src/vmm_dispatcher/tdx_vmm_dispatcher.c.
_LEAF_BITS: Final = 0xFFFF
_VERSION_BITS: Final = 0xFF_0000


@cache
def leaf_table() -> pl.DataFrame:
    """Return the leaves of the TDX module, one row per leaf.

    ``request`` names the objects that identify a request of the leaf: "gpa" (TD, page and level),
    "td", "vcpu", "page" (a physical page) or "global".  The registers that hold them are in
    :func:`tdxtrace.tdx.operands.operand_table`.

    Returns:
        Columns leaf (UInt16), name, kernel_name, wrappers (list of kernel functions), max_version
        (UInt8; null: not known), request, since, source.  Ordered by leaf.
    """
    wrappers = (
        wrapper_table()
        .filter(pl.col("function").str.starts_with("tdh_"))
        .group_by("leaf", maintain_order=True)
        .agg(wrappers="function")
    )
    return (
        facts("leaves", leaf=pl.UInt16, max_version=pl.UInt8)
        .join(wrappers, on="leaf", how="left", maintain_order="left")
        .with_columns(
            pl.col("name").str.replace_all(".", "_", literal=True).alias("kernel_name"),
            pl.col("wrappers").fill_null([]),
        )
        .select(
            *("leaf", "name", "kernel_name", "wrappers", "max_version", "request"),
            *("since", "source"),
        )
    )


def leaf_name(leaf: pl.Expr) -> pl.Expr:
    """Name leaves as the module's documents do: TDH.MEM.PAGE.AUG.

    Args:
        leaf: Leaf numbers, UInt16.

    Returns:
        String; null for null and for an unknown number.
    """
    table = leaf_table()
    return leaf.cast(pl.UInt16).replace_strict(
        table["leaf"], table["name"], default=None, return_dtype=pl.String
    )


def parse_leaf(text: str) -> tuple[int, int]:
    """Parse a leaf name or number, as written by users and logs.

    Args:
        text: A name in any case, as in the module (TDH.VP.ENTER, or a unique suffix: VP.ENTER), in
            the kernel (TDH_VP_ENTER) or of a wrapper (tdh_vp_enter), or RAX at entry in decimal or
            0x hexadecimal (38, 0x26, 0x10016).  A number need not be a known leaf.

    Returns:
        Leaf number and version; a name is version 0.

    Raises:
        ValueError: If the name is unknown, or the number has bits that no module leaf has.

    Example:
        >>> parse_leaf("tdh_mem_track"), parse_leaf("0x10016"), parse_leaf("page.aug")
        ((38, 0), (22, 1), (6, 0))
    """
    word = text.strip().upper()
    if re.fullmatch(r"[0-9]+|0X[0-9A-F]+", word):
        fn = int(word, 16 if word.startswith("0X") else 10)
        if fn & ~(_LEAF_BITS | _VERSION_BITS):
            raise ValueError(f"no TDX module leaf: {text!r}; bits above 23 are set")
        return fn & _LEAF_BITS, fn >> 16
    names = _numbers()
    name = word.replace("_", ".")
    # Suffixes, as printed in tables: VP.ENTER, PAGE.AUG.
    ends = {number for full, number in names.items() if full.endswith(f".{name}")}
    if name not in names and len(ends) == 1:
        return ends.pop(), 0
    if name not in names:
        nearest = get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ValueError(f"unknown leaf {text!r}; the nearest known one is {nearest}")
    return names[name], 0


def numbers_of(names: Iterable[str]) -> list[int]:
    """Return the leaf numbers of ``names``, in their order.

    Raises:
        ValueError: If a name is not known; the message names the nearest one.
    """
    return [parse_leaf(name)[0] for name in names]


@cache
def _numbers() -> dict[str, int]:
    """Leaf numbers by name: upper case, dots for underscores."""
    numbers: dict[str, int] = {}
    for leaf, name, functions in leaf_table().select("leaf", "name", "wrappers").iter_rows():
        numbers[name] = leaf
        for function in functions:
            numbers.setdefault(function.upper().replace("_", "."), leaf)
    return numbers
