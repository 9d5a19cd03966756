"""Rules about kicks: busy answers that are impossible after every vCPU was kicked out."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.rule_evidence import (
    BROKEN_CALLS,
    RuleEvidence,
    broken_calls,
    overlapping_entries,
)
from tdxtrace.analysis.threads import IPI_LEAVES, VP_ENTER
from tdxtrace.tdx import word
from tdxtrace.tdx.leaves import numbers_of, parse_leaf

_TRACK: Final = parse_leaf("TDH.MEM.TRACK")[0]
# Leaves that Linux calls once, and if busy once more with every vCPU kicked and kept out: 6.16
# arch/x86/kvm/vmx/tdx.c, tdx_no_vcpus_enter_start.
_RETRIED_AFTER_KICK: Final = numbers_of(
    ["TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE"]
)
_REQUEST: Final = ("tid", "leaf", "td_id", "gpa", "level")
# Time after which a retry loop has tried again and a vCPU that a timer interrupted runs again: a
# scheduler slice lasts 2.8 ms on 8 CPUs and more (Linux 6.16 kernel/sched/fair.c,
# sysctl_sched_base_slice).  Inferred; an upper bound.
_MIN_CONTINUATION_NS: Final = 4_000_000


def track_without_kick(evidence: RuleEvidence) -> pl.DataFrame:
    """Find TRACKs that were busy because a vCPU stayed inside since before the previous TRACK.

    Evidence: PREVIOUS_TLB_EPOCH_BUSY, the last earlier TRACK of that TD that succeeded, and a
    vCPU entry that began early enough before that TRACK to belong to the older epoch
    (``entry_ns``) and had not ended at the busy TRACK; its begin and end were recorded, with no
    loss between.  Of several entries, the one that ended last is reported.  An entry that began
    later than ``entry_ns`` before the earlier TRACK, but still before it, is evidence if no other
    entry that began before was inside: the answer implies that one was (strong).

    Absence: without recorded entries, or without an earlier TRACK, nothing is reported: the
    answer shows that some vCPU is late, not which call should have kicked it.  If the clock may
    differ between CPUs, the confidence is strong, not proof.

    Nearest innocent trace: a vCPU that entered during or after the earlier TRACK, and so belongs
    to the newer epoch; it may stay inside for any time.
    """
    calls = evidence.numbered("td_id", "leaf", "status", "begins", "ends")
    tracks = calls.filter(pl.col("leaf") == _TRACK, pl.col("td_id").is_not_null())
    late_tracks = tracks.filter(
        word.status_code(pl.col("status")) == word.TDX_PREVIOUS_TLB_EPOCH_BUSY
    ).sort("begins")
    if late_tracks.is_empty():
        return pl.DataFrame(schema=BROKEN_CALLS)
    done = tracks.filter(pl.col("status") == 0).select(
        "td_id", "begins", tracked="begins", tracked_until="ends"
    )
    since = late_tracks.join_asof(
        done.sort("begins"), on="begins", by="td_id", check_sortedness=False
    ).filter(pl.col("tracked").is_not_null())
    inside = overlapping_entries(evidence, since, "begins").filter(
        pl.col("exited") > pl.col("begins") + evidence.slack_ns
    )
    entered_before = inside.filter(
        "whole", pl.col("entered") + evidence.entry_ns <= pl.col("tracked")
    )
    # If any vCPU was inside, the last to leave was: the kernel records an exit after it returned.
    latest = entered_before.sort("row", "exited", "evidence", descending=[False, True, False])
    confidence = "proof" if evidence.clock_is_global else "strong"
    possible = inside.filter(pl.col("entered") < pl.col("tracked_until") + evidence.slack_ns)
    only = possible.filter(
        "whole",
        pl.len().over("row") == 1,
        pl.col("entered") + evidence.slack_ns < pl.col("tracked"),
    ).join(entered_before, on="row", how="anti")
    return pl.concat(
        [
            broken_calls(latest, "track_without_kick", confidence),
            broken_calls(only, "track_without_kick", "strong"),
        ]
    )


def busy_after_kick(evidence: RuleEvidence) -> pl.DataFrame:
    """Find BLOCKs, TRACKs and REMOVEs that were still busy after every vCPU was kicked out.

    Mainline makes exactly two calls.  Between them it kicks all vCPUs and keeps them out; if
    the second is busy too, it kills the VM.

    Evidence: exactly two consecutive calls of one request by one thread, both OPERAND_BUSY;
    every entry of that TD that lasted beyond the first answer ended by an external interrupt
    before the second call; the TD has no later entry, and no thread makes the same call later;
    no host call can have held the lock.  The evidence is strong if the recording continues for
    _MIN_CONTINUATION_NS and for at least as long as the two calls took; otherwise it is weak.

    Absence: if events may be lost between the two calls, or entries belong to an unknown TD,
    nothing is reported.  If the entries of a vCPU were not probed, its kick is not visible.

    Nearest innocent trace: a retry loop, with or without a limit, while a host call holds the
    lock or while a timer interrupts the guest.  The loop continues after two tries, or the VM
    continues after the loop, or the recording ends there.
    """
    pairs = _pairs_of_busy_calls(evidence)
    if pairs.is_empty():
        return pl.DataFrame(schema=BROKEN_CALLS)
    attempts_with_holder = evidence.possible_holders.select(row="attempt").unique()
    pairs = evidence.without_losses(
        pairs.join(attempts_with_holder, on="row", how="anti"), "first_begins", "ends"
    )
    pairs = _not_tried_again(evidence, pairs)
    pairs = pairs.join(_last_exits(evidence), on="td_id", how="left").filter(
        (pl.col("last_exit") <= pl.col("begins")).fill_null(False)
    )
    if pairs.is_empty() or _may_have_other_entries(evidence, pairs):
        return pl.DataFrame(schema=BROKEN_CALLS)
    ended_later = pl.col("exited") > pl.col("first_ends") - evidence.slack_ns
    kicked = (
        overlapping_entries(evidence, pairs, "first_begins")
        .filter(ended_later)
        .group_by("row", "first", "goes_on")
        .agg(
            was_inside=(pl.col("whole") & (pl.col("entered") < pl.col("first_ends"))).any(),
            all_forced=(pl.col("forced") & (pl.col("exited") <= pl.col("begins"))).all(),
        )
        .filter("was_inside", "all_forced")
        .sort("row")
    )
    kicked = kicked.rename({"first": "evidence"})
    certain = broken_calls(kicked.filter("goes_on"), "busy_after_kick", "strong")
    at_the_end = broken_calls(kicked.filter(~pl.col("goes_on")), "busy_after_kick", "weak")
    return pl.concat([certain, at_the_end])


def _pairs_of_busy_calls(evidence: RuleEvidence) -> pl.DataFrame:
    """Return the second of exactly two busy calls of a request, with row and times of the first."""
    calls = evidence.numbered(*_REQUEST, "status", "begins", "ends", "certain").filter(
        pl.col("tid").is_not_null(), ~pl.col("leaf").is_in(numbers_of(IPI_LEAVES))
    )
    is_busy = word.is_busy(pl.col("status")).fill_null(False)
    # Few threads had busy calls: sort only the calls of those.
    retried = calls.filter(is_busy, pl.col("leaf").is_in(_RETRIED_AFTER_KICK))
    calls = calls.join(retried.select("tid").unique(), on="tid", how="semi")

    def same(distance: int) -> pl.Expr:
        return pl.all_horizontal(
            pl.col(c).eq_missing(pl.col(c).shift(distance).over("tid")) for c in _REQUEST
        )

    ordered = calls.sort("tid", "begins", "row")
    is_second = is_busy & is_busy.shift().over("tid") & same(1) & ~(same(2).fill_null(False))
    return (
        ordered.with_columns(
            second=is_second & (pl.col("row") == pl.col("row").last().over(_REQUEST)),
            first=pl.col("row").shift().over("tid"),
            first_begins=pl.col("begins").shift().over("tid"),
            first_ends=pl.col("ends").shift().over("tid"),
            both_certain=pl.col("certain") & pl.col("certain").shift().over("tid"),
        )
        .filter("second", "both_certain")
        .filter(pl.col("leaf").is_in(_RETRIED_AFTER_KICK), pl.col("td_id").is_not_null())
    )


def _not_tried_again(evidence: RuleEvidence, pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the pairs whose request is not made later, with goes_on: the recording continues."""
    request_columns = [name for name in _REQUEST if name != "tid"]
    last = (
        evidence.calls.join(
            pairs.select(request_columns), on=request_columns, how="semi", nulls_equal=True
        )
        .group_by(request_columns)
        .agg(last_try=pl.col("begins").max())
    )
    not_repeated = pairs.join(last, on=request_columns, how="left", nulls_equal=True).filter(
        pl.col("last_try") <= pl.col("begins")
    )
    took = pl.max_horizontal(pl.col("ends") - pl.col("first_begins"), _MIN_CONTINUATION_NS)
    ends = evidence.calls.select(pl.max_horizontal("begins", "ends").max()).item()
    return not_repeated.with_columns(goes_on=pl.col("ends") + took <= ends)


def _last_exits(evidence: RuleEvidence) -> pl.DataFrame:
    """Return the end of the last entry of each TD: columns td_id and last_exit (ns)."""
    entries = evidence.calls.filter(pl.col("leaf") == VP_ENTER, pl.col("td_id").is_not_null())
    return entries.group_by("td_id").agg(last_exit=pl.col("ends").max())


def _may_have_other_entries(evidence: RuleEvidence, pairs: pl.DataFrame) -> bool:
    """Return whether any entry of an unknown TD may overlap one of the pairs."""
    unknown = evidence.calls.filter(pl.col("leaf") == VP_ENTER, pl.col("td_id").is_null())
    last = unknown["ends"].max()
    return last is not None and bool((pairs["first_begins"] <= last).any())
