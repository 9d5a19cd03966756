"""The ``time_shares`` table: time spent on retries in a TD's build, run and teardown."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.lookup import join_rows
from tdxtrace.analysis.threads import VP_ENTER, infer_td, unprobed_entries
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tables.verdicts import PHASES, TIME_SHARES
from tdxtrace.tdx import leaves, status, word

# The build phase ends with TDH.MR.FINALIZE: no vCPU can be entered before (TDX module 1.5,
# check_td_in_correct_build_state, tdh_vp_enter.c requires OP_STATE RUNNABLE).
_FINALIZE: Final = leaves.parse_leaf("TDH.MR.FINALIZE")[0]
# Teardown begins with the first of these after the last entry: Linux 6.16
# arch/x86/kvm/vmx/tdx.c tdx_mmu_release_hkid, tdx_reclaim_page, tdx_td_destroy.
TEARS_DOWN: Final = leaves.numbers_of(
    ["TDH.MNG.VPFLUSHDONE", "TDH.MNG.KEY.FREEID", "TDH.PHYMEM.PAGE.RECLAIM"]
)
_FAILED: Final = 0xFFFF_FFFF
_TD: Final = ("source", "td_id")


def time_shares(
    seamcalls: pl.DataFrame, chains: pl.DataFrame, busy_answers: pl.DataFrame
) -> pl.DataFrame:
    """Sum the time of the threads of each TD by phase: work, retries, waits, guest, rest.

    Times are summed over threads.  The attempts at a request are those of its retry chain,
    and ``wait_ns`` is the time between them.  Calls without a recorded start or end
    count in ``n_calls`` but add no time.  A TD without TDH.MR.FINALIZE in the trace has no build
    phase: it was built before the trace began.

    Args:
        seamcalls: The complete ``seamcalls`` table.
        chains: The ``retry_chains`` table of these calls, with inferred TDs, or some of its rows.
        busy_answers: The ``busy_answers`` table of these chains, optionally of more chains.

    Returns:
        The ``time_shares`` table, by source, TD and time.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    requests = RETRY_CHAINS.conform(chains)
    answers = BUSY_ANSWERS.conform(busy_answers)
    calls = infer_td(timed_attempts(SEAMCALLS.conform(seamcalls), requests, answers), requests)
    if calls.is_empty():
        return TIME_SHARES.empty()
    rows = _with_phase(calls)
    keys = [*_TD, "phase"]
    first, last = pl.col("when").min(), pl.col("when_end").max()
    of_thread = rows.group_by([*keys, "tid"]).agg(
        **_sums(), start_ns=first, end_ns=last, thread_ns=last - first
    )
    sums = pl.all().exclude(*keys, "tid", "start_ns", "end_ns").sum()
    summed = of_thread.group_by(keys).agg(pl.col("start_ns").min(), pl.col("end_ns").max(), sums)
    waits = (
        rows.filter(pl.col("leaf") != VP_ENTER, ~pl.col("single"))
        .group_by([*keys, "chain"])
        .agg(wait_ns=(last - first - pl.col("took").sum()).clip(0))
        .group_by(keys)
        .agg(pl.col("wait_ns").sum())
    )
    found = summed.join(waits, on=keys, how="left", nulls_equal=True)
    found = found.with_columns(pl.col("wait_ns").fill_null(0))
    used = pl.sum_horizontal("done_ns", "retry_ns", "wait_ns", "guest_ns")
    found = found.with_columns(rest_ns=(pl.col("thread_ns") - used).clip(0))
    return TIME_SHARES.conform(found.sort(*_TD, "start_ns"))


