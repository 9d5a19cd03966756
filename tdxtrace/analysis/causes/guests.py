"""Busy attempts for which a guest may have held the lock of an SEPT entry."""

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

# Host leaves that work on an SEPT entry and that KVM calls at run time.  A capture that has only
# installs may lack probes on the others; a capture of a single leaf cannot show a holder.
_INSTALLS: Final = numbers_of(["TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"])
_ZAPS: Final = numbers_of(
    ["TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE", "TDH.MEM.PAGE.DEMOTE", "TDH.MEM.SEPT.REMOVE"]
)
_MIN_LEAVES_PROBED: Final = 2
_NO_LEVEL: Final = 255
_B, _C = mask_of("B"), mask_of("C")


def tries_on_entries(evidence: BusyEvidence) -> pl.DataFrame:
    """Return whether a guest can have made each attempt on an SEPT entry busy, by generation.

    Generation B: any attempt.  Generation C: attempts of a run in which every attempt began within
    the longest TDCALL after the end of the host's first failed try: that try sets host priority,
    which in this generation stays until a host call takes the lock (intel/tdx-module 1.5.20
    sept_manager.c, atomically_update_sept_state_keep_tdhp).  If one attempt of a run began
    later, something else held the entry, and no attempt of the run is attributed to a guest.
    Generation A: none; it has no lock that both a guest and a host call take, and no host priority.

    A run is a sequence of attempts on one entry, by any thread, without a call between them that
    took the lock or may have taken it.

    Returns:
        Columns row, is_late (its run lasted longer than one TDCALL of the guest), by_guest
        (it can have been a guest in every possible generation), disagree (it can have been a
        guest in one possible generation but not in another), one row per attempt.
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
    nearby = (
        calls.join(entries, on=key, how="semi")
        .with_columns(longest=longest_guest_ns(), took=may_have_taken_entry())
        .join(on_entry, on="row", how="left")
    )
    is_attempt = pl.col("mask").is_not_null()
    runs = nearby.filter(is_attempt | pl.col("took")).sort(*key, "begins", "row")
    runs = runs.with_columns(run=pl.col("took").cast(pl.UInt32).cum_sum().over(key)).filter(
        is_attempt
    )
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
    """Find the attempts that only a guest can have made busy, and the vCPUs that may have done so.

    A guest's TDCALLs take the lock of an SEPT entry and no other lock that a host call wants.

    Evidence: the answer refers to an SEPT entry; no recorded host call can have held it;
    a vCPU of the TD was running guest code; host priority did not yet exclude the guest
    (:func:`tries_on_entries`).

    Absence: a call without a working probe, or a call among lost events, may have held the
    entry: at least two leaves that work on entries must have been recorded.  If no vCPU entry
    was recorded, it is unknown which vCPUs were inside, and the evidence is weak; it is also weak
    if installs, zaps or holders of the tree are missing (:func:`~.generation.misses_holders`).

    Nearest innocent trace: a host call that was not recorded holds the entry, while a vCPU
    runs that never touches the page.

    Returns:
        Columns row, is_inside (False: no vCPU entries were captured), n_inside (UInt32),
        holder (row of the vCPU entry that overlaps most; null if none), overlap_ns and
        is_late (the guest would need more than one TDCALL).
    """
    calls, busy = evidence.calls, evidence.busy
    on_entry = tries.filter("by_guest").select("row")
    with_candidates = ranking.candidates.filter(pl.col("lock") == ENTRY).select("attempt").unique()
    without_holder = ranking.attempts[ranking.cause == NO_CANDIDATE]
    rows = (
        pl.DataFrame({"row": without_holder}, schema={"row": pl.UInt32})
        .join(on_entry, on="row", how="semi")
        .join(with_candidates, left_on="row", right_on="attempt", how="anti")["row"]
    )
    is_late_by_row = tries.select("row", "is_late")
    flags = pl.DataFrame({"row": rows, "lossy": evidence.lossy.gather(rows)}).with_columns(
        calls.select("start_ns", "td_id", "gpa")[rows]
    )
    first, last = evidence.observed_interval
    observed = pl.col("start_ns").is_between(first, last)
    rows = flags.filter(~pl.col("lossy"), observed).drop_nulls()["row"]
    recorded_leaves = evidence.leaves
    if len(recorded_leaves & {*_INSTALLS, *_ZAPS}) < _MIN_LEAVES_PROBED:
        rows = rows.clear()
    inside = guests_inside(calls, rows, busy.slack_ns).sort(
        "attempt", -pl.col("overlap_ns"), "holder"
    )
    best = inside.group_by("attempt", maintain_order=True).agg(
        pl.col("holder", "overlap_ns").first(), n_inside=pl.len().cast(pl.UInt32)
    )
    if VP_ENTER not in recorded_leaves:
        without_entries = pl.DataFrame({"row": rows}, schema={"row": pl.UInt32})
        best = without_entries.with_columns(
            holder=pl.lit(None, pl.UInt32),
            overlap_ns=pl.lit(None, pl.Int64),
            n_inside=pl.lit(1, pl.UInt32),
            is_inside=pl.lit(False),
        )
    else:
        best = best.rename({"attempt": "row"}).with_columns(is_inside=pl.lit(True))
    return best.join(is_late_by_row, on="row", how="left", maintain_order="left")


def shows_other_holders(recorded_leaves: frozenset[int]) -> bool:
    """Return whether both installs and zaps, the alternatives to a guest, were recorded."""
    return bool(recorded_leaves & set(_ZAPS)) and bool(recorded_leaves & set(_INSTALLS))
