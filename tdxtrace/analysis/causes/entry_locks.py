"""Locks of SEPT entries: calls that take one, and the longest time a guest can hold one.

A failed try of the host sets host priority on an entry, which keeps guests out until a host call
takes that lock (intel/tdx-module 1.5.01 src/common/helpers/tdx_locks.h, sept_lock_acquire_host).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import polars as pl

from tdxtrace.analysis.causes.conflicts import ENTRY, TREE, held_before
from tdxtrace.tdx import word
from tdxtrace.tdx.locks import lock_table

_PAGE_SHIFT: Final = 12
_LEVEL_SHIFT: Final = 9
# Statuses returned before the SEPT tree is locked, and before the entry is locked: intel/tdx-module
# 1.5.01 src/vmm_dispatcher/api_calls tdh_mem_range_block.c, tdh_mem_page_remove.c (TDR, state of
# the TD, operands, tree and walk, entry).  Any other status may be returned with the lock held.
_BEFORE_TREE: Final = (
    word.TDX_OPERAND_INVALID,
    word.TDX_SYS_BUSY,
    word.TDX_LIFECYCLE_STATE_INCORRECT,
    word.TDX_OP_STATE_INCORRECT,
)
_BEFORE: Final = {TREE: _BEFORE_TREE, ENTRY: (*_BEFORE_TREE, word.TDX_EPT_WALK_FAILED)}
# Linux arch/x86/include/asm/tdx.h: a software code is TDX_SW_ERROR, with the trap in its low bits.
_SW_ERRORS: Final = 1 << 40
# Longest time for which a guest holds the entry of one 4K page: at most the time of accept and
# AUG of a page together, 14.3 us (8 GiB in 30 s: asterinas PR 1691).  A 2M page is cleared as 512
# 4K pages (1.5.01 vm_exits/tdg_mem_page_accept.c).  Inferred; an upper bound.
ACCEPT_NS: Final = 14_300


def address_of_entry() -> pl.Expr:
    """Return the first address mapped by the entry of a call, from its gpa and level."""
    size = _pages(pl.col("level").fill_null(0)) * (1 << _PAGE_SHIFT)
    return pl.col("gpa") - pl.col("gpa") % size


def longest_guest_ns() -> pl.Expr:
    """Return the longest time in ns for which one TDCALL can hold the entry of a call.

    A call without a recorded level is treated as a call on a 2M page.
    """
    return _pages(pl.col("level").fill_null(1)).cast(pl.Int64) * ACCEPT_NS


def _pages(level: pl.Expr) -> pl.Expr:
    """Return the number of 4K pages mapped by an entry of a level."""
    shift = level.cast(pl.UInt64) * _LEVEL_SHIFT
    return pl.lit(2, pl.UInt64).pow(shift).cast(pl.UInt64)


@cache
def takers_of_entry() -> tuple[int, ...]:
    """Return the leaves that take the lock of an SEPT entry."""
    taking = lock_table().filter(
        pl.col("lock") == ENTRY, pl.col("leaf").is_not_null(), pl.col("generation") != "A"
    )
    return tuple(taking["leaf"].unique())


def may_have_taken_entry() -> pl.Expr:
    """Return whether a call took the lock of its SEPT entry, or may have taken it.

    Determined from its leaf and status.  A call took the lock if it succeeded or failed in a step
    after the lock; it may have taken the lock if its return was not recorded.
    """
    later = held_before().filter(pl.col("lock") == ENTRY)
    on_later_lock = pl.struct("leaf", id=word.low32(pl.col("status"))).is_in(
        later.select(pl.struct("leaf", id="operand_id")).to_series().implode()
    )
    status = pl.col("status")
    refused = (word.is_busy(status) & ~on_later_lock) | is_refused_before(ENTRY, status)
    return pl.col("leaf").is_in(takers_of_entry()) & ~refused.fill_null(False)


def is_refused_before(lock: str, status: pl.Expr) -> pl.Expr:
    """Return whether a call that was not busy failed before it tried to take the lock.

    Args:
        lock: Name of the lock.
        status: Status words, UInt64.

    Returns:
        Boolean; null stays null.  For locks outside the SEPT, true only if the CPU or the module
        as a whole refused the SEAMCALL, because such a call took no lock.
    """
    code = word.status_code(status)
    of_cpu = (status >= pl.lit(word.TDX_SW_ERROR, pl.UInt64)) & (
        status < pl.lit(word.TDX_SW_ERROR + _SW_ERRORS, pl.UInt64)
    )
    return of_cpu | code.is_in(_BEFORE.get(lock, (word.TDX_SYS_BUSY,)))
