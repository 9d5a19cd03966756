"""Locks that a busy status can refer to, and the leaves that conflict on them."""

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
# Two calls on a lock of one scope conflict if they name the same resource.  A capture does not show
# the second TD of a service TD's calls, so that scope is treated as the TD of the call.
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
    """Leaves that conflict on one lock."""

    lock: str
    scope: str
    """Resource that the attempting call names: td, vcpu, entry, page (its second page: page 2),
    module, package, …"""
    holder_scope: str
    """Resource that the holding call names: the same kind, but perhaps another of its pages."""
    masks: Masks
    """[attempting leaf, holding leaf]: generations in which they conflict."""
    wants_range: NDArray[np.bool_]
    """[attempting leaf]: whether it locks the 2M range that contains its page."""
    holds_range: NDArray[np.bool_]
    """[holding leaf]: whether it locks the 2M range that contains its page."""

    def holders(self, attempting: NDArray[np.intp], mask: int) -> NDArray[np.bool_]:
        """Return by leaf whether it conflicts with any of ``attempting`` in ``mask``."""
        rows = self.masks[np.unique(attempting)] & np.uint8(mask)
        return np.asarray(rows.any(axis=0), np.bool_)


@cache
def lock_type() -> pl.Enum:
    """Return the type of a column with names of module locks."""
    return pl.Enum(lock_table()["lock"].unique().sort())


@cache
def locks_of_busy() -> pl.DataFrame:
    """Return the locks that OPERAND_BUSY can refer to, one row per leaf, operand id and lock.

    Returns:
        Columns leaf (UInt16), operand_id (UInt32), lock, scope (as in :class:`LockConflicts`),
        mask (UInt8: generations whose leaf takes the lock and answers with this id), sequence
        (UInt8: position in the locking order, in the newest of them).
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
        Columns leaf (UInt16), operand_id (UInt32) and lock: OPERAND_BUSY with that operand id
        implies that the call held the lock.
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
    """Return the leaves that conflict on a lock, in every generation.

    Conditions that a capture rarely shows (the version of a leaf, an armed entry) are assumed to
    hold; the code that examines the calls filters out the cases in which they do not.

    Args:
        lock: Name of the lock.
        scope: Resource that the attempting call names, as in :func:`locks_of_busy`.

    Returns:
        One element, or one per page of the holding calls if they hold the lock on several.
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
    """Return the scope of a lock, with equivalent scopes merged.

    A second or later page has its number appended; a page in a register that is never captured
    (the L2 pages of SEPT.ADD and DEMOTE, the PAMT pages of DEMOTE) is a separate scope.
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
    """Return by leaf whether its lock of this scope covers a whole 2M range."""
    rows = _host_locks().filter(pl.col("lock") == lock, pl.col("scope") == scope, "is_range")
    found = np.zeros(N_LEAVES, np.bool_)
    found[rows["leaf"].to_numpy()] = True
    return found


def mode_of(
    generation: pl.Expr, leaf: pl.Expr, lock: pl.Expr, operand_id: pl.Expr | None = None
) -> pl.Expr:
    """Return the mode in which a leaf takes a lock.

    Args:
        generation: Its bit in a mask.
        leaf: Number of the leaf.
        lock: Name of the lock (:func:`lock_type`).
        operand_id: Id of the operand that the lock protects; None for any operand.

    Returns:
        SH or EX; EX if it takes the lock in both modes; null if it does not take it.
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
    """Pack numbers of 8, 16, 8 and 32 bits into one UInt64."""
    packed = pl.lit(0, pl.UInt64)
    for number, width in zip(numbers, (8, 16, 8, 32), strict=False):
        column = pl.col(number) if isinstance(number, str) else number
        packed = packed * (1 << width) + column.cast(pl.UInt64)
    return packed


@cache
def is_released_before_guest(lock: str) -> bool:
    """Return whether TDH.VP.ENTER releases the lock before the guest runs."""
    rows = lock_table().filter(pl.col("lock") == lock, pl.col("leaf") == VP_ENTER)
    return bool(rows["held"].is_in(_RELEASED_BEFORE_GUEST).all()) and rows.height > 0


def _host_locks() -> pl.DataFrame:
    """Return the rows of the lock table that are SEAMCALLs, with generations as bit masks."""
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
