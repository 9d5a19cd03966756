"""Whether tracing was switched on while TDs ran: then the first requests are not whole."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tdx import leaves, word

_VP_ENTER: Final = leaves.parse_leaf("TDH.VP.ENTER")[0]
_SEPT_ADD: Final = leaves.parse_leaf("TDH.MEM.SEPT.ADD")[0]
_PAGE_AUG: Final = leaves.parse_leaf("TDH.MEM.PAGE.AUG")[0]
_PAGE_ADDS: Final = leaves.numbers_of(("TDH.MEM.PAGE.AUG", "TDH.MEM.PAGE.ADD"))
_FAULT_LEAVES: Final = leaves.numbers_of(("TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"))
_OF_MAPPED: Final = leaves.numbers_of(("TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE"))
# A Secure EPT page has 512 entries: an entry of the next level covers 9 bits more.
_SHIFT_2M: Final = 21
_TID: Final = pl.col("tid")
_PAGE: Final = ("td_id", "gpa")
_REFUSED: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_SEPT


def began(seamcalls: pl.DataFrame, vm_entries: pl.DataFrame) -> bool:
    """Tell whether a capture shows that TDs ran before it began.

    Any of these does: a vCPU that handles a fault before it was seen to enter, is
    refused by zero-step mitigation at its first entry, or comes out without having
    gone in; a call that returns without having started; a page that is blocked or
    removed but was not seen to be added, or added where no Secure EPT page was,
    though such calls were captured.  None of them proves the contrary.

    Args:
        seamcalls: The ``seamcalls`` rows of one source, without losses.
        vm_entries: Its ``vm_entries`` rows.
    """
    calls = _first_of_threads(seamcalls)
    vcpus = seamcalls.filter(pl.col("leaf") == _VP_ENTER)["tid"].drop_nulls().unique()
    has_entries = bool(seamcalls["start_ns"].is_not_null().any())
    entering = pl.col("leaf") == _VP_ENTER
    signs = (
        _TID.is_in(vcpus.implode()) & pl.col("leaf").is_in(_FAULT_LEAVES),
        entering & (pl.col("status") == _REFUSED),
        bare_return() & has_entries,
    )
    comes_out = _first_of_threads(vm_entries)["start_ns"].is_null().any()
    return bool(
        comes_out
        or calls.select(pl.any_horizontal(sign.any() for sign in signs)).item()
        or _unmapped_before(seamcalls)
        or _without_sept_page(seamcalls)
    )


def bare_return() -> pl.Expr:
    """A return without entry, which names nothing: not a one-line probe with arguments."""
    names = ("gpa", "td_id", "vp_id", "page")
    nothing = pl.all_horizontal(pl.col(name).is_null() for name in names)
    return pl.col("start_ns").is_null() & nothing


def _first_of_threads(rows: pl.DataFrame) -> pl.DataFrame:
    when = pl.coalesce("start_ns", "end_ns")
    first = rows.filter(_TID.is_not_null() & (when == when.min().over("tid")))
    return first.sort("seq").unique(subset="tid", keep="first")


def _unmapped_before(seamcalls: pl.DataFrame) -> bool:
    """Whether a page was blocked or removed that was not seen to be added."""
    used = _first_success(seamcalls, pl.col("leaf").is_in(_OF_MAPPED), _PAGE)
    added = _first_success(seamcalls, pl.col("leaf").is_in(_PAGE_ADDS), _PAGE)
    return _earlier(used, added, _PAGE)


def _without_sept_page(seamcalls: pl.DataFrame) -> bool:
    """Whether a 4K page was added in 2 MB for which no Secure EPT page was seen to be."""
    region = ("td_id", "region")
    numbered = seamcalls.with_columns(region=pl.col("gpa") // (1 << _SHIFT_2M))
    pages = (pl.col("leaf") == _PAGE_AUG) & (pl.col("level") == 0)
    tables = (pl.col("leaf") == _SEPT_ADD) & (pl.col("level") == 1)
    return _earlier(
        _first_success(numbered, pages, region), _first_success(numbered, tables, region), region
    )


def _first_success(rows: pl.DataFrame, wanted: pl.Expr, key: tuple[str, str]) -> pl.DataFrame:
    done = rows.filter(wanted, pl.col("status") < word.ERROR_BIT, pl.col(key[1]).is_not_null())
    return done.group_by(key).agg(when=pl.col("end_ns").min())


def _earlier(used: pl.DataFrame, made: pl.DataFrame, key: tuple[str, str]) -> bool:
    """Whether something was used before it was made, though making was captured."""
    if used.is_empty() or made.is_empty():
        return False
    both = used.join(made, on=key, how="left", nulls_equal=True)
    before = pl.col("when_right").is_null() | (pl.col("when") < pl.col("when_right"))
    return bool(both.select(before.any()).item())
