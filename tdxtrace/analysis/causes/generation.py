"""Which lock generations of the TDX module can have made a trace?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.candidates import UNCERTAIN, Question
from tdxtrace.analysis.causes.conflicts import (
    EVERY,
    GENERATIONS,
    TREE,
    VP_ENTER,
    mask_of,
)
from tdxtrace.errors import QueryError
from tdxtrace.tdx.leaves import numbers_of
from tdxtrace.tdx.locks import generation_of

# Leaves that want the tree alone in every generation, and that KVM calls: where a capture
# shows none of them, nothing says that they were probed.
_ALONE: Final = numbers_of(["TDH.MEM.RANGE.BLOCK", "TDH.MEM.RANGE.UNBLOCK", "TDH.MEM.SEPT.REMOVE"])
# Busy answers that a generation leaves without any possible holder before it is ruled out,
# and their share: one alone may be a call that the capture missed without saying so.
_ENOUGH: Final = 3
_SHARE: Final = 0.02


def chosen_generations(module: str | None, generation: str | None) -> int:
    """The generations that a user leaves, as a mask; all if neither is said.

    Args:
        module: Release of the module, such as 1.5.16.
        generation: A, B or C.

    Raises:
        QueryError: If there is no such generation, the release is not known, or they disagree.
    """
    mask = EVERY
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
                "and 2.0.08 to 2.0.18; choose --generation A, B or C instead"
            )
        if not mask & mask_of(found):
            raise QueryError(f"module {module!r} is of generation {found}, not {generation!r}")
        mask = mask_of(found)
    return mask


def possible(question: Question, fitting: pl.DataFrame, is_lossy: pl.Series) -> int:
    """Rule out the generations under which busy answers of a source cannot be explained.

    An operand id that a leaf does not return in a generation rules it out.  So does a
    busy tree without any possible holder, several times over: only calls of the host take
    the tree, so a capture that shows all of them shows the holder.  An AUG that is busy
    against an armed entry rules out C, one that is busy against nothing but other AUGs
    leaves only A.

    Args:
        question: The busy attempts, under the generations that the user leaves.
        fitting: Their candidate holders.
        is_lossy: For each row of ``done``, whether events near it may be lost.

    Returns:
        The mask of what is left; what the user left, if everything would be ruled out.
    """
    left = question.mask
    for mask in question.attempts.group_by("row").agg(pl.col("mask").bitwise_or())["mask"].unique():
        left &= int(mask)
    leaves = set(question.done["leaf"].unique())
    sees_all = VP_ENTER in leaves and bool(leaves & set(_ALONE))
    if left and sees_all:
        left &= ~_unexplained(question, fitting, is_lossy)
    return left or question.mask


def misses_holders(question: Question, fitting: pl.DataFrame, is_lossy: pl.Series) -> bool:
    """Whether too many attempts at the tree met nobody under any generation that is left.

    Args:
        question: The busy attempts.
        fitting: Their candidate holders.
        is_lossy: For each row of ``done``, whether events near it may be lost.
    """
    masks = _explaining(question, fitting, is_lossy)
    return _too_many(int((masks == 0).sum()), len(masks))


def _unexplained(question: Question, fitting: pl.DataFrame, is_lossy: pl.Series) -> int:
    """Generations that leave too many attempts at the tree without a holder."""
    masks = _explaining(question, fitting, is_lossy)
    some = masks.filter(masks > 0)
    ruled_out = 0
    for name in GENERATIONS:
        if _too_many(int(((some & mask_of(name)) == 0).sum()), len(some)):
            ruled_out |= mask_of(name)
    return ruled_out


def _too_many(n: int, of: int) -> bool:
    return n >= _ENOUGH and n > _SHARE * of


def _explaining(question: Question, fitting: pl.DataFrame, is_lossy: pl.Series) -> pl.Series:
    """For each attempt at the tree in full sight: generations in which somebody can have it."""
    rows = question.attempts.filter(pl.col("lock") == TREE)["row"]
    flags = pl.DataFrame(
        {"row": rows, "lossy": is_lossy[rows], "sure": question.done["certain"][rows]}
    )
    asked = flags.filter(~pl.col("lossy") & pl.col("sure")).select("row")
    # Between their edges, or of unknown bounds: a call that merely touches held nothing.
    plausible = (pl.col("core_ns") >= -2 * question.slack_ns) | (pl.col("grade") == UNCERTAIN)
    found = (
        fitting.filter((pl.col("lock") == TREE) & plausible)
        .group_by("attempt")
        .agg(pl.col("mask").bitwise_or())
    )
    joined = asked.join(found, left_on="row", right_on="attempt", how="left")
    return joined["mask"].fill_null(0)
