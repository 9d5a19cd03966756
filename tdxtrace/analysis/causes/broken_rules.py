"""Calls that show that the kernel broke a rule which every correct kernel keeps.

The docstring of each rule states its evidence, the meaning of an absent probe or event, and the
most similar innocent trace; ``tests/analysis/causes/test_broken_rules.py`` tests that trace.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.causes.blocks import dropped_blocks
from tdxtrace.analysis.causes.conflicts import ENTRY
from tdxtrace.analysis.causes.kicks import busy_after_kick, track_without_kick
from tdxtrace.analysis.causes.mmu_lock import FAULTS, mmu_lock_excludes
from tdxtrace.analysis.causes.rule_evidence import BROKEN_CALLS, RuleEvidence, broken_calls
from tdxtrace.analysis.causes.td_building import busy_before_finalize
from tdxtrace.analysis.loops.ranking import BOUNDS_UNKNOWN, HELD_TO_END
from tdxtrace.tdx.leaves import leaf_table, parse_leaf

_AUG: Final = parse_leaf("TDH.MEM.PAGE.AUG")[0]
# No merged kernel supports migration, and a migration TD locks the TDR of its target by a TDCALL
# (intel/tdx-module 1.5.01 tdg_servtd_rd_wr.c): the rules for Linux do not cover these leaves.
_MIGRATION: Final = ("TDH.EXPORT.", "TDH.IMPORT.", "TDH.MIG.", "TDH.SERVTD.")


def find_broken_rules(evidence: RuleEvidence) -> pl.DataFrame:
    """Find the calls of one source that break a rule of ``bug_rule_table``.

    Args:
        evidence: The calls, the busy attempts among them, the losses and the clock.

    Returns:
        Columns of BROKEN_CALLS, one row per call and rule; a call may break several rules.
    """
    parts = [
        tdr_busy(evidence),
        tdvpr_busy(evidence),
        aug_busy_on_entry(evidence),
        busy_before_finalize(evidence),
        track_without_kick(evidence),
        busy_after_kick(evidence),
        dropped_block(evidence),
        mmu_lock_excludes(evidence),
    ]
    found = pl.concat([pl.DataFrame(schema=BROKEN_CALLS), *parts])
    return found.unique(subset=["row", "rule"], keep="first", maintain_order=True)


def tdr_busy(evidence: RuleEvidence) -> pl.DataFrame:
    """Find attempts for which the TDR of their TD was locked.

    Evidence: the answer itself, if its operand id can only mean the TDR for that leaf.  The
    holder is reported if the trace shows one.

    Absence: irrelevant; no other call has to be recorded.

    Nearest innocent trace: a migration leaf, while a migration TD reads its target; an operand id
    that means the TDR for one leaf and a page for another (RCX).
    """
    return _lock_held(evidence, "TDR", "tdr_busy")


def tdvpr_busy(evidence: RuleEvidence) -> pl.DataFrame:
    """Find attempts for which the TDVPR of their vCPU was locked.

    Evidence, absence: as for :func:`tdr_busy`.

    Nearest innocent trace: TDH.VP.CREATE that is busy on RCX, which is the PAMT entry of the page
    that will become the TDVPR.
    """
    return _lock_held(evidence, "TDVPR", "tdvpr_busy")


def _lock_held(evidence: RuleEvidence, lock: str, rule: str) -> pl.DataFrame:
    """Return every attempt that found the lock held, with its holder if known."""
    found = evidence.attempts.filter(
        pl.col("lock") == lock, ~pl.col("leaf").is_in(migration_leaves())
    )
    if found.is_empty():
        return pl.DataFrame(schema=BROKEN_CALLS)
    best = (
        evidence.possible_holders.filter(pl.col("grade") < BOUNDS_UNKNOWN)
        .join(found, left_on="attempt", right_on="row", how="semi")
        .sort("attempt", "grade", -pl.col("overlap_ns"))
    )
    holder = best.group_by("attempt", maintain_order=True).agg(evidence=pl.col("holder").first())
    others = evidence.attempts.filter(pl.col("lock").ne_missing(lock))
    rows = found.join(others, on="row", how="anti", maintain_order="left")
    return broken_calls(rows.join(holder, left_on="row", right_on="attempt", how="left"), rule)


def migration_leaves() -> list[int]:
    """Return the leaves of TD migration, which the rules for Linux do not cover."""
    of_migration = pl.any_horizontal(pl.col("name").str.starts_with(name) for name in _MIGRATION)
    return leaf_table().filter(of_migration)["leaf"].to_list()


def aug_busy_on_entry(evidence: RuleEvidence) -> pl.DataFrame:
    """Find AUGs that were busy on an SEPT entry while a host call worked on the same entry.

    Evidence: the busy answer, and a call of another thread on the same entry of the same TD,
    with its level recorded, that certainly overlaps (each begins before the other ends, however
    the clock was rounded) and held the lock to its end.  If the clock may differ between CPUs, the
    other call must install a page too: a fault often follows a zap closely, but two installs of
    one page do not.

    Absence: without such a call a guest may have held the entry, and nothing is reported.

    Nearest innocent trace: a guest that accepts the page; a call on an entry of another level
    at the same address, such as SEPT.ADD of the table above; a REMOVE that ended just before, if
    the clocks of the two CPUs differ.
    """
    augs = evidence.attempts.filter(pl.col("leaf") == _AUG, pl.col("lock") == ENTRY)
    holders = evidence.possible_holders.filter(
        pl.col("lock") == ENTRY, pl.col("grade") == HELD_TO_END
    )
    both = augs.join(holders, left_on="row", right_on="attempt", how="inner")
    row, holder = (both[name].to_numpy().astype(np.intp) for name in ("row", "holder"))
    is_certain = (
        evidence.certainly_overlap(row, holder) & evidence.is_whole(row) & evidence.is_whole(holder)
    )
    both = both.filter(pl.Series(is_certain, dtype=pl.Boolean))
    level = evidence.calls["level"].is_not_null()
    known = pl.all_horizontal(pl.Series(level.gather(both[name])) for name in ("row", "holder"))
    both = both.filter(known).sort("row", -pl.col("overlap_ns"))
    if not evidence.clock_is_global:
        by_fault = evidence.calls["leaf"].gather(both["holder"]).is_in(FAULTS)
        both = both.filter(by_fault)
    confidence = "proof" if evidence.clock_is_global else "strong"
    return broken_calls(both.rename({"holder": "evidence"}), "aug_busy_on_entry", confidence)


def dropped_block(evidence: RuleEvidence) -> pl.DataFrame:
    """Find calls that failed because the kernel ignored the busy answer of a BLOCK.

    Evidence: GPA_RANGE_NOT_BLOCKED or TLB_TRACKING_NOT_DONE from a call that requires a blocked
    page; the last RANGE.BLOCK of that page, or of a range that contains it, returned OPERAND_BUSY,
    and no BLOCK succeeded since the page was last installed, unblocked or removed.

    Absence: a BLOCK whose return was not recorded may have succeeded, and so may one among
    lost events: in both cases nothing is reported.

    Nearest innocent trace: BLOCK succeeds at its second try, and only a TRACK is missing.
    """
    found = dropped_blocks(evidence.numbered("td_id", "gpa", "level", "leaf", "status", "begins"))
    found = evidence.without_losses(found, "dropped_ns", "failed_ns")
    return broken_calls(found.rename({"block": "evidence"}), "dropped_block")