def timed_attempts(
    calls: pl.DataFrame, requests: pl.DataFrame, answers: pl.DataFrame
) -> pl.DataFrame:
    """Return every attempt at these requests with its times and TD.

    Args:
        calls: The ``seamcalls`` table.
        requests: The ``retry_chains`` table of these calls, or some of its rows.
        answers: The ``busy_answers`` table of these chains, optionally of more chains.

    Returns:
        Columns source, td_id, tid, tgid, leaf, status, chain (``first_seq`` of its request),
        when and when_end (ns, equal if one was not recorded), took (ns), and single (whether
        it is the only attempt).
    """
    single_attempt = pl.col("n_attempts") == 1
    columns = ("source", "td_id", "tid", "tgid", "leaf", "status", "chain", "when", "when_end")
    single = requests.filter(single_attempt).select(
        *columns[:5],
        status="final_status",
        chain="first_seq",
        when="start_ns",
        when_end="end_ns",
    )
    several = requests.filter(~single_attempt).select(
        "source", "td_id", "last_seq", "n_attempts", "n_busy", chain="first_seq"
    )
    busy = answers.select("source", "seq", chain="first_seq")
    last = several.filter(pl.col("n_attempts") > pl.col("n_busy"))
    attempts = pl.concat(
        [
            join_rows(busy, "chain", several.select("source", "chain", "td_id"), "chain"),
            last.select("source", "last_seq", "chain", "td_id").rename({"last_seq": "seq"}),
        ]
    )
    timed = ("tid", "tgid", "leaf", "status", "start_ns", "end_ns")
    chained = join_rows(attempts, "seq", calls.select("source", "seq", *timed), "seq").with_columns(
        when=pl.coalesce("start_ns", "end_ns"), when_end=pl.coalesce("end_ns", "start_ns")
    )
    # A call without a recorded start or end has the same time for both.
    rows = pl.concat(
        part.with_columns(single=pl.lit(place == 0))
        for place, part in enumerate((single, chained.select(columns)))
    )
    return rows.with_columns(took=pl.col("when_end") - pl.col("when"))


def vcpu_times(attempts: pl.DataFrame, entries: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Return the intervals in which threads were inside TDH.VP.ENTER.

    Args:
        attempts: Attempts as returned by :func:`timed_attempts`.
        entries: The ``vm_entries`` table; used for threads whose TDH.VP.ENTER was not probed.
        calls: The ``seamcalls`` table.

    Returns:
        Columns source, tid, tgid, when and when_end (ns), and is_refused (whether the entry was
        busy).
    """
    probed = attempts.filter(pl.col("leaf") == VP_ENTER).select(
        *("source", "tid", "tgid", "when", "when_end"),
        is_refused=word.is_busy(pl.col("status")).fill_null(False),
    )
    # kvm_exit has reason -1 for every status without an exit: Linux 6.16
    # arch/x86/kvm/vmx/tdx.c tdx_to_vmx_exit_reason.
    failed = (pl.col("exit_reason") == _FAILED).fill_null(False)
    kvm_entries = unprobed_entries(entries, calls).filter(
        pl.col("start_ns").is_not_null(), pl.col("end_ns").is_not_null()
    )
    kvm_entries = kvm_entries.select(
        "source", "tid", "tgid", when="start_ns", when_end="end_ns", is_refused=failed
    )
    return pl.concat([probed, kvm_entries])


def _with_phase(rows: pl.DataFrame) -> pl.DataFrame:
    """Add to each call the phase of its TD."""
    bounds = rows.group_by(_TD).agg(
        built=pl.col("when_end").filter(pl.col("leaf") == _FINALIZE).max(),
        entered=pl.col("when").filter(pl.col("leaf") == VP_ENTER).max(),
    )
    keys = list(_TD)
    teardowns = rows.filter(pl.col("leaf").is_in(TEARS_DOWN))
    teardowns = teardowns.join(bounds, on=keys, how="left", nulls_equal=True)
    after_last_entry = pl.col("when") >= pl.col("entered").fill_null(0)
    teardown_ns = (
        teardowns.filter(after_last_entry).group_by(_TD).agg(teardown_ns=pl.col("when").min())
    )
    bounds = bounds.join(teardown_ns, on=keys, how="left", nulls_equal=True)
    rows = rows.join(bounds, on=keys, how="left", nulls_equal=True)
    phase = (
        pl.when((pl.col("when") <= pl.col("built")).fill_null(False))
        .then(pl.lit("build", pl.Enum(PHASES)))
        .when((pl.col("when") >= pl.col("teardown_ns")).fill_null(False))
        .then(pl.lit("teardown", pl.Enum(PHASES)))
        .otherwise(pl.lit("run", pl.Enum(PHASES)))
    )
    return rows.with_columns(phase=phase)


def _sums() -> dict[str, pl.Expr]:
    entry = pl.col("leaf") == VP_ENTER
    retried = status.is_retryable(pl.col("status")).fill_null(False)
    return {
        "n_calls": (~entry).sum().cast(pl.UInt64),
        "n_retries": (~entry & retried).sum().cast(pl.UInt64),
        "done_ns": pl.col("took").filter(~entry & ~retried).sum(),
        "retry_ns": pl.col("took").filter(~entry & retried).sum(),
        "guest_ns": pl.col("took").filter(entry).sum(),
    }
