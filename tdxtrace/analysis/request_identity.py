"""Identity of a request: the operands that distinguish it, and how many of them were captured."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Flags, Index, Times
from tdxtrace.analysis.threads import ThreadCalls
from tdxtrace.tables.findings import IDENTITIES
from tdxtrace.tdx import leaves

# Columns that identify a request, by kind of the leaf table; a level also distinguishes
# requests for one page, but is implied where it was not captured.
_IDENTIFIED_BY: Final = {
    "gpa": ("td_id", "gpa"),
    "td": ("td_id",),
    "vcpu": ("vp_id",),
    "page": ("page",),
}
_COLUMNS: Final = ("td_id", "gpa", "level", "vp_id", "page")
_N_LEAVES: Final = 1 << 16
U64 = NDArray[np.uint64]


def request_keys(threads: ThreadCalls, *, of_process: bool) -> U64:
    """Number the requests of each thread: equal numbers for what no captured operand distinguishes.

    Two requests get one number by chance with a probability of 2**-64 a pair, so what is joined by
    it is held against :func:`same_request`.

    Args:
        threads: The calls.
        of_process: Whether to tell threads of one number in two processes apart, where the process
            of every call was recorded.
    """
    key = _mixed(threads.owner.view(np.uint64), np.uint64(0))
    key = _mixed(key, threads.leaf.astype(np.uint64))
    # A number is used again for a thread of another process (Linux kernel/pid.c, alloc_pid).
    process = threads.frame["tgid"]
    if of_process and not process.null_count():
        key = _mixed(key, process.cast(pl.UInt64).to_numpy())
    for number, column in enumerate(_COLUMNS, 1):
        value, known = _values(threads, column)
        if known.any():
            told = value.astype(np.uint64) + np.uint64(number)
            key = _mixed(key, np.where(known, told, np.uint64(0)))
    return key


# The finaliser of MurmurHash3 (A. Appleby, public domain): it spreads each bit over the word.
_ODD: Final = np.uint64(0xFF51_AFD7_ED55_8CCD)
_SHIFT: Final = np.uint64(33)


def _mixed(key: U64, word: U64 | np.uint64) -> U64:
    """Add a word to keys; unlike exclusive or, it tells (1, 2) from (2, 1)."""
    mixed = (key ^ word) * _ODD
    mixed ^= mixed >> _SHIFT
    mixed *= _ODD
    mixed ^= mixed >> _SHIFT
    return mixed


def named_requests(threads: ThreadCalls) -> Flags:
    """Whether each call names all operands that any call of its leaf names in this capture."""
    named = np.ones(len(threads.owner), np.bool_)
    for column in _COLUMNS:
        known = _values(threads, column)[1]
        if known.any():
            captured = np.zeros(_N_LEAVES, np.bool_)
            captured[threads.leaf[known]] = True
            named &= known | ~captured[threads.leaf]
    return named


def same_request(threads: ThreadCalls, previous: Index) -> Flags:
    """Whether no captured operand distinguishes each call from the ``previous`` one of its leaf."""
    same = np.ones(len(previous), np.bool_)
    for column in _COLUMNS:
        value, known = _values(threads, column)
        same &= ~(known & known[previous] & (value != value[previous]))
    return same


def _values(threads: ThreadCalls, column: str) -> tuple[Times, Flags]:
    """A column's values, and where it was captured and identifies requests of the leaf."""
    if column not in threads.named:
        known = threads.frame[column].is_not_null().to_numpy()
        value = threads.frame[column].fill_null(0).to_numpy()
        threads.named[column] = value, known & np.isin(threads.leaf, _leaves_identified_by(column))
    return threads.named[column]


def has_second_caller() -> pl.Expr:
    """Whether another thread can make the same request, and its operands were captured.

    That is a page and level of a TD, or a TD; one thread runs a vCPU, and a page that is reclaimed
    or written back has one owner.
    """
    of_page = pl.col("leaf").is_in(_leaves_of_kind("gpa")) & pl.col("gpa").is_not_null()
    return of_page | pl.col("leaf").is_in(_leaves_of_kind("td")) & pl.col("td_id").is_not_null()


def identifying(column: str) -> pl.Expr:
    """Return a column, null where it identifies no request of the leaf, as gpa for VP.ENTER."""
    return pl.when(pl.col("leaf").is_in(_leaves_identified_by(column))).then(column).alias(column)


def identity() -> pl.Expr:
    """Return what identified the attempts: the whole request, a part of it, or the thread alone."""
    named = pl.lit("request")
    for kind, columns in _IDENTIFIED_BY.items():
        whole = pl.all_horizontal(pl.col(c).is_not_null() for c in columns)
        part = _part_of_page() if kind == "gpa" else pl.lit("thread")
        named = (
            pl.when(pl.col("leaf").is_in(_leaves_of_kind(kind)) & ~whole)
            .then(part)
            .otherwise(named)
        )
    return named.cast(pl.Enum(IDENTITIES)).alias("identity")


def _part_of_page() -> pl.Expr:
    has_gpa, has_td = pl.col("gpa").is_not_null(), pl.col("td_id").is_not_null()
    return (
        pl.when(has_gpa)
        .then(pl.lit("gpa"))
        .when(has_td)
        .then(pl.lit("td"))
        .otherwise(pl.lit("thread"))
    )


def _leaves_identified_by(column: str) -> list[int]:
    """Leaves whose requests ``column`` identifies."""
    return [
        leaf
        for kind, columns in _IDENTIFIED_BY.items()
        if column in columns or (column == "level" and kind == "gpa")
        for leaf in _leaves_of_kind(kind)
    ]


@cache
def _leaves_of_kind(kind: str) -> tuple[int, ...]:
    table = leaves.leaf_table()
    return tuple(table.filter(pl.col("request") == kind)["leaf"])
