"""Calls that show that the kernel broke a rule which a correct one keeps."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.causes.candidates import BOUNDS_UNKNOWN, BusyAttempts
from tdxtrace.analysis.causes.overlaps import Intervals, overlapping_pairs
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tables.causes import BUG_RULES, CONFIDENCES
from tdxtrace.tdx import word
from tdxtrace.tdx.exit_reasons import exit_reason_number
from tdxtrace.tdx.leaves import numbers_of, parse_leaf

_AUG: Final = parse_leaf("TDH.MEM.PAGE.AUG")[0]
_TRACK: Final = parse_leaf("TDH.MEM.TRACK")[0]
_BLOCK: Final = parse_leaf("TDH.MEM.RANGE.BLOCK")[0]
_TD_CREATION: Final = numbers_of(["TDH.MNG.CREATE", "TDH.MNG.INIT"])
_FINALIZE: Final = parse_leaf("TDH.MR.FINALIZE")[0]
# Leaves that Linux calls once, and once more with every vCPU kicked out and kept out: 6.16
# arch/x86/kvm/vmx/tdx.c, tdx_no_vcpus_enter_start.
_RETRIED_AFTER_KICK: Final = numbers_of(
    ["TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE"]
)
# Leaves that require a page to have been blocked and tracked: the module's is_tlb_tracked.
_REQUIRE_BLOCK: Final = numbers_of(
    [
        *("TDH.MEM.PAGE.REMOVE", "TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE"),
        *("TDH.MEM.SEPT.REMOVE", "TDH.MEM.PAGE.RELOCATE", "TDH.MEM.RANGE.UNBLOCK"),
    ]
)
# Locks of one TD, which only its own calls take.
_TD_SCOPES: Final = ("td", "vcpu", "entry")
BROKEN_CALLS: Final[dict[str, pl.DataType | type[pl.DataType]]] = {
    "row": pl.UInt32,
    "rule": pl.Enum(BUG_RULES),
    "evidence": pl.UInt32,
    "confidence": pl.Enum(CONFIDENCES),
}


def find_broken_rules(
    busy: BusyAttempts, possible_holders: pl.DataFrame, is_lossy: pl.Series
) -> pl.DataFrame:
    """Find the calls of one source that break a rule of ``bug_rule_table``.

    Args:
        busy: The calls, and the busy ones among them.
        possible_holders: Candidate holders of the busy ones (:func:`~.candidates.find_candidates`).
        is_lossy: For each row of ``calls``, whether events near it may be lost.

    Returns:
        Columns of BROKEN_CALLS: rows of ``calls``; a call may break several rules.
    """
    lossy = pl.Series("lossy", is_lossy)
    attempts = busy.attempts
    best = possible_holders.filter(pl.col("grade") < BOUNDS_UNKNOWN).sort(
        "attempt", "grade", -pl.col("overlap_ns")
    )
    holder = best.group_by("attempt", maintain_order=True).agg(pl.col("holder").first())
    parts = [
        _lock_held(attempts, holder, "TDR", "tdr_busy"),
        _lock_held(attempts, holder, "TDVPR", "tdvpr_busy"),
        _aug_busy_on_entry(attempts, best, busy.slack_ns),
        _busy_before_finalize(busy),
        _track_without_kick(busy, lossy),
        _busy_after_kick(busy, lossy),
        _dropped_block(busy, lossy),
    ]
    found = pl.concat([pl.DataFrame(schema=BROKEN_CALLS), *parts])
    return found.unique(subset=["row", "rule"], keep="first", maintain_order=True)


def _broken_calls(rows: pl.DataFrame, rule: str, confidence: str = "proof") -> pl.DataFrame:
    return rows.select(
        pl.col("row").cast(pl.UInt32),
        pl.lit(rule).cast(pl.Enum(BUG_RULES)).alias("rule"),
        pl.col("evidence").cast(pl.UInt32),
        pl.lit(confidence).cast(pl.Enum(CONFIDENCES)).alias("confidence"),
    )


def _lock_held(attempts: pl.DataFrame, holder: pl.DataFrame, lock: str, rule: str) -> pl.DataFrame:
    """Every attempt that found the lock held, with its holder where that is known.

    An id that could also mean another lock of that leaf is left out.
    """
    only = pl.col("lock").n_unique().over("row") == 1
    rows = attempts.filter(only & (pl.col("lock") == lock))
    joined = rows.join(holder, left_on="row", right_on="attempt", how="left")
    return _broken_calls(joined.with_columns(evidence="holder"), rule)


def _aug_busy_on_entry(attempts: pl.DataFrame, best: pl.DataFrame, slack_ns: int) -> pl.DataFrame:
    """AUG that collided with a host call on its SEPT entry; with a TDCALL it is no bug."""
    augs = attempts.filter(pl.col("leaf") == _AUG, pl.col("lock") == "SEPT_ENTRY")
    proven = best.filter(
        pl.col("lock") == "SEPT_ENTRY", pl.col("overlap_ns") > slack_ns, pl.col("grade") == 0
    )
    joined = augs.join(proven, left_on="row", right_on="attempt", how="inner")
    return _broken_calls(joined.with_columns(evidence="holder"), "aug_busy_on_entry")


def _busy_before_finalize(busy: BusyAttempts) -> pl.DataFrame:
    """Attempts on a TD's own locks while it was being built.

    The last milestone before the attempt is the TD's creation, or there is none and the next is
    its finalization: an address is used again after a TD is gone.  A TD whose vCPU entered was
    built, whether TDH.MR.FINALIZE was probed or not.
    """
    milestones = _td_milestones(busy.calls)
    rows = busy.attempts.filter(pl.col("scope").is_in(_TD_SCOPES)).select("row").unique()
    own = busy.calls[rows["row"]].select("td_id", "begins").with_columns(rows["row"])
    own = own.drop_nulls().sort("begins")
    milestones = milestones.sort("begins")
    before = own.join_asof(milestones, on="begins", by="td_id", check_sortedness=False)
    after = own.join_asof(
        milestones, on="begins", by="td_id", strategy="forward", check_sortedness=False
    )
    begun = before.filter(~pl.col("built"))
    finished = after.join(before.filter(pl.col("built").is_not_null()), on="row", how="anti")
    both = pl.concat([begun, finished.filter("finalized")])
    return _broken_calls(both, "busy_before_finalize")


def _td_milestones(calls: pl.DataFrame) -> pl.DataFrame:
    """Creations, finalizations and entries of TDs whose building was recorded."""
    good = (
        calls.select("td_id", "leaf", "status", "begins")
        .with_row_index("evidence")
        .filter((pl.col("status") < word.ERROR_BIT) & pl.col("td_id").is_not_null())
    )
    begins, finalizes = pl.col("leaf").is_in(_TD_CREATION), pl.col("leaf") == _FINALIZE
    shown = good.filter(begins | finalizes).select("td_id").unique()
    return (
        good.filter(begins | finalizes | (pl.col("leaf") == VP_ENTER))
        .join(shown, on="td_id", how="semi")
        .select("td_id", "evidence", "begins", built=~begins, finalized=finalizes)
    )


def _track_without_kick(busy: BusyAttempts, lossy: pl.Series) -> pl.DataFrame:
    """TRACK busy on vCPUs of the previous epoch, inside since before the TRACK before it."""
    calls = busy.calls.select("td_id", "leaf", "status", "begins", "ends", "certain", "tid")
    calls = calls.with_row_index("row").with_columns(lossy=lossy)
    tracks = calls.filter(pl.col("leaf") == _TRACK, pl.col("td_id").is_not_null())
    busy_tracks = tracks.filter(
        word.status_code(pl.col("status")) == word.TDX_PREVIOUS_TLB_EPOCH_BUSY, ~pl.col("lossy")
    )
    if busy_tracks.is_empty():
        return pl.DataFrame(schema=BROKEN_CALLS)
    completed = tracks.filter(pl.col("status") == 0).select("td_id", "begins", completed="ends")
    since = busy_tracks.sort("begins").join_asof(
        completed.sort("begins"), on="begins", by="td_id", check_sortedness=False
    )
    since = since.filter(pl.col("completed").is_not_null())
    inside = _overlapping_entries(calls, since, "begins").filter(
        pl.col("entered") <= pl.col("completed")
    )
    return _broken_calls(inside.sort("row", "entered"), "track_without_kick")


def _overlapping_entries(calls: pl.DataFrame, wanted: pl.DataFrame, since: str) -> pl.DataFrame:
    """Entries of the TD of each of ``wanted`` between its columns ``since`` and ends.

    Returns:
        The columns of ``wanted`` and evidence (row of the entry), entered, exited (ns), forced
        (whether an interrupt ended it), one row per pair.
    """
    entries = calls.filter(pl.col("leaf") == VP_ENTER, pl.col("td_id").is_not_null()).select(
        "td_id",
        evidence="row",
        entered="begins",
        exited="ends",
        forced=(pl.col("status") == exit_reason_number("EXTERNAL_INTERRUPT")).fill_null(False),
    )
    tds = wanted.select("td_id").unique().with_row_index("key")
    wanted = wanted.join(tds, on="td_id").sort(since)
    held = entries.join(tds, on="td_id").sort("entered")
    spans = [
        Intervals(*(rows[name].cast(pl.Int64).to_numpy() for name in ("key", *bounds)))
        for rows, bounds in ((wanted, (since, "ends")), (held, ("entered", "exited")))
    ]
    pairs = list(overlapping_pairs(spans[0], spans[1]))
    i, j = (
        (np.concatenate([np.zeros(0, np.intp), *part]) for part in zip(*pairs, strict=True))
        if pairs
        else (np.zeros(0, np.intp),) * 2
    )
    return pl.concat([wanted.drop("key")[i], held.drop("td_id", "key")[j]], how="horizontal")


def _busy_after_kick(busy: BusyAttempts, lossy: pl.Series) -> pl.DataFrame:
    """Second of two consecutive busy calls with a kick of all vCPUs in between.

    It was a kick if every vCPU that was in its guest at the first call exited by an interrupt,
    and none entered again before the second call ended.
    """
    calls = busy.calls.select("tid", "td_id", "gpa", "leaf", "status", "begins", "ends")
    calls = calls.with_row_index("row").with_columns(lossy=lossy)
    is_busy = word.is_busy(pl.col("status")).fill_null(False)
    again = (
        calls.filter(pl.col("leaf").is_in(_RETRIED_AFTER_KICK), pl.col("td_id").is_not_null())
        .sort("tid", "begins", "row")
        .with_columns(
            again=is_busy
            & is_busy.shift().over("tid")
            & pl.all_horizontal(
                pl.col(c).eq_missing(pl.col(c).shift().over("tid"))
                for c in ("leaf", "td_id", "gpa")
            ),
            first_begins=pl.col("begins").shift().over("tid"),
            first_ends=pl.col("ends").shift().over("tid"),
            evidence=pl.col("row").shift().over("tid"),
        )
        .filter("again", ~pl.col("lossy"))
    )
    if again.is_empty():
        return pl.DataFrame(schema=BROKEN_CALLS)
    seen = _overlapping_entries(calls, again.drop("evidence"), "first_begins")
    kicked = (
        seen.join(again.select("row", first="evidence"), on="row")
        .group_by("row", evidence="first")
        .agg(
            was_inside=((pl.col("entered") < pl.col("first_ends")) & "forced").any(),
            all_forced=(
                pl.col("forced")
                & (pl.col("exited") < pl.col("begins"))
                & (pl.col("entered") < pl.col("first_ends"))
            ).all(),
        )
        .filter("was_inside", "all_forced")
        .sort("row")
    )
    return _broken_calls(kicked, "busy_after_kick", "strong")


def _dropped_block(busy: BusyAttempts, lossy: pl.Series) -> pl.DataFrame:
    """TLB_TRACKING_NOT_DONE on a page whose last RANGE.BLOCK was answered busy."""
    calls = busy.calls.select("td_id", "gpa", "leaf", "status", "begins")
    calls = calls.with_row_index("row").with_columns(lossy=lossy)
    named = calls.filter(pl.col("td_id").is_not_null() & pl.col("gpa").is_not_null())
    failed = named.filter(
        pl.col("leaf").is_in(_REQUIRE_BLOCK),
        word.status_code(pl.col("status")) == word.TDX_TLB_TRACKING_NOT_DONE,
        ~pl.col("lossy"),
    )
    if failed.is_empty():
        return pl.DataFrame(schema=BROKEN_CALLS)
    blocks = named.filter(pl.col("leaf") == _BLOCK).select(
        "td_id", "gpa", "begins", evidence="row", dropped=word.is_busy(pl.col("status"))
    )
    last = failed.sort("begins").join_asof(
        blocks.sort("begins"), on="begins", by=["td_id", "gpa"], check_sortedness=False
    )
    return _broken_calls(last.filter("dropped"), "dropped_block")
