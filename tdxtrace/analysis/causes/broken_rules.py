"""Which calls show that the kernel broke a rule that a correct one keeps?"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.causes.candidates import UNCERTAIN, Question
from tdxtrace.analysis.causes.conflicts import VP_ENTER
from tdxtrace.analysis.causes.overlaps import Spans, meetings
from tdxtrace.tables.causes import BUG_RULES, CONFIDENCES
from tdxtrace.tdx import word
from tdxtrace.tdx.exit_reasons import exit_reason_number
from tdxtrace.tdx.leaves import numbers_of, parse_leaf

_AUG: Final = parse_leaf("TDH.MEM.PAGE.AUG")[0]
_TRACK: Final = parse_leaf("TDH.MEM.TRACK")[0]
_BLOCK: Final = parse_leaf("TDH.MEM.RANGE.BLOCK")[0]
_BEGINS_TD: Final = numbers_of(["TDH.MNG.CREATE", "TDH.MNG.INIT"])
_FINALIZE: Final = parse_leaf("TDH.MR.FINALIZE")[0]
# Leaves that Linux calls once, and once more with every vCPU kicked out and held off: 6.16
# arch/x86/kvm/vmx/tdx.c, tdx_no_vcpus_enter_start.
_KICKED_FOR: Final = numbers_of(["TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE"])
# Leaves that want a page to have been blocked and tracked: the module's is_tlb_tracked.
_AFTER_BLOCK: Final = numbers_of(
    [
        *("TDH.MEM.PAGE.REMOVE", "TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE"),
        *("TDH.MEM.SEPT.REMOVE", "TDH.MEM.PAGE.RELOCATE", "TDH.MEM.RANGE.UNBLOCK"),
    ]
)
# Locks of one TD, which only its own calls take.
_OF_TD: Final = ("td", "vcpu", "entry")
_ORDER: Final = ("row", "rule", "evidence", "confidence")
FOUND: Final[dict[str, pl.DataType | type[pl.DataType]]] = {
    "row": pl.UInt32,
    "rule": pl.Enum(BUG_RULES),
    "evidence": pl.UInt32,
    "confidence": pl.Enum(CONFIDENCES),
}


def broken(question: Question, fitting: pl.DataFrame, is_lossy: pl.Series) -> pl.DataFrame:
    """Find the calls of one source that break a rule of ``bug_rule_table``.

    Args:
        question: The calls, and the busy ones among them.
        fitting: Candidate holders of the busy ones (:func:`~.candidates.candidates`).
        is_lossy: For each row of ``done``, whether events near it may be lost.

    Returns:
        Columns of FOUND: rows of ``done``; a call may break several rules.
    """
    lossy = pl.Series("lossy", is_lossy)
    attempts = question.attempts
    best = fitting.filter(pl.col("grade") < UNCERTAIN).sort(
        "attempt", "grade", -pl.col("overlap_ns")
    )
    holder = best.group_by("attempt", maintain_order=True).agg(pl.col("holder").first())
    parts = [
        _held(attempts, holder, "TDR", "tdr_busy"),
        _held(attempts, holder, "TDVPR", "tdvpr_busy"),
        _on_entry(attempts, best, question.slack_ns),
        _before_finalize(question),
        _without_kick(question, lossy),
        _after_kick(question, lossy),
        _dropped_block(question, lossy),
    ]
    found = pl.concat([pl.DataFrame(schema=FOUND), *parts])
    return found.unique(subset=["row", "rule"], keep="first", maintain_order=True)


def _as_found(rows: pl.DataFrame, rule: str, confidence: str = "proof") -> pl.DataFrame:
    return rows.select(
        pl.col("row").cast(pl.UInt32),
        pl.lit(rule).cast(pl.Enum(BUG_RULES)).alias("rule"),
        pl.col("evidence").cast(pl.UInt32),
        pl.lit(confidence).cast(pl.Enum(CONFIDENCES)).alias("confidence"),
    )


def _held(attempts: pl.DataFrame, holder: pl.DataFrame, lock: str, rule: str) -> pl.DataFrame:
    """Every attempt that found the lock held, with who held it where that is known.

    An id that could also mean another lock of that leaf is left out.
    """
    only = pl.col("lock").n_unique().over("row") == 1
    rows = attempts.filter(only & (pl.col("lock") == lock))
    joined = rows.join(holder, left_on="row", right_on="attempt", how="left")
    return _as_found(joined.with_columns(evidence="holder"), rule)


def _on_entry(attempts: pl.DataFrame, best: pl.DataFrame, slack_ns: int) -> pl.DataFrame:
    """AUG that met another call of the host on its entry; a guest's TDCALL is no bug."""
    augs = attempts.filter(pl.col("leaf") == _AUG, pl.col("lock") == "SEPT_ENTRY")
    proven = best.filter(
        pl.col("lock") == "SEPT_ENTRY", pl.col("overlap_ns") > slack_ns, pl.col("grade") == 0
    )
    joined = augs.join(proven, left_on="row", right_on="attempt", how="inner")
    return _as_found(joined.with_columns(evidence="holder"), "aug_busy_on_entry")


