"""What the rules of a correct kernel are judged on, and the rows in which they answer."""

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
    """Calls of one source, and what is known of their times and of what is missing."""

    calls: pl.DataFrame
    """Calls of all threads (:func:`~.evidence.activity`)."""
    attempts: pl.DataFrame
    """The busy ones, one row per lock that the answer can mean (``BusyAttempts.attempts``)."""
    possible_holders: pl.DataFrame
    """Their candidate holders (:func:`~.candidates.find_candidates`)."""
    mask: int
    """Lock generations that the module may be of."""
    slack_ns: int
    """Resolution of the clock."""
    entry_ns: int
    """Longest time that TDH.VP.ENTER spends before the guest runs."""
    may_miss: Callable[[Times, Times], Flags]
    """For intervals (first and last ns), whether events in them may be lost."""
    clock_is_global: bool
    """Whether the source names a clock that all CPUs share."""

    def numbered(self, *columns: str) -> pl.DataFrame:
        """Return columns of ``calls`` with ``row``, its place there."""
        return self.calls.select(*columns).with_row_index("row")

    def surely_overlap(self, one: Index, other: Index) -> Flags:
        """Return for pairs of rows of ``calls`` whether they overlap at any rounding of the clock.

        Each begins before the other ends by more than the resolution; how long the two last
        together does not matter: a call of no length inside another one overlaps it.
        """
        begins, ends = (self.calls[name].to_numpy() for name in ("begins", "ends"))
        apart = np.minimum(ends[one] - begins[other], ends[other] - begins[one])
        sure: Flags = apart > self.slack_ns
        return sure

    def is_whole(self, rows: Index) -> Flags:
        """Return whether begin and end of these rows of ``calls`` were recorded and nothing lost.

        Where events may be lost within a call, its return may be that of a later one.
        """
        begins, ends = (self.calls[name].to_numpy()[rows] for name in ("begins", "ends"))
        certain: Flags = self.calls["certain"].to_numpy()[rows]
        return certain & ~self.may_miss(begins, ends)

    def lossless(self, rows: pl.DataFrame, first: str, last: str) -> pl.DataFrame:
        """Return the rows between whose columns ``first`` and ``last`` (ns) nothing is lost."""
        lost = self.may_miss(rows[first].to_numpy(), rows[last].to_numpy())
        return rows.filter(~pl.Series(lost, dtype=pl.Boolean))


def broken_calls(rows: pl.DataFrame, rule: str, confidence: str = "proof") -> pl.DataFrame:
    """Return rows of BROKEN_CALLS.

    Args:
        rows: Columns row and evidence: places in ``calls``; evidence may be null.
        rule: The rule that they break.
        confidence: How sure that is.
    """
    return rows.select(
        pl.col("row").cast(pl.UInt32),
        pl.lit(rule).cast(pl.Enum(BUG_RULES)).alias("rule"),
        pl.col("evidence").cast(pl.UInt32),
        pl.lit(confidence).cast(pl.Enum(CONFIDENCES)).alias("confidence"),
    )


def overlapping_entries(seen: RuleEvidence, wanted: pl.DataFrame, first: str) -> pl.DataFrame:
    """Return the vCPU entries of the TD of each wanted row between ``first`` and its ends.

    Args:
        seen: The calls.
        wanted: Columns td_id, ``first`` and ends (ns).
        first: Name of the column with the first ns.

    Returns:
        The columns of ``wanted`` and evidence (row of the entry), entered, exited (ns), forced
        (an external interrupt ended it), whole (both were recorded, and no loss lies between:
        else its return may be that of a later entry), one row per pair.
    """
    entries = seen.numbered("td_id", "leaf", "status", "begins", "ends").filter(
        pl.col("leaf") == VP_ENTER, pl.col("td_id").is_not_null()
    )
    whole = seen.is_whole(entries["row"].to_numpy().astype(np.intp))
    entries = entries.with_columns(whole=pl.Series(whole, dtype=pl.Boolean)).select(
        "td_id",
        "whole",
        evidence="row",
        entered="begins",
        exited="ends",
        forced=(pl.col("status") == exit_reason_number("EXTERNAL_INTERRUPT")).fill_null(False),
    )
    tds = wanted.select("td_id").unique().with_row_index("key")
    wanted = wanted.join(tds, on="td_id").sort(first)
    held = entries.join(tds, on="td_id").sort("entered")
    i, j = overlapping_pairs(_spans(wanted, first, "ends"), _spans(held, "entered", "exited"))
    return pl.concat([wanted.drop("key")[i], held.drop("td_id", "key")[j]], how="horizontal")


def _spans(rows: pl.DataFrame, first: str, last: str) -> Intervals:
    return Intervals(*(rows[name].cast(pl.Int64).to_numpy() for name in (first, last, "key")))
