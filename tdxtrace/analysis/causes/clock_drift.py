"""What a clock that differs between CPUs may hide: an armed entry at the time of an attempt."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.candidates import armed_entries
from tdxtrace.analysis.threads import VP_ENTER

# Linux kernel/sched/clock.c: where the TSC is not stable, the clocks of two CPUs differ by up to
# a tick; it lasts 4 ms with CONFIG_HZ=250, the default of kernel/Kconfig.hz.
DRIFT_NS: Final = 4_000_000


def may_have_met_armed_entry(calls: pl.DataFrame, rows: pl.Series) -> pl.Series:
    """Tell which attempts may have met an entry that zero-step mitigation had armed.

    Evidence: an entry of the attempt's TD that may hold the SEPT tree
    (:func:`~.candidates.armed_entries`) and lies within DRIFT_NS of the attempt.  The first
    recorded entry of a thread is none: nothing shows a fault before it.

    Absence: where no entry of a vCPU was recorded, or the TD of the attempt or of such an entry is
    not known, any attempt may have met one.

    Nearest innocent trace: an AUG that an armed entry made busy, beside a BLOCK that began when
    the AUG was over, on a CPU whose clock is a few microseconds behind.

    Args:
        calls: Calls of one source, by whose clock CPUs may differ.
        rows: Places of the attempts in ``calls``.

    Returns:
        Boolean, in the order of ``rows``.
    """
    entries = calls.select("tid", "leaf", "begins").with_row_index("row")
    entries = entries.filter(pl.col("leaf") == VP_ENTER)
    if entries.is_empty():
        return pl.repeat(True, len(rows), eager=True)
    first = entries.group_by("tid").agg(pl.col("row").sort_by("begins").first())
    rows_armed = armed_entries(calls).join(first, on="row", how="anti")["row"]
    armed = calls.select("td_id", "begins")[rows_armed].sort("begins")
    if armed["td_id"].null_count():
        return pl.repeat(True, len(rows), eager=True)
    attempts = calls.select("td_id", "begins")[rows].with_row_index("place")
    nearest = attempts.sort("begins").join_asof(
        armed.with_columns(armed_ns="begins"),
        on="begins",
        by="td_id",
        strategy="nearest",
        tolerance=DRIFT_NS,
        check_sortedness=False,
    )
    met = pl.col("armed_ns").is_not_null() | pl.col("td_id").is_null()
    return nearest.sort("place").select(met).to_series()