def _before_finalize(question: Question) -> pl.DataFrame:
    """Attempts on a TD's own locks while it was being built.

    The last that is known of its life is that it was begun, or nothing is and the next is
    that it was finalized: an address is used again after a TD is gone.  A TD whose vCPU
    entered was built, whether TDH.MR.FINALIZE was probed or not.
    """
    life = _lives(question.done)
    rows = question.attempts.filter(pl.col("scope").is_in(_OF_TD)).select("row").unique()
    mine = question.done[rows["row"]].select("td_id", "begins").with_columns(rows["row"])
    mine = mine.drop_nulls().sort("begins")
    life = life.sort("begins")
    before = mine.join_asof(life, on="begins", by="td_id", check_sortedness=False)
    after = mine.join_asof(
        life, on="begins", by="td_id", strategy="forward", check_sortedness=False
    )
    begun = before.filter(~pl.col("built"))
    finished = after.join(before.filter(pl.col("built").is_not_null()), on="row", how="anti")
    both = pl.concat([begun, finished.filter("finalized")])
    return _as_found(both, "busy_before_finalize")


def _lives(done: pl.DataFrame) -> pl.DataFrame:
    """When each TD was begun, finalized, or ran, of those whose building shows."""
    good = (
        done.select("td_id", "leaf", "status", "begins")
        .with_row_index("evidence")
        .filter((pl.col("status") < word.ERROR_BIT) & pl.col("td_id").is_not_null())
    )
    begins, finalizes = pl.col("leaf").is_in(_BEGINS_TD), pl.col("leaf") == _FINALIZE
    shown = good.filter(begins | finalizes).select("td_id").unique()
    return (
        good.filter(begins | finalizes | (pl.col("leaf") == VP_ENTER))
        .join(shown, on="td_id", how="semi")
        .select("td_id", "evidence", "begins", built=~begins, finalized=finalizes)
    )


def _without_kick(question: Question, lossy: pl.Series) -> pl.DataFrame:
    """TRACK that met vCPUs of the previous epoch: inside since before the TRACK before it."""
    done = question.done.select("td_id", "leaf", "status", "begins", "ends", "certain", "tid")
    done = done.with_row_index("row").with_columns(lossy=lossy)
    tracks = done.filter(pl.col("leaf") == _TRACK, pl.col("td_id").is_not_null())
    late = tracks.filter(
        word.status_code(pl.col("status")) == word.TDX_PREVIOUS_TLB_EPOCH_BUSY, ~pl.col("lossy")
    )
    if late.is_empty():
        return pl.DataFrame(schema=FOUND)
    passed = tracks.filter(pl.col("status") == 0).select("td_id", "begins", passed="ends")
    since = late.sort("begins").join_asof(
        passed.sort("begins"), on="begins", by="td_id", check_sortedness=False
    )
    since = since.filter(pl.col("passed").is_not_null())
    inside = _entries_beside(done, since, "begins").filter(pl.col("into") <= pl.col("passed"))
    return _as_found(inside.sort("row", "into"), "track_without_kick")


