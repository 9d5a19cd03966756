"""Locks that a busy status can mean, and the leaves that exclude each other on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tdx.locks import conflict_table, lock_table

GENERATIONS: Final = ("A", "B", "C")
ALL_GENERATIONS: Final = 0b111
"""All generations, as a mask: bit 0 is A."""
TREE: Final = "SEPT_TREE"
ENTRY: Final = "SEPT_ENTRY"
# Leaf numbers fit 8 bits: the highest known is 254.
N_LEAVES: Final = 256
_RANGE: Final = "2M range"
# Of two locks with one scope, calls collide if they name the same thing; the other TD of a
# service TD's calls is no argument that a capture shows, so it counts as the TD.
_SCOPES: Final = {"service td": "td", "target td": "td", _RANGE: "page"}
_RELEASED_BEFORE_GUEST: Final = ("entry", "instant")

Masks = NDArray[np.uint8]


def mask_of(generation: str) -> int:
    """Return the bit of one generation."""
    return 1 << GENERATIONS.index(generation)


def names_of(mask: int) -> str:
    """Return the letters of a mask: 6 is BC."""
    return "".join(name for name in GENERATIONS if mask & mask_of(name))


@dataclass(frozen=True, slots=True)
class LockConflicts:
    """Leaves that exclude each other on one lock."""

    lock: str
    scope: str
    """What the attempting call names: td, vcpu, entry, page (the second of a call: page 2),
    module, package, …"""
    holder_scope: str
    """What the holding call names: the same, but perhaps another of its pages."""
    masks: Masks
    """[attempting leaf, holding leaf]: generations in which they exclude each other."""
    wants_range: NDArray[np.bool_]
    """[attempting leaf]: whether it locks the 2M range that its page is in."""
    holds_range: NDArray[np.bool_]
    """[holding leaf]: whether it locks the 2M range that its page is in."""

    def holders(self, attempting: NDArray[np.intp], mask: int) -> NDArray[np.bool_]:
        """Return the leaves that can keep any of ``attempting`` out, in generations of ``mask``."""
        rows = self.masks[np.unique(attempting)] & np.uint8(mask)
        return np.asarray(rows.any(axis=0), np.bool_)


@cache
def lock_type() -> pl.Enum:
    """Return the type of a column that names a lock of the module."""
    return pl.Enum(lock_table()["lock"].unique().sort())


@cache
def locks_of_busy() -> pl.DataFrame:
    """Return the locks that OPERAND_BUSY can mean, one row per leaf, operand id and lock.

    Returns:
        Columns leaf (UInt16), operand_id (UInt32), lock, scope (as in :class:`LockConflicts`),
        mask (UInt8: generations whose leaf takes the lock and answers with this id), sequence
        (UInt8: when it is tried, in the newest of them).
    """
    return (
        _host_locks()
        .filter(pl.col("operand_id").is_not_null())
        .sort("generation")
        .group_by("leaf", "operand_id", "lock", "scope", maintain_order=True)
        .agg(pl.col("mask").unique().sum().cast(pl.UInt8), pl.col("sequence").last())
        .with_columns(pl.col("scope").cast(pl.Categorical))
    )


@cache
def held_before() -> pl.DataFrame:
    """Return the locks that a call held briefly before it was answered busy on a later one.

    Returns:
        Columns leaf (UInt16), operand_id (UInt32) and lock: that answer implies the lock was held.
    """
    taken = _host_locks().select("generation", "leaf", "lock", "sequence")
    failed = (
        _host_locks()
        .filter(pl.col("operand_id").is_not_null())
        .group_by("generation", "leaf", "operand_id")
        .agg(pl.col("sequence").min().alias("failed_at"))
    )
    both = failed.join(taken, on=["generation", "leaf"])
    return (
        both.filter(pl.col("sequence") < pl.col("failed_at"))
        .select("leaf", "operand_id", "lock")
        .unique()
    )


@cache
def lock_conflicts(lock: str, scope: str) -> tuple[LockConflicts, ...]:
    """Return the leaves that exclude each other on a lock, in every generation.

    Conditions that a capture rarely shows (the version of a leaf, an armed entry) count as
    fulfilled; what they exclude is filtered where the calls are examined.

    Args:
        lock: Name of the lock.
        scope: What the attempting call names, as in :func:`locks_of_busy`.

    Returns:
        At least one; one for each page of holding calls, if they hold the lock on several.
    """
    rows = conflict_table().filter(
        pl.col("lock") == lock, pl.col("leaf").is_not_null(), pl.col("holder_leaf").is_not_null()
    )
    named = rows.with_columns(_scope(), _scope("holder_"))
    of_scope = named.filter(pl.col("scope") == scope)
    found = []
    for holder_scope in of_scope["holder_scope"].unique(maintain_order=True).to_list() or [scope]:
        masks = np.zeros((N_LEAVES, N_LEAVES), np.uint8)
        part = of_scope.filter(pl.col("holder_scope") == holder_scope)
        columns = part.select("generation", "leaf", "holder_leaf")
        for generation, leaf, holder in columns.iter_rows():
            masks[leaf, holder] |= mask_of(generation)
        ranges = (_leaves_with_range(lock, name) for name in (scope, holder_scope))
        found.append(LockConflicts(lock, scope, holder_scope, masks, *ranges))
    return tuple(found)


def _scope(side: str = "") -> pl.Expr:
    """Return the scope of a lock with its kinds merged.

    A further page has its number behind it; a page in a register that no capture has (the L2 pages
    of SEPT.ADD and DEMOTE, the PAMT pages of DEMOTE) is a scope of its own.
    """
    kind, page = pl.col(f"{side}scope").replace(_SCOPES), pl.col(f"{side}page")
    return (
        pl.when((kind == "page") & page.is_null())
        .then(pl.lit("page that is not named"))
        .when(page > 1)
        .then(pl.format("{} {}", kind, page))
        .otherwise(kind)
        .alias(f"{side}scope")
    )


def _leaves_with_range(lock: str, scope: str) -> NDArray[np.bool_]:
    """Return by leaf whether its lock of this scope is on a whole 2M range."""
    rows = _host_locks().filter(pl.col("lock") == lock, pl.col("scope") == scope, "is_range")
    found = np.zeros(N_LEAVES, np.bool_)
    found[rows["leaf"].to_numpy()] = True
    return found


def mode_of(
    generation: pl.Expr, leaf: pl.Expr, lock: pl.Expr, operand_id: pl.Expr | None = None
) -> pl.Expr:
    """Return in which mode a leaf takes a lock.

    Args:
        generation: Its bit in a mask.
        leaf: Number of the leaf.
        lock: Name of the lock (:func:`lock_type`).
        operand_id: Of the operand that the lock is about; by default of any.

    Returns:
        SH or EX; EX if it takes the lock in several; null if it does not take it.
    """
    by = ["mask", "leaf", "lock", *(["operand_id"] if operand_id is not None else [])]
    rows = _host_locks().drop_nulls(by).group_by(by).agg(pl.col("mode").min())
    operands = () if operand_id is None else (operand_id,)
    columns = () if operand_id is None else ("operand_id",)
    known = rows.select(_packed("mask", "leaf", pl.col("lock").to_physical(), *columns))
    asked = _packed(generation, leaf, lock.to_physical(), *operands)
    return asked.replace_strict(
        known.to_series(), rows["mode"], default=None, return_dtype=pl.String
    )


def _packed(*numbers: pl.Expr | str) -> pl.Expr:
    """Small numbers as one; the last may have 32 bits."""
    packed = pl.lit(0, pl.UInt64)
    for number, width in zip(numbers, (8, 16, 8, 32), strict=False):
        column = pl.col(number) if isinstance(number, str) else number
        packed = packed * (1 << width) + column.cast(pl.UInt64)
    return packed


@cache
def is_released_before_guest(lock: str) -> bool:
    """Whether TDH.VP.ENTER releases the lock before the guest runs."""
    rows = lock_table().filter(pl.col("lock") == lock, pl.col("leaf") == VP_ENTER)
    return bool(rows["held"].is_in(_RELEASED_BEFORE_GUEST).all()) and rows.height > 0


def _host_locks() -> pl.DataFrame:
    """Rows of the lock table that are SEAMCALLs, generations as bits."""
    bits = {name: mask_of(name) for name in GENERATIONS}
    return (
        lock_table()
        .filter(pl.col("leaf").is_not_null())
        .with_columns(
            _scope(),
            pl.col("lock").cast(lock_type()),
            mask=pl.col("generation").replace_strict(bits, return_dtype=pl.UInt8),
            is_range=pl.col("scope") == _RANGE,
        )
    )
