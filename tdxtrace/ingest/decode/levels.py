"""Which number the traced kernel gives a 4K page, and levels as the module counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from tdxtrace.tdx import leaves, wrappers

# A page of level n (4K = 0) is aligned to 12 + 9 n bits: Intel SDM, EPT paging.
_BITS_4K = 12
_BITS_PER_LEVEL = 9


@dataclass(slots=True)
class LevelBaseDetector:
    """What the levels of a capture tell, batch by batch.

    Up to 6.19 the wrappers take the module's level (4K = 0), in 7.x ``enum
    pg_level`` (4K = 1): the same probe prints other numbers.  A level 0 proves
    the first; a page not aligned to what its level would be under the first
    proves the second.
    """

    has_levels: bool = False
    has_zero: bool = False
    has_misaligned: bool = False

    def observe(self, seamcalls: pl.DataFrame) -> None:
        """Take further ``seamcalls`` rows, with the levels as captured."""
        if self.has_zero or seamcalls["level"].null_count() == seamcalls.height:
            return
        told = seamcalls.select("probe", "level", "leaf", "gpa")
        levels = told.filter(pl.col("probe") != "seamcall", pl.col("level").is_not_null())
        if levels.is_empty():
            return
        self.has_levels = True
        self.has_zero = bool((levels["level"] == 0).any())
        bits = _BITS_4K + _BITS_PER_LEVEL * pl.col("level").cast(pl.UInt64)
        misaligned = pl.col("gpa") % pl.lit(2, pl.UInt64).pow(bits) != 0
        paged = levels.filter(pl.col("leaf") != leaves.parse_leaf("TDH.MEM.SEPT.ADD")[0])
        self.has_misaligned |= bool(paged.select(misaligned.any()).item())

    def base(self, told: int | None, kernels: Sequence[str | None]) -> tuple[int, str]:
        """Return the base of ``level`` and what it was concluded from.

        Args:
            told: What the user said, if anything.
            kernels: Versions that the inputs name.
        """
        if told is not None:
            return told, "told by the user"
        if not self.has_levels:
            return 0, "no levels in the capture"
        if self.has_zero:
            return 0, "a level 0 occurs"
        if self.has_misaligned:
            return 1, "pages are not aligned to the size that a 0-based level would mean"
        named = {
            base for kernel in kernels if kernel and (base := wrappers.level_base(kernel)) in (0, 1)
        }
        if len(named) == 1:
            return named.pop(), f"kernel {next(k for k in kernels if k)}"
        return 0, "assumed; say --level-base 1 for kernels 7.x"


def normalised(seamcalls: pl.DataFrame, base: int) -> pl.DataFrame:
    """Return ``seamcalls`` with 4K as level 0; SEAMCALL registers always count so."""
    if base == 0:
        return seamcalls
    raw = pl.col("probe") == "seamcall"
    lowered = (
        pl.when(raw | (pl.col("level") < base))
        .then("level")
        .otherwise(pl.col("level") - pl.lit(base, pl.UInt8))
    )
    return seamcalls.with_columns(level=lowered)
