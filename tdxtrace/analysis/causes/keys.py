"""Keys of the TD, vCPU, SEPT entry or page that a call works on."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Index, Times

NO_KEY: Final = -1
_PAGE_SHIFT: Final = 12
_LEVEL_SHIFT: Final = 9
# Kernel addresses begin here (Linux Documentation/arch/x86/x86_64/mm.rst): a page argument
# above is a struct page of 64 bytes, one per 4K frame, in an array that begins at a multiple
# of 1 GB; below, it is a physical address if it is page aligned, else a frame number.
_KERNEL: Final = 1 << 63
_STRUCT_PAGE_SHIFT: Final = 6

# Columns that identify the resource, by scope; a module or package has one of each kind.
_KEY_COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "td": ("td_id",),
    "vcpu": ("vp_id",),
    "entry": ("td_id", "entry"),
    "page": ("frame_kind", "range"),
    "stream": ("td_id",),
}


def required_columns(scope: str) -> tuple[str, ...]:
    """Return the columns of ``seamcalls`` that identify what a call works on, by lock scope."""
    return {"entry": ("td_id", "gpa"), "page": ("page",)}.get(scope, _KEY_COLUMNS.get(scope, ()))


def keys(calls: pl.DataFrame, scope: str, wanted: Index, held: Index) -> tuple[Times, Times]:
    """Number the resources of the wanted calls, and match those of the held calls to them.

    Args:
        calls: Calls of one source (:func:`~.activity.activity`).
        scope: Lock scope: what two calls must have in common.
        wanted: Rows of ``calls`` whose partners are wanted.
        held: Rows among which partners are looked for.

    Returns:
        A small number for each of ``wanted`` and ``held``; NO_KEY where the resource is not
        known, or is none of the wanted ones.
    """
    columns = _KEY_COLUMNS.get(scope, ())
    if not columns:
        return np.zeros(len(wanted), np.int64), np.zeros(len(held), np.int64)
    needed = required_columns(scope)
    wanted_keys = _key_columns(calls.select(*needed, *_level_column(scope))[wanted], columns)
    held_keys = _key_columns(calls.select(*needed, *_level_column(scope))[held], columns)
    numbers = wanted_keys.drop_nulls().unique().with_row_index("key")
    return _numbered(wanted_keys, numbers), _numbered(held_keys, numbers)


def _level_column(scope: str) -> tuple[str, ...]:
    return ("level",) if scope in ("entry", "page") else ()


def _key_columns(rows: pl.DataFrame, columns: tuple[str, ...]) -> pl.DataFrame:
    if "entry" in columns:
        rows = rows.with_columns(entry=_entry())
    if "range" in columns:
        rows = rows.with_columns(range=_frame() // (1 << _LEVEL_SHIFT), frame_kind=_frame_kind())
    return rows.select(columns)


def _numbered(rows: pl.DataFrame, numbers: pl.DataFrame) -> Times:
    joined = rows.join(numbers, on=rows.columns, how="left", maintain_order="left")
    result: Times = joined["key"].cast(pl.Int64).fill_null(NO_KEY).to_numpy()
    return result


def _entry() -> pl.Expr:
    """SEPT entry of a TD as one number: its address at its level, plus the level."""
    level = pl.col("level").fill_null(0).cast(pl.UInt64)
    size = pl.lit(2, pl.UInt64).pow(level * _LEVEL_SHIFT + _PAGE_SHIFT).cast(pl.UInt64)
    return (pl.col("gpa") - pl.col("gpa") % size) + level


def _frame() -> pl.Expr:
    page = pl.col("page")
    shift = (
        pl.when(page >= _KERNEL)
        .then(1 << _STRUCT_PAGE_SHIFT)
        .when(page % (1 << _PAGE_SHIFT) == 0)
        .then(1 << _PAGE_SHIFT)
        .otherwise(1)
    )
    return page // shift.cast(pl.UInt64)


def _frame_kind() -> pl.Expr:
    return pl.col("page") >= _KERNEL


def is_same_resource(
    calls: pl.DataFrame, scope: str, wanted: Index, held: Index
) -> NDArray[np.bool_]:
    """Tell for pairs of calls with equal keys whether they want the same lock.

    The key of a page is its 2M range: a call on a 4K page holds the entry above it shared, so
    two calls collide if they name the same page, or one of them works on the whole range.
    Source: intel/tdx-module 1.5.01 src/common/memory_handlers/pamt_manager.c, pamt_walk.
    """
    if scope != "page":
        return np.ones(len(wanted), np.bool_)
    frame, large = zip(*(_frame_and_size(calls[rows]) for rows in (wanted, held)), strict=True)
    same: NDArray[np.bool_] = (frame[0] == frame[1]) | large[0] | large[1]
    return same


def _frame_and_size(rows: pl.DataFrame) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return the 4K frame number of each call, and whether it works on a larger page."""
    shown = rows.select(frame=_frame().fill_null(0), large=(pl.col("level") > 0).fill_null(False))
    return shown["frame"].to_numpy(), shown["large"].to_numpy()
