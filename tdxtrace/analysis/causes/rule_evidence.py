"""Input of the checks for broken kernel rules, and the rows that they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.arrays import Flags, Index, Times
from tdxtrace.analysis.causes.overlaps import Intervals, overlapping_pairs
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tables.causes import BUG_RULES, CONFIDENCES
from tdxtrace.tdx.exit_reasons import exit_reason_number

BROKEN_CALLS: Final[dict[str, pl.DataType | type[pl.DataType]]] = {
    "row": pl.UInt32,
    "rule": pl.Enum(BUG_RULES),
    "evidence": pl.UInt32,
    "confidence": pl.Enum(CONFIDENCES),
}


@dataclass(frozen=True, slots=True)
class RuleEvidence:
    """Calls of one source, with the accuracy of their timestamps and the losses."""

    calls: pl.DataFrame
    """Calls of all threads (:func:`~.evidence.activity`)."""
    attempts: pl.DataFrame
    """Busy attempts, one row per lock that the answer can mean (``BusyAttempts.attempts``)."""
    possible_holders: pl.DataFrame
    """Candidate holders of the attempts (:func:`~.candidates.find_candidates`)."""
    mask: int
    """Possible lock generations of the module."""
    slack_ns: int
    """Resolution of the clock."""
    entry_ns: int
    """Longest time in ns that TDH.VP.ENTER takes before the guest runs."""
    may_miss: Callable[[Times, Times], Flags]
    """Returns for intervals (first and last ns) whether events in them may be lost."""
    clock_is_global: bool
    """Whether the source names a clock that all CPUs share."""

    def numbered(self, *columns: str) -> pl.DataFrame:
        """Return columns of ``calls`` with ``row``, the row number."""
        return self.calls.select(*columns).with_row_index("row")

    def certainly_overlap(self, one: Index, other: Index) -> Flags:
        """Return whether pairs of rows of ``calls`` overlap, however the clock was rounded.

        Each call must begin before the other ends by more than the resolution.  The length of the
        overlap does not matter: a call of zero length inside another one overlaps it.
        """
        begins, ends = (self.calls[name].to_numpy() for name in ("begins", "ends"))
        overlap_ns = np.minimum(ends[one] - begins[other], ends[other] - begins[one])
        is_certain: Flags = overlap_ns > self.slack_ns
        return is_certain

    def is_whole(self, rows: Index) -> Flags:
        """Return whether rows of ``calls`` have a recorded begin and end and no loss between.

        If events may be lost during a call, its return may belong to a later call.
        """
        begins, ends = (self.calls[name].to_numpy()[rows] for name in ("begins", "ends"))
        certain: Flags = self.calls["certain"].to_numpy()[rows]
        return certain & ~self.may_miss(begins, ends)

    def without_losses(self, rows: pl.DataFrame, first: str, last: str) -> pl.DataFrame:
        """Return the rows without a loss between their columns ``first`` and ``last`` (ns)."""
        lost = self.may_miss(rows[first].to_numpy(), rows[last].to_numpy())
        return rows.filter(~pl.Series(lost, dtype=pl.Boolean))


def broken_calls(rows: pl.DataFrame, rule: str, confidence: str = "proof") -> pl.DataFrame:
    """Return rows of BROKEN_CALLS.

    Args:
        rows: Columns row and evidence, row numbers in ``calls``; evidence may be null.
        rule: The rule that the rows break.
        confidence: The confidence, one of CONFIDENCES.
    """
    return rows.select(
        pl.col("row").cast(pl.UInt32),
        pl.lit(rule).cast(pl.Enum(BUG_RULES)).alias("rule"),
        pl.col("evidence").cast(pl.UInt32),
        pl.lit(confidence).cast(pl.Enum(CONFIDENCES)).alias("confidence"),
    )


def overlapping_entries(
    evidence: RuleEvidence, intervals: pl.DataFrame, first: str
) -> pl.DataFrame:
    """Return the vCPU entries of each wanted row's TD that overlap the row's interval.

    Args:
        evidence: The calls.
        intervals: Columns td_id, ``first`` and ends (ns), the bounds of the interval.
        first: Name of the column with the start of the interval.

    Returns:
        The columns of ``intervals`` and evidence (row of the entry), entered, exited (ns), forced
        (an external interrupt ended it), whole (begin and end were recorded without a loss
        between; otherwise the return may belong to a later entry), one row per pair.
    """
    entries = evidence.numbered("td_id", "leaf", "status", "begins", "ends").filter(
        pl.col("leaf") == VP_ENTER, pl.col("td_id").is_not_null()
    )
    whole = evidence.is_whole(entries["row"].to_numpy().astype(np.intp))
    entries = entries.with_columns(whole=pl.Series(whole, dtype=pl.Boolean)).select(
        "td_id",
        "whole",
        evidence="row",
        entered="begins",
        exited="ends",
        forced=(pl.col("status") == exit_reason_number("EXTERNAL_INTERRUPT")).fill_null(False),
    )
    tds = intervals.select("td_id").unique().with_row_index("key")
    intervals = intervals.join(tds, on="td_id").sort(first)
    entries_by_td = entries.join(tds, on="td_id").sort("entered")
    i, j = overlapping_pairs(
        _spans(intervals, first, "ends"), _spans(entries_by_td, "entered", "exited")
    )
    return pl.concat(
        [intervals.drop("key")[i], entries_by_td.drop("td_id", "key")[j]], how="horizontal"
    )


def _spans(rows: pl.DataFrame, first: str, last: str) -> Intervals:
    return Intervals(*(rows[name].cast(pl.Int64).to_numpy() for name in (first, last, "key")))
