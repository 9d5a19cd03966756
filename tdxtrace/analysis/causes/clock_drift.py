"""Armed entries that may coincide with an attempt when CPU clocks are not synchronised."""

from __future__ import annotations

import polars as pl

from tdxtrace.analysis.causes.candidates import armed_entries
from tdxtrace.analysis.loops.arming import ARMED_UNKNOWN
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tables.trace import DRIFT_NS


def is_near_armed_entry(calls: pl.DataFrame, rows: pl.Series) -> pl.Series:
    """Return whether each attempt may coincide with an entry armed by zero-step mitigation.

    Evidence: an entry of the attempt's TD that may hold the SEPT tree, belongs to a run in which
    the vCPU was refused (:func:`~.candidates.armed_entries`: ``ARMED``, ``PERHAPS_ARMED``), and
    lies within DRIFT_NS of the attempt.

    Absence: if no vCPU entry was recorded, or the TD of the attempt or of such an entry is
    unknown, the result is true.

    Nearest innocent trace: an armed entry makes an AUG busy; a BLOCK that began after the AUG
    ended seems to overlap it, because the clock of its CPU is a few microseconds behind.

    Args:
        calls: Calls of one source whose clock may differ between CPUs.
        rows: Row indices of the attempts in ``calls``.

    Returns:
        Boolean, in the order of ``rows``.
    """
    if not (calls["leaf"] == VP_ENTER).any():
        return pl.repeat(True, len(rows), eager=True)
    armed_rows = armed_entries(calls).filter(pl.col("armed") < ARMED_UNKNOWN)["row"]
    armed = calls.select("td_id", "begins")[armed_rows].sort("begins")
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
    is_near = pl.col("armed_ns").is_not_null() | pl.col("td_id").is_null()
    return nearest.sort("place").select(is_near).to_series()
