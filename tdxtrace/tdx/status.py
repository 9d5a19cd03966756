"""Status words of SEAMCALLs: names, classes and how a host should react."""

from __future__ import annotations

from functools import cache
from typing import Final

import polars as pl

from tdxtrace.tdx import word
from tdxtrace.tdx.exit_reasons import exit_reason_name
from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.operands import operand_name, resource

# How a host should react to a status: the values of column host_retry.
HOST_RETRY: Final = {
    "success": "nothing to retry: the work is done",
    "same": "yes: issue the same call again, unchanged",
    "kick": "yes: kick the running vCPUs, then issue the same call again",
    "resume": "yes: issue it again, it continues where it stopped",
    "restart": "yes: issue the same call again, it starts from the beginning",
    "act_first": "not by itself: another call or change has to come first",
    "exit": "it is an exit: serve it, then enter again",
    "dead": "no: the vCPU or the TD is lost",
    "no": "no: the call or the current state is wrong",
    "guest": "not for the host: only a guest sees this",
    "unknown": "not known: the module's source was not read for this code",
}

# A status joins the attempts of a retry chain if the same SEAMCALL, issued again, can succeed
# without another change of state first.  This follows the module's rules, not KVM's behaviour:
# TDX_KEY_GENERATION_FAILED (PCONFIG found no entropy) is included, although KVM gives up on it;
# TDX_TLB_TRACKING_NOT_DONE is not, because it needs a TRACK first.
RETRIED: Final = ("same", "kick", "resume", "restart")


@cache
def status_table() -> pl.DataFrame:
    """Return the status codes, one row per code; some codes of the kernel are whole words.

    Returns:
        Columns status (UInt64), name, class (labels defined by tdxtrace), low32 (contents of bits
        31:0), host_retry (a key of HOST_RETRY), meaning (null where only the name is known), since
        (first release), source.
    """
    return facts("status_codes", status=pl.UInt64)


def status_name(status: pl.Expr) -> pl.Expr:
    """Name status words, such as TDX_OPERAND_BUSY, ignoring the low half and bits 61 and 60.

    Args:
        status: Status words, UInt64.

    Returns:
        String; null for null and for an unknown code.
    """
    return _look_up(status, "name")


def status_class(status: pl.Expr) -> pl.Expr:
    """Return the class (bits 47:40) of status words: busy, SEPT, key, software.

    Args:
        status: Status words, UInt64.

    Returns:
        String; null for null and for an unknown code.
    """
    return _look_up(status, "class")


def host_retry(status: pl.Expr) -> pl.Expr:
    """Return how a host should react to status words, as one word.

    Args:
        status: Status words, UInt64.

    Returns:
        String, a key of HOST_RETRY; null for null and for an unknown code.
    """
    return _look_up(status, "host_retry")


def is_retryable(status: pl.Expr) -> pl.Expr:
    """Return whether a status joins two attempts at one request: the rule of ``RETRIED``.

    Args:
        status: Status words, UInt64.

    Returns:
        Boolean, false for an unknown code; null stays null.
    """
    return word.status_code(status).is_in(_retried_codes().implode())


def describe_status(status: pl.Expr, leaf: pl.Expr) -> pl.Expr:
    """Describe status words in a few words, for printed tables.

    Such as "SUCCESS", "exit EPT_VIOLATION" (TDH.VP.ENTER), "OPERAND_BUSY SEPT tree",
    "RND_NO_ENTROPY".  A word that ends a request with an error is printed in full:
    "0xc0000b0800000001 TLB_TRACKING_NOT_DONE RCX".  Takes some microseconds per row: use it for
    rows that are shown, not for a whole trace.

    Args:
        status: Status words, UInt64.
        leaf: Leaf numbers, UInt16; null if not known.

    Returns:
        String; null where the status is null.
    """
    name = status_name(status).str.strip_prefix("TDX_")
    entered = word.status_code(status) == pl.lit(word.TDX_SUCCESS, dtype=pl.UInt64)
    at_exit = (_look_up(status, "low32") == "exit_reason") & (~entered | (leaf == 0))
    reason = pl.lit("exit ") + exit_reason_name(word.low32(status))
    return (
        pl.when(status.is_null())
        .then(None)
        .when(word.is_busy(status))
        .then(_words(name, pl.coalesce(resource(status, leaf), _detail(status))))
        .when(entered & (leaf == 0))
        .then(reason)
        .when(at_exit)
        .then(_words(name, reason))
        .when(word.is_success(status) | is_retryable(status))
        .then(_words(pl.coalesce(name, word.hexadecimal(status)), _detail(status)))
        .otherwise(_words(word.hexadecimal(status), name, _detail(status)))
    )


def _detail(status: pl.Expr) -> pl.Expr:
    """Return the low half as text where it is not 0: operand, or hexadecimal."""
    holds_operand = _look_up(status, "low32") == "operand_id"
    operand = pl.when(holds_operand).then(operand_name(word.low32(status)))
    is_known = status_name(status).is_not_null()
    shown = (word.low32(status) != 0) & is_known & word.is_success(status)
    return pl.when(word.low32(status) != 0).then(
        pl.coalesce(
            operand, pl.when(shown | holds_operand).then(word.hexadecimal(word.low32(status)))
        )
    )


def _words(*parts: pl.Expr) -> pl.Expr:
    """Join the parts that are not null with blanks."""
    return pl.concat_str(*parts, separator=" ", ignore_nulls=True)


def _look_up(status: pl.Expr, column: str) -> pl.Expr:
    """Look up a column of the status table, by whole word first and then by code."""
    is_whole = word.low32(pl.col("status")) != 0
    words = status_table().filter(is_whole)
    codes = status_table().filter(~is_whole)
    keys = codes.select(word.status_code(pl.col("status"))).to_series()
    by_code = word.status_code(status).replace_strict(
        keys, codes[column], default=None, return_dtype=pl.String
    )
    by_word = status.replace_strict(
        words["status"], words[column], default=None, return_dtype=pl.String
    )
    return pl.coalesce(by_word, by_code)


@cache
def _retried_codes() -> pl.Series:
    """Return the codes whose host_retry is in RETRIED."""
    retried = status_table().filter(pl.col("host_retry").is_in(RETRIED))
    return retried.select(word.status_code(pl.col("status"))).to_series()
