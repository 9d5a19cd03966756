"""Which entries of a vCPU passed an armed zero-step gate, and held the tree lock for it?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.conflicts import VP_ENTER
from tdxtrace.analysis.zero_steps import standing
from tdxtrace.tdx import word
from tdxtrace.tdx.exit_reasons import exit_reason_number
from tdxtrace.tdx.stepping import STEPPING_EPF_THRESHOLD

# The seventh counted fault at one RIP logs a page, and the next entry is gated: TDX module
# src/td_transitions/td_exit_stepping.c, 1.0.00 to 1.5.25.
ARMED_AFTER: Final = STEPPING_EPF_THRESHOLD + 1
_BUSY_SEPT: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_SEPT

CERTAIN, POSSIBLE, UNKNOWN = 0, 1, 2


def armed_entries(done: pl.DataFrame) -> pl.DataFrame:
    """Find the entries that may have held the SEPT tree on their way in.

    ``CERTAIN``: the entry before it was answered busy on the tree, which only an armed gate
    tries.  ``POSSIBLE``: at least ARMED_AFTER EPT violations came before it with no exit
    that an executed instruction makes, and an entry was so answered before there was one;
    since when RIP stood is not shown.  ``UNKNOWN``: as many violations without such an
    answer, or the vCPU was not yet seen to execute anything.  An entry that was itself
    refused holds nothing.

    Args:
        done: What the threads of one source did (:func:`~.activity.activity`).

    Returns:
        Columns row (place in ``done``) and armed (UInt8), for those entries only.
    """
    violation = exit_reason_number("EPT_VIOLATION")
    entries = (
        done.lazy()
        .select("leaf", "tid", "status", "begins", "seq")
        .with_row_index("row")
        .filter(pl.col("leaf") == VP_ENTER)
        .sort("tid", "begins", "seq")
    )
    exited = pl.col("status") < word.ERROR_BIT
    reason = pl.when(exited).then(pl.col("status").cast(pl.UInt32, strict=False))
    moved = reason.is_not_null() & ~reason.is_in(standing())
    steps = entries.with_columns(
        is_fault=(reason == violation).fill_null(False).cast(pl.UInt32),
        moved=moved.shift().over("tid").fill_null(False),
        was_refused=(pl.col("status") == _BUSY_SEPT).shift().over("tid").fill_null(False),
        entered=exited.fill_null(False),
    ).with_columns(run=pl.col("moved").cast(pl.UInt32).cum_sum().over("tid"))
    gated = (pl.col("status") == _BUSY_SEPT).fill_null(False).any().over("tid", "run")
    n_before = pl.col("is_fault").cum_sum().over("tid", "run") - pl.col("is_fault")
    armed = (
        pl.when("was_refused")
        .then(CERTAIN)
        .when((n_before >= ARMED_AFTER) & gated)
        .then(POSSIBLE)
        .when((n_before >= ARMED_AFTER) | (pl.col("run") == 0))
        .then(UNKNOWN)
    )
    return (
        steps.with_columns(armed=armed.cast(pl.UInt8))
        .filter(pl.col("armed").is_not_null() & pl.col("entered"))
        .select("row", "armed")
        .collect()
    )
