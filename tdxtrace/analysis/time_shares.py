"""Time shares: how much of a TD's build, run and teardown its threads spent on retries."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.members import members
from tdxtrace.analysis.td_of import with_td
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.verdicts import PHASES, TIME_SHARES
from tdxtrace.tdx import leaves, status

_VP_ENTER: Final = leaves.parse_leaf("TDH.VP.ENTER")[0]
# Building ends with TDH.MR.FINALIZE: no vCPU can be entered before (TDX module 1.5,
# check_td_in_correct_build_state, tdh_vp_enter.c wants OP_STATE RUNNABLE).
_FINALIZE: Final = leaves.parse_leaf("TDH.MR.FINALIZE")[0]
# Teardown begins with the first of these after the last entry: Linux 6.16
# arch/x86/kvm/vmx/tdx.c tdx_mmu_release_hkid, tdx_reclaim_page, tdx_td_destroy.
_TEARS_DOWN: Final = leaves.numbers_of(
    ["TDH.MNG.VPFLUSHDONE", "TDH.MNG.KEY.FREEID", "TDH.PHYMEM.PAGE.RECLAIM"]
)
_TD: Final = ("source", "td_id")


def time_shares(seamcalls: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Say where the threads' time went in each phase of each TD's life.

    Times are summed over threads; the attempts at one request are those of its retry chain,
    and ``wait_ns`` is the time between them.  Calls that were not seen to begin, or to end,
    count in ``n_calls`` and in no time.  A TD without TDH.MR.FINALIZE in the trace has no build
    phase: it was built before.

    Args:
        seamcalls: The ``seamcalls`` table.
        chains: The ``retry_chains`` table of it, which knows the TD of calls that do not name it.

    Returns:
        The ``time_shares`` table, by source, TD and time.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    requests = RETRY_CHAINS.conform(chains)
    columns = ("source", "seq", "tid", "tgid", "leaf", "start_ns", "end_ns", "status")
    calls = members(SEAMCALLS.conform(seamcalls).select(columns), requests)
    tds = requests.select("source", "td_id", chain="first_seq")
    calls = with_td(calls.join(tds, on=["source", "chain"], how="left"), requests)
    if calls.is_empty():
        return TIME_SHARES.empty()
    rows = _phased(calls)
    keys = [*_TD, "phase"]
    summed = rows.group_by(keys).agg(**_sums())
    waits = (
        rows.filter(pl.col("leaf") != _VP_ENTER)
        .group_by([*keys, "chain"])
        .agg(wait=(pl.col("when_end").max() - pl.col("when").min() - pl.col("took").sum()).clip(0))
    )
    threads = rows.group_by([*keys, "tid"]).agg(
        span=pl.col("when_end").max() - pl.col("when").min()
    )
    found = (
        summed.join(
            waits.group_by(keys).agg(wait_ns=pl.col("wait").sum()),
            on=keys,
            how="left",
            nulls_equal=True,
        )
        .join(
            threads.group_by(keys).agg(thread_ns=pl.col("span").sum()),
            on=keys,
            how="left",
            nulls_equal=True,
        )
        .with_columns(pl.col("wait_ns").fill_null(0))
    )
    used = pl.sum_horizontal("done_ns", "retry_ns", "wait_ns", "guest_ns")
    found = found.with_columns(
        rest_ns=(pl.col("thread_ns") - used).clip(0),
        phase=pl.col("phase").cast(pl.Enum(PHASES)),
    )
    return TIME_SHARES.conform(found.sort(*_TD, "start_ns"))


def _phased(calls: pl.DataFrame) -> pl.DataFrame:
    """Give each call its times and the phase of its TD that it falls in."""
    when, end = pl.coalesce("start_ns", "end_ns"), pl.coalesce("end_ns", "start_ns")
    rows = calls.with_columns(
        when=when, when_end=end, took=(pl.col("end_ns") - pl.col("start_ns")).fill_null(0)
    )
    final = pl.col("leaf") == _FINALIZE
    rows = rows.with_columns(
        built=pl.col("when_end").filter(final).max().over(_TD),
        entered=pl.col("when").filter(pl.col("leaf") == _VP_ENTER).max().over(_TD),
    )
    tears = pl.col("leaf").is_in(_TEARS_DOWN) & (pl.col("when") >= pl.col("entered").fill_null(0))
    rows = rows.with_columns(torn=pl.col("when").filter(tears).min().over(_TD))
    phase = (
        pl.when((pl.col("when") <= pl.col("built")).fill_null(False))
        .then(pl.lit("build"))
        .when((pl.col("when") >= pl.col("torn")).fill_null(False))
        .then(pl.lit("teardown"))
        .otherwise(pl.lit("run"))
    )
    return rows.with_columns(phase=phase)


def _sums() -> dict[str, pl.Expr]:
    entry = pl.col("leaf") == _VP_ENTER
    retried = status.is_retryable(pl.col("status")).fill_null(False)
    return {
        "start_ns": pl.col("when").min(),
        "end_ns": pl.col("when_end").max(),
        "n_calls": (~entry).sum().cast(pl.UInt64),
        "n_retries": (~entry & retried).sum().cast(pl.UInt64),
        "done_ns": pl.col("took").filter(~entry & ~retried).sum(),
        "retry_ns": pl.col("took").filter(~entry & retried).sum(),
        "guest_ns": pl.col("took").filter(entry).sum(),
    }
