"""Lock generations of the TDX module that can have produced a trace."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.causes.candidates import BusyAttempts, may_have_held_lock
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, GENERATIONS, TREE, mask_of
from tdxtrace.analysis.loops.ranking import BOUNDS_UNKNOWN
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.errors import QueryError
from tdxtrace.tables.events import KERNEL_MESSAGES
from tdxtrace.tdx.leaves import numbers_of
from tdxtrace.tdx.releases import generation_of, same_release

# Leaves that KVM calls and that take the tree exclusively in every generation: a capture without
# calls of any of them may lack probes on them.
_EXCLUSIVE_LEAVES: Final = numbers_of(
    ["TDH.MEM.RANGE.BLOCK", "TDH.MEM.RANGE.UNBLOCK", "TDH.MEM.SEPT.REMOVE"]
)
# Minimum number and share of busy answers without a possible holder to rule out a generation:
# the holder of a single one may have been lost without a loss record.
_MIN_UNEXPLAINED: Final = 3
_MIN_UNEXPLAINED_SHARE: Final = 0.02


def chosen_generations(module: str | None, generation: str | None) -> int:
    """Return the generations that the user allows, as a mask; all if neither is given.

    Args:
        module: Release of the module, such as 1.5.16.
        generation: A, B or C.

    Raises:
        QueryError: If the generation or release is unknown, or the two disagree.
    """
    mask = ALL_GENERATIONS
    if generation is not None:
        if generation.upper() not in GENERATIONS:
            raise QueryError(
                f"no lock generation {generation!r}; there are A (1.0), B (1.5.01 to "
                "1.5.16) and C (1.5.20 and later)"
            )
        mask = mask_of(generation.upper())
    if module is not None:
        found = generation_of(module)
        if found is None:
            raise QueryError(
                f"the locks of module {module!r} are not known; known are 1.0.x, 1.5.01 to 1.5.34 "
                "and 2.0.02 to 2.0.18; choose --generation A, B or C instead"
            )
        if not mask & mask_of(found):
            raise QueryError(f"module {module!r} is of generation {found}, not {generation!r}")
        mask = mask_of(found)
    return mask


def module_release(messages: pl.DataFrame) -> tuple[str, str | None] | None:
    """Return the release of the TDX module that the kernel's log names, and its lock generation.

    Args:
        messages: The ``kernel_messages`` table.

    Returns:
        The release and its generation (A, B or C; None if the release is unknown or
        incomplete); None if no message names a release, or two messages name different ones.

    Example:
        >>> from tdxtrace.tables.events import KERNEL_MESSAGES
        >>> module_release(KERNEL_MESSAGES.empty()) is None
        True
    """
    named = KERNEL_MESSAGES.conform(messages)["module_version"].drop_nulls().unique()
    release = same_release(map(str, named))
    return None if release is None else (release, generation_of(release))


def possible_generations(
    busy: BusyAttempts, possible_holders: pl.DataFrame, is_lossy: pl.Series
) -> int:
    """Rule out the generations under which the busy answers of a source cannot be explained.

    A generation is ruled out if a leaf returned an operand id that it does not have in that
    generation, or if several busy answers on the tree have no possible holder in it: only host
    calls take the tree, so a complete capture contains the holder.  An AUG that can only be busy
    because of an armed entry rules out C; one that can only be busy because of other AUGs leaves A.

    Args:
        busy: The busy attempts, under the generations that the user allows.
        possible_holders: Their candidate holders.
        is_lossy: For each row of ``calls``, whether events near it may be lost.

    Returns:
        The mask of the remaining generations; all that the user allows if none would remain.
    """
    left = busy.mask
    for mask in np.unique(busy.masks):
        left &= int(mask)
    leaves = set(busy.calls["leaf"].unique())
    sees_all = VP_ENTER in leaves and bool(leaves & set(_EXCLUSIVE_LEAVES))
    if left and sees_all:
        left &= ~_generations_without_holder(busy, possible_holders, is_lossy)
    return left or busy.mask


def misses_holders(busy: BusyAttempts, possible_holders: pl.DataFrame, is_lossy: pl.Series) -> bool:
    """Return whether too many attempts on the tree have no holder in any remaining generation.

    Args:
        busy: The busy attempts.
        possible_holders: Their candidate holders.
        is_lossy: For each row of ``calls``, whether events near it may be lost.
    """
    masks = _explaining_generations(busy, possible_holders, is_lossy)
    return _is_too_many(int((masks == 0).sum()), len(masks))


def _generations_without_holder(
    busy: BusyAttempts, possible_holders: pl.DataFrame, is_lossy: pl.Series
) -> int:
    """Return the generations in which too many attempts on the tree have no holder."""
    masks = _explaining_generations(busy, possible_holders, is_lossy)
    nonzero = masks.filter(masks > 0)
    ruled_out = 0
    for name in GENERATIONS:
        if _is_too_many(int(((nonzero & mask_of(name)) == 0).sum()), len(nonzero)):
            ruled_out |= mask_of(name)
    return ruled_out


def _is_too_many(n: int, of: int) -> bool:
    return n >= _MIN_UNEXPLAINED and n > _MIN_UNEXPLAINED_SHARE * of


def _explaining_generations(
    busy: BusyAttempts, possible_holders: pl.DataFrame, is_lossy: pl.Series
) -> pl.Series:
    """Return the generations in which each fully observed attempt on the tree has a holder."""
    rows = busy.attempts.filter(pl.col("lock") == TREE)["row"]
    flags = pl.DataFrame(
        {"row": rows, "lossy": is_lossy[rows], "sure": busy.calls["certain"][rows]}
    )
    attempts = flags.filter(~pl.col("lossy") & pl.col("sure")).select("row")
    # A call that overlaps only while it enters or leaves the module held no lock then.
    within_clock = pl.col("core_ns") >= -2 * busy.slack_ns
    plausible = within_clock | may_have_held_lock() | (pl.col("grade") == BOUNDS_UNKNOWN)
    found = possible_holders.filter((pl.col("lock") == TREE) & plausible).select("attempt", "mask")
    attempt, mask = (column.to_numpy() for column in found)
    masks = np.zeros(busy.calls.height, np.uint8)
    for bit in map(mask_of, GENERATIONS):
        masks[attempt[(mask & bit) > 0]] |= np.uint8(bit)
    return pl.Series(masks[attempts["row"].to_numpy()])
