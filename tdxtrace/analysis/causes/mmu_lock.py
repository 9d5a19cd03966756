"""Calls that KVM makes under mmu_lock, and overlaps that mmu_lock should prevent."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.causes.clock_drift import is_near_armed_entry
from tdxtrace.analysis.causes.conflicts import TREE
from tdxtrace.analysis.causes.overlaps import Intervals, overlapping_pairs
from tdxtrace.analysis.causes.rule_evidence import BROKEN_CALLS, RuleEvidence, broken_calls
from tdxtrace.analysis.loops.ranking import BOUNDS_UNKNOWN
from tdxtrace.tdx.leaves import numbers_of

# Linux 6.16 arch/x86/kvm/vmx/tdx.c and mmu/tdp_mmu.c: faults install under mmu_lock held for
# reading, zaps hold it for writing (tdx_track, tdx_sept_remove_private_spte:
# lockdep_assert_held_write); 6.19 tdx_sept_remove_private_spte likewise.
FAULTS: Final = numbers_of(["TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"])
ZAPS: Final = numbers_of(["TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE"])
EXCLUDES: Final = "mmu_lock_excludes"


def excluded(leaf: pl.Expr, other: pl.Expr) -> pl.Expr:
    """Return whether mmu_lock prevents calls of two leaves for one TD from overlapping."""
    under_lock = [*FAULTS, *ZAPS]
    both = leaf.is_in(under_lock) & other.is_in(under_lock)
    return both & (leaf.is_in(ZAPS) | other.is_in(ZAPS))


def mmu_lock_excludes(evidence: RuleEvidence) -> pl.DataFrame:
    """Find BLOCKs, TRACKs and REMOVEs that overlap each other, or an AUG or SEPT.ADD.

    KVM holds mmu_lock for writing during BLOCK, TRACK and REMOVE (zaps), and for reading during
    AUG and SEPT.ADD, so two calls for one TD never overlap if one of them is a zap.  The probes
    lie inside the locked section.  The row is the call that begins later, its evidence the other.

    Evidence: both calls have a recorded begin and end and run in different threads, for one TD
    that each call (or its thread or process) names; each begins before the other ends by more than
    the clock's resolution.  The clocks of two CPUs may differ if the source does not name its
    clock, or names ``local``: then only pairs are reported that the module itself found
    together, that is, one call was busy on the SEPT tree and the other is its only candidate, with
    no armed entry that may have blocked it (:mod:`~.clock_drift`); confidence is strong, not proof.

    Absence: a call without a recorded begin (return probes only) or end overlaps nothing, and
    neither does a call during which events may be lost: its return may belong to a later call.

    Nearest innocent trace: an AUG that begins in the microsecond in which the BLOCK ends; an AUG
    on a CPU whose clock is a few microseconds ahead; an AUG for another TD; two faults at once.
    """
    rows = _under_lock(evidence)
    pairs = _overlaps(evidence, rows)
    if pairs.is_empty():
        return pl.DataFrame(schema=BROKEN_CALLS)
    if not evidence.clock_is_global:
        pairs = _found_by_module(evidence, pairs)
    best = pairs.sort("row", "evidence").unique("row", keep="first", maintain_order=True)
    return broken_calls(best, EXCLUDES, "proof" if evidence.clock_is_global else "strong")


def _under_lock(evidence: RuleEvidence) -> pl.DataFrame:
    """Return the calls that KVM makes under mmu_lock and whose time, thread and TD are certain."""
    rows = evidence.numbered("tid", "td_id", "td_certain", "leaf", "begins", "ends").filter(
        pl.col("leaf").is_in([*FAULTS, *ZAPS]), pl.col("td_certain"), pl.col("tid").is_not_null()
    )
    whole = evidence.is_whole(rows["row"].to_numpy().astype(np.intp))
    rows = rows.filter(pl.Series(whole, dtype=pl.Boolean))
    tds = rows.select("td_id").unique().with_row_index("key")
    return rows.join(tds, on="td_id", maintain_order="left")


def _overlaps(evidence: RuleEvidence, rows: pl.DataFrame) -> pl.DataFrame:
    """Return pairs that certainly overlap: row (the call that begins later) and evidence."""
    zaps = rows.filter(pl.col("leaf").is_in(ZAPS))
    i, j = overlapping_pairs(_intervals(zaps), _intervals(rows))
    zap, other = zaps["row"].to_numpy()[i], rows["row"].to_numpy()[j]
    of_two = zaps["tid"].to_numpy()[i] != rows["tid"].to_numpy()[j]
    certain_pairs = of_two & evidence.certainly_overlap(zap, other)
    zap, other = zap[certain_pairs], other[certain_pairs]
    begins = evidence.calls["begins"].to_numpy()
    is_later = (begins[zap] > begins[other]) | ((begins[zap] == begins[other]) & (zap > other))
    return pl.DataFrame(
        {"row": np.where(is_later, zap, other), "evidence": np.where(is_later, other, zap)},
        schema={"row": pl.UInt32, "evidence": pl.UInt32},
    ).unique()


def _intervals(rows: pl.DataFrame) -> Intervals:
    return Intervals(*(rows[name].cast(pl.Int64).to_numpy() for name in ("begins", "ends", "key")))


def _found_by_module(evidence: RuleEvidence, pairs: pl.DataFrame) -> pl.DataFrame:
    """Return pairs of a call that was busy on the SEPT tree and its only candidate."""
    of_tree = evidence.attempts.filter(pl.col("lock") == TREE).select(
        attempt="row", possible=pl.col("mask") & pl.lit(evidence.mask, pl.UInt8)
    )
    # The candidate must fit in every possible generation.
    overlapping = (
        evidence.possible_holders.filter(pl.len().over("attempt") == 1)
        .join(of_tree, on="attempt")
        .filter(pl.col("grade") < BOUNDS_UNKNOWN, pl.col("mask") == pl.col("possible"))
    )
    overlapping = overlapping.filter(~is_near_armed_entry(evidence.calls, overlapping["attempt"]))
    both_orders = [
        overlapping.select(row="attempt", evidence="holder"),
        overlapping.select(row="holder", evidence="attempt"),
    ]
    return pairs.join(pl.concat(both_orders), on=["row", "evidence"], how="semi")
