"""Guests that may hold the lock of an SEPT entry, and what keeps them out."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.candidates import guests_inside
from tdxtrace.analysis.causes.conflicts import ENTRY, mask_of
from tdxtrace.analysis.causes.entry_locks import (
    address_of_entry,
    longest_guest_ns,
    may_have_taken_entry,
    takers_of_entry,
)
from tdxtrace.analysis.causes.evidence import BusyEvidence
from tdxtrace.analysis.causes.ranking import Ranking
from tdxtrace.analysis.loops.ranking import NO_CANDIDATE
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tdx.leaves import numbers_of

# Host leaves that work on an SEPT entry and that KVM calls at run time.  A capture with nothing
# but installs may have probed no others, and one with a single leaf shows no holder.
_INSTALLS: Final = numbers_of(["TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"])
_ZAPS: Final = numbers_of(
    ["TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE", "TDH.MEM.PAGE.DEMOTE", "TDH.MEM.SEPT.REMOVE"]
)
_MIN_LEAVES_PROBED: Final = 2
_NO_LEVEL: Final = 255
_B, _C = mask_of("B"), mask_of("C")


def tries_on_entries(evidence: BusyEvidence) -> pl.DataFrame:
    """Tell which attempts at SEPT entries a guest can have made busy, by lock generation.

    B: any.  C: those of a run that ended before the first failed try of the host, and the
    longest TDCALL from there on, were over: that try sets host priority, which in this
    generation stays until a host call takes the lock (intel/tdx-module 1.5.20
    sept_manager.c, atomically_update_sept_state_keep_tdhp).  If one attempt of a run is
    later, somebody else held the entry, and nothing is said of the run.  A: none; it has
    no lock that a guest and a call of the host both take, and no host priority.

    A run is the attempts at one entry, of any thread, that no call lies between which took the
    lock or may have taken it.

    Returns:
        Columns row, is_late (its run lasted longer than one TDCALL of the guest), by_guest
        (in every possible generation it can have been a guest), disagree (in one it can, in
        another it cannot), one row per attempt.
    """
    key = ("td_id", "address", "entry_level")
    on_entry = evidence.busy.attempts.filter(pl.col("lock") == ENTRY).select("row", "mask")
    leaves = [*takers_of_entry(), *evidence.calls["leaf"].gather(on_entry["row"]).unique()]
    calls = (
        evidence.calls.lazy()
        .select("td_id", "gpa", "level", "leaf", "status", "begins", "ends")
        .with_row_index("row")
        .filter(
            pl.col("leaf").is_in(leaves), pl.col("td_id").is_not_null(), pl.col("gpa").is_not_null()
        )
        .with_columns(address=address_of_entry(), entry_level=pl.col("level").fill_null(_NO_LEVEL))
        .collect()
    )
    entries = calls.join(on_entry, on="row", how="semi").select(key).unique()
    near = (
        calls.join(entries, on=key, how="semi")
        .with_columns(longest=longest_guest_ns(), took=may_have_taken_entry())
        .join(on_entry, on="row", how="left")
    )
    tried = pl.col("mask").is_not_null()
    runs = near.filter(tried | pl.col("took")).sort(*key, "begins", "row")
    runs = runs.with_columns(run=pl.col("took").cast(pl.UInt32).cum_sum().over(key)).filter(tried)
    first_end = pl.col("ends").first().over(*key, "run")
    is_late = (pl.col("begins") > first_end + pl.col("longest")).any().over(*key, "run")
    left = pl.col("mask") & pl.lit(evidence.mask, pl.UInt8)
    in_b, in_c = (left & pl.lit(_B, pl.UInt8)) > 0, (left & pl.lit(_C, pl.UInt8)) > 0
    return runs.select(
        "row",
        is_late=is_late,
        by_guest=(in_b | in_c) & ~(in_c & is_late),
        disagree=in_b & in_c & is_late,
    )


def guest_holders(evidence: BusyEvidence, ranking: Ranking, tries: pl.DataFrame) -> pl.DataFrame:
    """Find the attempts that only a guest can have made busy, and the vCPUs it may have been.

    A guest's TDCALLs take the lock of an SEPT entry and no other lock that a host call wants.

    Evidence: the answer means an SEPT entry; no host call that was recorded can have held it;
    a vCPU of the TD was in its guest; host priority had not yet shut the guest out
    (:func:`tries_on_entries`).

    Absence: calls of which no probe is known to work, or of which events may be lost, may have
    held it: at least two leaves that work on entries must have been recorded.  Where no entry
    of a vCPU was recorded, nobody knows who was inside: the answer is weak, as it is where
    installs or zaps are missing, or holders of the tree are (:func:`~.generation.misses_holders`).

    Nearest innocent trace: a host call that was not recorded holds the entry, while a vCPU
    runs that never touches the page.

    Returns:
        Columns row, is_inside (False: no entries of vCPUs were captured at all), n_inside
        (UInt32), holder (row of the entry that overlaps most; null if none), overlap_ns and
        is_late (it would need more than one TDCALL).
    """
    calls, busy = evidence.calls, evidence.busy
    on_entry = tries.filter("by_guest").select("row")
    doubtful = ranking.candidates.filter(pl.col("lock") == ENTRY).select("attempt").unique()
    unheld = ranking.attempts[ranking.cause == NO_CANDIDATE]
    rows = (
        pl.DataFrame({"row": unheld}, schema={"row": pl.UInt32})
        .join(on_entry, on="row", how="semi")
        .join(doubtful, left_on="row", right_on="attempt", how="anti")["row"]
    )
    late = tries.select("row", "is_late")
    flags = pl.DataFrame({"row": rows, "lossy": evidence.lossy.gather(rows)}).with_columns(
        calls.select("start_ns", "td_id", "gpa")[rows]
    )
    first, last = evidence.observed_interval
    observed = pl.col("start_ns").is_between(first, last)
    rows = flags.filter(~pl.col("lossy"), observed).drop_nulls()["row"]
    seen = evidence.leaves
    if len(seen & {*_INSTALLS, *_ZAPS}) < _MIN_LEAVES_PROBED:
        rows = rows.clear()
    inside = guests_inside(calls, rows, busy.slack_ns).sort(
        "attempt", -pl.col("overlap_ns"), "holder"
    )
    best = inside.group_by("attempt", maintain_order=True).agg(
        pl.col("holder", "overlap_ns").first(), n_inside=pl.len().cast(pl.UInt32)
    )
    if VP_ENTER not in seen:
        unseen = pl.DataFrame({"row": rows}, schema={"row": pl.UInt32})
        best = unseen.with_columns(
            holder=pl.lit(None, pl.UInt32),
            overlap_ns=pl.lit(None, pl.Int64),
            n_inside=pl.lit(1, pl.UInt32),
            is_inside=pl.lit(False),
        )
    else:
        best = best.rename({"attempt": "row"}).with_columns(is_inside=pl.lit(True))
    return best.join(late, on="row", how="left", maintain_order="left")


def shows_other_holders(seen: frozenset[int]) -> bool:
    """Whether a capture of these leaves shows installs and zaps, the alternatives to a guest."""
    return bool(seen & set(_ZAPS)) and bool(seen & set(_INSTALLS))
