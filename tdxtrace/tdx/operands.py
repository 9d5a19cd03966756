"""Operands of leaves: contents of registers, and the resource named by a busy status."""

from __future__ import annotations

from functools import cache
from typing import Final

import polars as pl

from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.word import is_busy, low32

# Columns of ``seamcalls`` whose name differs from the role.
_COLUMNS: Final = {"td": "td_id", "vcpu": "vp_id"}
# Operand ids fit 16 bits (the highest known is 0x140), so a leaf and an id fit one UInt32.
_ID_SPACE: Final = 1 << 16
# Entries of a page table, and levels 0 to 2 (4K, 2M, 1G): intel/tdx-module 1.5.01 include/
# tdx_vmm_api_handlers.h.
_PER_TABLE: Final = 512
_HIGHEST_LEVEL: Final = 2


def n_small_pages(level: pl.Expr) -> pl.Expr:
    """Return the number of 4K pages (UInt64) in a page of a level; null is taken as 4K."""
    known = level.fill_null(0).clip(0, _HIGHEST_LEVEL)
    return pl.lit(_PER_TABLE, pl.UInt64).pow(known).cast(pl.UInt64)


@cache
def operand_table() -> pl.DataFrame:
    """Return the operands of the leaves, one row per leaf, input register and role.

    Roles are td (address of the TDR), vcpu (of the TDVPR), gpa, level, and page: an address in
    host physical memory; a second and third page of a call are "page 2" and "page 3".  A register
    that holds an address and a level has one row for each: bits 51:12 and bits 2:0.

    Returns:
        Columns leaf (UInt16), call (its name), register (RCX, RDX, ...), role, column (of
        ``seamcalls``) and source.
    """
    role = pl.col("role")
    column = role.replace(_COLUMNS).str.replace_all(" ", "_", literal=True)
    return facts("operands", leaf=pl.UInt16).select(
        "leaf", "call", "register", "role", column.alias("column"), "source"
    )


@cache
def operand_id_table() -> pl.DataFrame:
    """Return the operand ids, one row per id.

    Returns:
        Columns operand_id (UInt32), name (RCX, SEPT_TREE, ...), kind (register, parameter, list or
        object), resource (for an object: the resource on every leaf; null for the other kinds),
        meaning, since, source.
    """
    return facts("operand_ids", operand_id=pl.UInt32)


@cache
def resource_table() -> pl.DataFrame:
    """Return the resource of each operand id of a busy status, one row per leaf and id.

    Derived from the lock table: the first lock that a leaf takes under an id is the ``resource``,
    later ones under the same id are the ``alternative``.  Locks of 1.5 have precedence over 1.0.

    Returns:
        Columns leaf (UInt16), call (its name), operand_id (UInt32), resource, alternative, note,
        source.
    """
    return facts("resources", leaf=pl.UInt16, operand_id=pl.UInt32)


def operand_name(operand_id: pl.Expr) -> pl.Expr:
    """Name operand ids: RCX, SEPT_TREE.

    Args:
        operand_id: Low halves of status words that hold an operand id, UInt32.

    Returns:
        String; null for null and for an unknown id.
    """
    table = operand_id_table()
    return operand_id.cast(pl.UInt32).replace_strict(
        table["operand_id"], table["name"], default=None, return_dtype=pl.String
    )


def resource(status: pl.Expr, leaf: pl.Expr) -> pl.Expr:
    """Return the resource that a busy status names on its leaf: "SEPT entry", "TDR", "TD epoch".

    Id 1 (RCX) is the SEPT entry on most MEM leaves, the TDVPR on VP leaves, the TDR on TRACK and
    on MNG leaves, a PAMT entry on PHYMEM leaves.  If an id can refer to two resources of a leaf,
    the one that the leaf locks first is returned; :func:`resource_table` has the other.  If the
    leaf is null or unknown, ids of objects still name their resource, and ids of registers give
    the register's name.

    Args:
        status: Status words, UInt64.
        leaf: Leaf numbers, UInt16.

    Returns:
        String; null where the status is not TDX_OPERAND_BUSY, or its operand is 0 or unknown.
    """
    table = resource_table()
    keys = table["leaf"].cast(pl.UInt32) * _ID_SPACE + table["operand_id"]
    operand_id = pl.when(is_busy(status) & (low32(status) != 0)).then(low32(status))
    key = pl.when(operand_id < _ID_SPACE).then(leaf.cast(pl.UInt32) * _ID_SPACE + operand_id)
    on_leaf = key.replace_strict(keys, table["resource"], default=None, return_dtype=pl.String)
    anywhere = operand_id_table().with_columns(pl.coalesce("resource", "name"))
    on_any = operand_id.replace_strict(
        anywhere["operand_id"], anywhere["resource"], default=None, return_dtype=pl.String
    )
    return pl.coalesce(on_leaf, on_any)
