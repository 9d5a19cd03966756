"""Keys of the TD, vCPU, SEPT entry or page that a call works on."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Index, Rows, Times
from tdxtrace.analysis.causes.conflicts import LockConflicts
from tdxtrace.analysis.causes.entry_locks import address_of_entry
from tdxtrace.tdx.wrappers import PAGES

NO_KEY: Final = -1
_PAGE_SHIFT: Final = 12
_LEVEL_SHIFT: Final = 9
# Kernel addresses begin here (Linux Documentation/arch/x86/x86_64/mm.rst): a page argument
# above is a struct page of 64 bytes, one per 4K frame, in an array that begins at a multiple
# of 1 GB; below, it is a physical address if it is page aligned, else a frame number.
_KERNEL: Final = 1 << 63
_STRUCT_PAGE_SHIFT: Final = 6

# Scopes that are a page, by the column with its address: the first, second, ... page of a call.
_PAGES: Final = {name.replace("_", " "): name for name in PAGES}
# Scopes with a single resource, or treated as such: calls have no operand that identifies it.
_ONE: Final = ("module", "package", "tdmr")
# Columns that identify the resource, by scope.  For a scope that is listed in neither (an IOMMU, a
# page in a register that is not captured) no capture identifies the resource of a call, so calls
# are never matched.
_KEY_COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "td": ("td_id",),
    "vcpu": ("vp_id",),
    "entry": ("td_id", "entry"),
    **dict.fromkeys(_PAGES, ("frame_kind", "range")),
    "stream": ("td_id",),
}


def required_columns(scope: str) -> tuple[str, ...]:
    """Return the columns of ``seamcalls`` that identify the resource of a call in a lock scope."""
    if scope in _PAGES:
        return (_PAGES[scope],)
    return {"entry": ("td_id", "gpa")}.get(scope, _KEY_COLUMNS.get(scope, ()))


def is_named(scope: str) -> bool:
    """Return whether a capture can identify the resource of a call in a scope."""
    return scope in _KEY_COLUMNS or scope in _ONE


def keys(
    calls: pl.DataFrame, scope: str, holder_scope: str, wanted: Index | Rows, held: Index | Rows
) -> tuple[Times, Times]:
    """Number the resources of the wanted calls, and match those of the held calls to them.

    Args:
        calls: Calls of one source (:func:`~.evidence.activity`).
        scope: Lock scope of the wanted calls.
        holder_scope: Lock scope of the held calls.
        wanted: Rows of ``calls`` to find partners for.
        held: Rows of ``calls`` to search for partners.

    Returns:
        A small number for each of ``wanted`` and ``held``; NO_KEY if the resource is unknown, or
        no wanted call works on it.
    """
    if not (is_named(scope) and is_named(holder_scope)):
        return np.full(len(wanted), NO_KEY, np.int64), np.full(len(held), NO_KEY, np.int64)
    if scope in _ONE:
        return np.zeros(len(wanted), np.int64), np.zeros(len(held), np.int64)
    wanted_keys = _key_columns(calls, scope, wanted)
    held_keys = _key_columns(calls, holder_scope, held)
    numbers = wanted_keys.drop_nulls().unique().with_row_index("key")
    return _numbered(wanted_keys, numbers), _numbered(held_keys, numbers)


def _key_columns(calls: pl.DataFrame, scope: str, at: Index | Rows) -> pl.DataFrame:
    needed = (*required_columns(scope), *(("level",) if scope == "entry" else ()))
    rows = calls.select(needed)[at]
    if scope == "entry":
        rows = rows.with_columns(entry=_entry())
    elif scope in _PAGES:
        page = pl.col(_PAGES[scope])
        rows = rows.with_columns(
            range=_frame(page) // (1 << _LEVEL_SHIFT), frame_kind=page >= _KERNEL
        )
    return rows.select(_KEY_COLUMNS[scope])


def _numbered(rows: pl.DataFrame, numbers: pl.DataFrame) -> Times:
    joined = rows.join(numbers, on=rows.columns, how="left", maintain_order="left")
    result: Times = joined["key"].cast(pl.Int64).fill_null(NO_KEY).to_numpy()
    return result


def _entry() -> pl.Expr:
    """Return one number for an SEPT entry of a TD: its first address plus its level."""
    return address_of_entry() + pl.col("level").fill_null(0).cast(pl.UInt64)


def _frame(page: pl.Expr) -> pl.Expr:
    shift = (
        pl.when(page >= _KERNEL)
        .then(1 << _STRUCT_PAGE_SHIFT)
        .when(page % (1 << _PAGE_SHIFT) == 0)
        .then(1 << _PAGE_SHIFT)
        .otherwise(1)
    )
    return page // shift.cast(pl.UInt64)


def is_same_resource(
    calls: pl.DataFrame, conflicts: LockConflicts, wanted: Index | Rows, held: Index | Rows
) -> NDArray[np.bool_]:
    """Return whether pairs of calls with equal keys need the same lock.

    The key of a page is its 2M range: a call on a 4K page holds the entry above it shared, so
    two calls conflict if they name the same page, or if one of them works on the whole range.
    Source: intel/tdx-module 1.5.01 src/common/memory_handlers/pamt_manager.c, pamt_walk.
    """
    if not {conflicts.scope, conflicts.holder_scope} <= set(_PAGES):
        return np.ones(len(wanted), np.bool_)
    sides = (
        (wanted, conflicts.scope, conflicts.wants_range),
        (held, conflicts.holder_scope, conflicts.holds_range),
    )
    frame, large = zip(*(_frame_and_size(calls, *side) for side in sides), strict=True)
    same: NDArray[np.bool_] = (frame[0] == frame[1]) | large[0] | large[1]
    return same


def _frame_and_size(
    calls: pl.DataFrame, at: Index | Rows, scope: str, locks_range: NDArray[np.bool_]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return the 4K frame number of each call, and whether it works on a larger page.

    The level of a call applies to its first page only.
    """
    column = _PAGES[scope]
    shown = calls.select(column, "level", "leaf")[at].select(
        "leaf",
        frame=_frame(pl.col(column)).fill_null(0),
        large=(pl.col("level") > 0).fill_null(False) & pl.lit(column == PAGES[0]),
    )
    is_range = locks_range[shown["leaf"].to_numpy()]
    return shown["frame"].to_numpy(), shown["large"].to_numpy() | is_range