def _entries_beside(done: pl.DataFrame, asked: pl.DataFrame, since: str) -> pl.DataFrame:
    """Entries of the TD of each of ``asked`` between its columns ``since`` and ends.

    Returns:
        The columns of ``asked`` and evidence (row of the entry), into, out, forced (whether it
        came out by an interrupt), one row per pair.
    """
    entries = done.filter(pl.col("leaf") == VP_ENTER, pl.col("td_id").is_not_null()).select(
        "td_id",
        evidence="row",
        into="begins",
        out="ends",
        forced=(pl.col("status") == exit_reason_number("EXTERNAL_INTERRUPT")).fill_null(False),
    )
    tds = asked.select("td_id").unique().with_row_index("key")
    wanted = asked.join(tds, on="td_id").sort(since)
    held = entries.join(tds, on="td_id").sort("into")
    spans = [
        Spans(*(rows[name].cast(pl.Int64).to_numpy() for name in ("key", *bounds)))
        for rows, bounds in ((wanted, (since, "ends")), (held, ("into", "out")))
    ]
    pairs = list(meetings(spans[0], spans[1]))
    i, j = (
        (np.concatenate([np.zeros(0, np.intp), *part]) for part in zip(*pairs, strict=True))
        if pairs
        else (np.zeros(0, np.intp),) * 2
    )
    return pl.concat([wanted.drop("key")[i], held.drop("td_id", "key")[j]], how="horizontal")


def _after_kick(question: Question, lossy: pl.Series) -> pl.DataFrame:
    """The second call of two in a row that were busy, with a kick in between.

    A kick shows in that every vCPU that was in its guest at the first call came out by an
    interrupt, and that none went in again before the second call was over.
    """
    done = question.done.select("tid", "td_id", "gpa", "leaf", "status", "begins", "ends")
    done = done.with_row_index("row").with_columns(lossy=lossy)
    busy = word.is_busy(pl.col("status")).fill_null(False)
    calls = done.filter(pl.col("leaf").is_in(_KICKED_FOR), pl.col("td_id").is_not_null())
    again = (
        calls.sort("tid", "begins", "row")
        .with_columns(
            again=busy
            & busy.shift().over("tid")
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
        return pl.DataFrame(schema=FOUND)
    seen = _entries_beside(done, again.drop("evidence"), "first_begins")
    kicked = (
        seen.join(again.select("row", first="evidence"), on="row")
        .group_by("row", evidence="first")
        .agg(
            was_inside=((pl.col("into") < pl.col("first_ends")) & "forced").any(),
            all_forced=(
                pl.col("forced")
                & (pl.col("out") < pl.col("begins"))
                & (pl.col("into") < pl.col("first_ends"))
            ).all(),
        )
        .filter("was_inside", "all_forced")
        .sort("row")
    )
    return _as_found(kicked, "busy_after_kick", "strong")


def _dropped_block(question: Question, lossy: pl.Series) -> pl.DataFrame:
    """TLB_TRACKING_NOT_DONE on a page whose last RANGE.BLOCK was answered busy."""
    done = question.done.select("td_id", "gpa", "leaf", "status", "begins")
    done = done.with_row_index("row").with_columns(lossy=lossy)
    named = done.filter(pl.col("td_id").is_not_null() & pl.col("gpa").is_not_null())
    failed = named.filter(
        pl.col("leaf").is_in(_AFTER_BLOCK),
        word.status_code(pl.col("status")) == word.TDX_TLB_TRACKING_NOT_DONE,
        ~pl.col("lossy"),
    )
    if failed.is_empty():
        return pl.DataFrame(schema=FOUND)
    blocks = named.filter(pl.col("leaf") == _BLOCK).select(
        "td_id", "gpa", "begins", evidence="row", dropped=word.is_busy(pl.col("status"))
    )
    last = failed.sort("begins").join_asof(
        blocks.sort("begins"), on="begins", by=["td_id", "gpa"], check_sortedness=False
    )
    return _as_found(last.filter("dropped"), "dropped_block")
