"""Numbers in hexadecimal."""

from __future__ import annotations

from typing import Final

import polars as pl

_BYTES: Final = range(256)
_DIGITS: Final = [f"{byte:02x}" for byte in _BYTES]


def hexadecimal(number: pl.Expr) -> pl.Expr:
    """Format unsigned numbers as the kernel's ``0x%llx`` does.

    Args:
        number: Any unsigned integer.

    Returns:
        String; null stays null.
    """
    word = number.cast(pl.UInt64)
    digits = pl.concat_str(_byte(word, place) for place in range(7, -1, -1))
    significant = digits.str.strip_chars_start("0")
    return pl.lit("0x") + pl.when(significant == "").then(pl.lit("0")).otherwise(significant)


def _byte(word: pl.Expr, place: int) -> pl.Expr:
    """Return the two digits of byte ``place`` of ``word``; 0 is the lowest."""
    byte = (word // pl.lit(1 << 8 * place, dtype=pl.UInt64)) & pl.lit(0xFF, dtype=pl.UInt64)
    return byte.replace_strict(_BYTES, _DIGITS, return_dtype=pl.String)
