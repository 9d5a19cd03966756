"""What must two calls have in common to want the same lock?"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.causes.overlaps import Index, Times

NONE: Final = -1
_PAGE_SHIFT: Final = 12
_LEVEL_SHIFT: Final = 9
# Kernel addresses begin here (Linux Documentation/arch/x86/x86_64/mm.rst): a page argument
# above is a struct page of 64 bytes, one per 4K frame, in an array that begins at a multiple
# of 1 GB; below, it is a physical address if it is page aligned, else a frame number.
_KERNEL: Final = 1 << 63
_STRUCT_PAGE_SHIFT: Final = 6

# Columns that name the thing, by scope; a module or package has one of each kind.
_NAMED_BY: Final[dict[str, tuple[str, ...]]] = {
    "td": ("td_id",),
    "vcpu": ("vp_id",),
    "entry": ("td_id", "entry"),
    "page": ("frame_kind", "range"),
    "stream": ("td_id",),
}


def needs(scope: str) -> tuple[str, ...]:
    """Columns of ``seamcalls`` without which it is not known what a call works on."""
    return {"entry": ("td_id", "gpa"), "page": ("page",)}.get(scope, _NAMED_BY.get(scope, ()))


def keys(done: pl.DataFrame, scope: str, asked: Index, held: Index) -> tuple[Times, Times]:
    """Number the things that some rows ask for, and say which of them other rows hold.

    Args:
        done: What the threads did.
        scope: What the calls must have in common.
        asked: Rows of ``done`` whose partners are wanted.
        held: Rows among which they are looked for.

    Returns:
        A small number for each of ``asked`` and ``held``; NONE where the thing is not known,
        or nobody asks for it.
    """
    columns = _NAMED_BY.get(scope, ())
    if not columns:
        return np.zeros(len(asked), np.int64), np.zeros(len(held), np.int64)
    needed = needs(scope)
    mine = _named(done.select(*needed, *_more(scope))[asked], columns)
    theirs = _named(done.select(*needed, *_more(scope))[held], columns)
    numbers = mine.drop_nulls().unique().with_row_index("key")
    return _numbered(mine, numbers), _numbered(theirs, numbers)


def _more(scope: str) -> tuple[str, ...]:
    return ("level",) if scope in ("entry", "page") else ()


def _named(rows: pl.DataFrame, columns: tuple[str, ...]) -> pl.DataFrame:
    if "entry" in columns:
        rows = rows.with_columns(entry=_entry())
    if "range" in columns:
        rows = rows.with_columns(range=_frame() // (1 << _LEVEL_SHIFT), frame_kind=_frame_kind())
    return rows.select(columns)


def _numbered(rows: pl.DataFrame, numbers: pl.DataFrame) -> Times:
    joined = rows.join(numbers, on=rows.columns, how="left", maintain_order="left")
    result: Times = joined["key"].cast(pl.Int64).fill_null(NONE).to_numpy()
    return result


def _entry() -> pl.Expr:
    """An SEPT entry of a TD as one number: its address at its level, and the level."""
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


def same_thing(done: pl.DataFrame, scope: str, asked: Index, held: Index) -> NDArray[np.bool_]:
    """Whether two calls with one key really want one lock.

    A key of a page is its 2M range: a call on a 4K page holds the entry above it shared, so
    two collide if they name the same page, or one of them works on the whole range.
    Source: intel/tdx-module 1.5.01 src/common/memory_handlers/pamt_manager.c, pamt_walk.
    """
    if scope != "page":
        return np.ones(len(asked), np.bool_)
    frame, large = zip(*(_pages(done[rows]) for rows in (asked, held)), strict=True)
    same: NDArray[np.bool_] = (frame[0] == frame[1]) | large[0] | large[1]
    return same


def _pages(rows: pl.DataFrame) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The 4K frame of each call, and whether it works on a larger page."""
    shown = rows.select(frame=_frame().fill_null(0), large=(pl.col("level") > 0).fill_null(False))
    return shown["frame"].to_numpy(), shown["large"].to_numpy()
