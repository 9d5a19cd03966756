"""The cause of each busy attempt, its confidence, or what the capture lacks to tell it."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.causes import keys
from tdxtrace.analysis.causes.candidates import BOUNDS_UNKNOWN, HELD_TO_END, may_have_met
from tdxtrace.analysis.causes.conflicts import ENTRY, GENERATIONS, TREE, lock_conflicts, mask_of
from tdxtrace.analysis.causes.evidence import BusyEvidence
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tables.causes import LACKS
from tdxtrace.tdx.leaves import leaf_table
from tdxtrace.tdx.wrappers import PAGES

# Why no host call is the cause.
NO_CANDIDATE, CLOCK_TOO_COARSE, GENERATIONS_DISAGREE = (
    "no_candidate",
    "clock",
    "generations_disagree",
)


def rank_candidates(evidence: BusyEvidence) -> pl.DataFrame:
    """Order the candidates of every attempt, best first.

    A call in the middle of its work when the attempt met the lock ranks above one that only
    overlaps its edges; then one that held the lock to its end above one that failed on the way
    or is not surely armed; then the one that began first: among several that hold a lock
    together the module knows no order.

    Returns:
        The candidates with cause, miss_ns (ns between the times in which both had their locks;
        0: these overlap), is_proven (they overlap at any rounding of the clock; never for an
        armed entry: when it released the tree is not shown), holder_begins (ns), is_observed
        (no event of any CPU is missing at the time of the attempt).
    """
    slack = evidence.busy.slack_ns
    frame = evidence.possible_holders
    return frame.with_columns(
        cause=pl.when("is_armed").then(pl.lit("armed_entry")).otherwise(pl.lit("host_conflict")),
        miss_ns=pl.max_horizontal(-pl.col("core_ns"), 0),
        is_proven=(pl.col("core_ns") >= slack)
        & (pl.col("grade") == HELD_TO_END)
        & ~pl.col("is_armed"),
        holder_begins=evidence.calls["begins"].gather(frame["holder"]),
        is_observed=evidence.fully_observed.gather(frame["attempt"]),
    ).sort(
        "attempt",
        pl.col("grade") == BOUNDS_UNKNOWN,
        "miss_ns",
        "is_armed",
        "grade",
        "holder_begins",
        "holder",
    )


def cause_from_calls(evidence: BusyEvidence, ranked: pl.DataFrame) -> pl.DataFrame:
    """Determine the cause of each attempt that host calls can have made busy.

    In one generation the best candidate is the cause if it surely held the lock, or if the
    capture shows every call that could have held it and all candidates have the same cause.
    There is none where the possible generations disagree, or one of them has no candidate.

    Evidence of ``host_conflict``: a call of another thread that overlaps the attempt, works on
    the same resource, takes its lock in a mode that excludes the attempt's, and was not refused
    before that lock.  Evidence of ``armed_entry``: :func:`~.candidates.armed_entries`.

    Absence: a call of which only the return was recorded, or that was lost, is no candidate,
    so the absence of others proves nothing beside it; several causes that fit within the
    resolution of the clock leave none.

    Nearest innocent trace: a call on another entry, of another TD, or over before the attempt
    began, while the true holder was not probed.

    Returns:
        Columns row and call_cause (a cause, or NO_CANDIDATE, CLOCK_TOO_COARSE or
        GENERATIONS_DISAGREE), one row per attempt.
    """
    attempts = evidence.busy.attempts.group_by("row", maintain_order=True).agg(
        (pl.col("mask") & pl.lit(evidence.mask, pl.UInt8)).bitwise_or()
    )
    by_generation = []
    for name in GENERATIONS:
        bit = pl.lit(mask_of(name), pl.UInt8)
        here = attempts.filter((pl.col("mask") & bit) > 0).select("row")
        best = _best_candidate(evidence, ranked.filter((pl.col("mask") & bit) > 0))
        by_generation.append(
            here.join(best, on="row", how="left").with_columns(
                pl.col("call_cause").fill_null(NO_CANDIDATE)
            )
        )
    merged = pl.concat(by_generation).group_by("row").agg(pl.col("call_cause").unique())
    one = pl.col("call_cause").list.len() == 1
    found = merged.select(
        "row",
        call_cause=pl.when(one)
        .then(pl.col("call_cause").list.first())
        .otherwise(pl.lit(GENERATIONS_DISAGREE)),
    )
    rest = attempts.join(found, on="row", how="anti").select("row", call_cause=pl.lit(NO_CANDIDATE))
    return pl.concat([found, rest]).sort("row")


def _best_candidate(evidence: BusyEvidence, ranked: pl.DataFrame) -> pl.DataFrame:
    """Cause of each attempt in one generation: columns row and call_cause."""
    slack = evidence.busy.slack_ns
    sees_entries = VP_ENTER in set(evidence.calls["leaf"].unique())
    near = pl.col("miss_ns") <= pl.col("miss_ns").first() + 2 * slack
    equally_good = pl.col("is_proven") & (pl.col("grade") == pl.col("grade").first())
    best = ranked.group_by("attempt", maintain_order=True).agg(
        pl.col("cause", "is_proven", "grade", "lock", "is_observed").first(),
        n_causes=pl.col("cause").filter(near).n_unique(),
        n_proven=pl.col("cause").filter(equally_good).n_unique(),
        is_armed_entry=pl.col("cause").first() == "armed_entry",
        # A call that surely had the tree may have had it at that time: the attempt may as well
        # have met that call.
        has_rival=(
            (pl.col("cause") != "armed_entry") & (pl.col("lock") == TREE) & may_have_met()
        ).any(),
        overlaps=pl.col("overlap_ns").first() >= 0,
    )
    # A guest can hold the lock of an SEPT entry too, and an entry that was not probed the tree:
    # only a call that surely held it rules these out.
    only_cause = (
        (pl.col("n_causes") == 1)
        & (pl.col("lock") != ENTRY)
        & (pl.lit(sees_entries) | (pl.col("lock") != TREE))
    )
    sure = (pl.col("is_proven") & (pl.col("n_proven") == 1)) | only_cause
    # An armed entry is inferred from the absence of calls, so every call must be observed: also
    # when it began, which a capture of chosen returns does not show.
    sees_starts = evidence.calls.filter(pl.col("leaf") != VP_ENTER)["start_ns"].count() > 0
    armed_fits = pl.col("overlaps") & ~pl.col("has_rival") & pl.col("is_observed") & sees_starts
    return best.filter(pl.col("grade") < BOUNDS_UNKNOWN).select(
        row="attempt",
        call_cause=pl.when(sure & (armed_fits | ~pl.col("is_armed_entry")))
        .then("cause")
        .otherwise(pl.lit(CLOCK_TOO_COARSE)),
    )


def confidence_of_call() -> pl.Expr:
    """Confidence in the best candidate of an attempt, from its row and ``lossy``.

    A call that surely held the lock is weak evidence beside an armed entry that may have held
    it: which of the two the attempt met is not shown, but calls are more frequent.
    """
    only_cause = pl.col("n_causes_of") == 1
    armed_fits = pl.col("is_armed") & (pl.col("grade") == HELD_TO_END) & (pl.col("miss_ns") == 0)
    return (
        pl.when(pl.col("is_proven") & only_cause & ~pl.col("lossy"))
        .then(pl.lit("proof"))
        .when((pl.col("is_proven") | armed_fits) & only_cause)
        .then(pl.lit("strong"))
        .otherwise(pl.lit("weak"))
    )


# TDH.VP.ENTER is called by tdx_vcpu_run: Linux 6.16 arch/x86/kvm/vmx/tdx.c.
_VCPU_RUN: Final = "tdx_vcpu_run"
_MAX_PROBES_NAMED: Final = 3

_ADVICE: Final = {
    "entry_probes": "probe entries too, not only returns: without its start nothing overlaps it",
    "arguments": "let the probes fetch td, gpa, level and page: the holder must be on the same",
    "lost_events": "record with a larger buffer: the holder may be among the events lost here",
    "trace_edge": "record for longer: the holder's call may reach beyond the edge of the trace",
    "generation": "say --module VERSION or --generation A, B or C: they give different answers",
    "clock": "record with a clock of nanoseconds (trace_clock mono): several calls may overlap",
    "holder": "nobody fits although the calls that could hold it were probed",
}
_KEPT_OUT: Final = (
    "host priority kept the guest out after the first try: record every leaf that works on an "
    "SEPT entry (probe __seamcall and __seamcall_ret), a host call held it"
)


def reasons(
    evidence: BusyEvidence, call_cause: pl.DataFrame, ranked: pl.DataFrame, tries: pl.DataFrame
) -> pl.DataFrame:
    """Return for each attempt why it stays unexplained, if it does.

    Args:
        evidence: The attempts of one source.
        call_cause: Their causes (:func:`cause_from_calls`).
        ranked: Their candidates (:func:`rank_candidates`).
        tries: Which of them a guest can have made busy (:func:`~.guests.tries_on_entries`).

    Returns:
        Columns row, lacks (Enum of LACKS) and advice.
    """
    facts = _facts(evidence, call_cause, ranked, tries)
    timed = pl.col("start_ns").is_not_null()
    lost = pl.col("lossy") | (pl.col("doubtful") & pl.lit(evidence.lossy.any()))
    reason = (
        pl.when(~timed & ~pl.col("entries"))
        .then(pl.lit("entry_probes"))
        .when(~timed)
        .then(pl.lit("lost_events"))
        .when(_lacks_operands(facts))
        .then(pl.lit("arguments"))
        .when(pl.col("call_cause") == GENERATIONS_DISAGREE)
        .then(pl.lit("generation"))
        .when(lost)
        .then(pl.lit("lost_events"))
        .when("doubtful")
        .then(pl.lit("trace_edge"))
        .when("disagree")
        .then(pl.lit("generation"))
        .when("kept_out")
        .then(pl.lit("holder"))
        .when((pl.col("missing") != "") & (pl.col("call_cause") != CLOCK_TOO_COARSE))
        .then(pl.lit("holder_probes"))
        .when(pl.col("call_cause") == CLOCK_TOO_COARSE)
        .then(pl.lit("clock"))
        .otherwise(pl.lit("holder"))
    )
    probe = pl.format("probe {} too: no call of it was seen, and it may hold this", "missing")
    advice = pl.col("lacks").replace_strict(_ADVICE, default=None, return_dtype=pl.String)
    return facts.with_columns(lacks=reason).select(
        "row",
        pl.col("lacks").cast(pl.Enum(LACKS)),
        advice=pl.when(pl.col("lacks") == "holder_probes")
        .then(probe)
        .when((pl.col("lacks") == "holder") & pl.col("kept_out"))
        .then(pl.lit(_KEPT_OUT))
        .otherwise(advice),
    )


def _facts(
    evidence: BusyEvidence, call_cause: pl.DataFrame, ranked: pl.DataFrame, tries: pl.DataFrame
) -> pl.DataFrame:
    """Attempts with what the capture shows of each, one row per attempt."""
    rows = evidence.busy.attempts.unique("row", keep="first", maintain_order=True)
    # Not armed entries: a longer trace would not show whether one was armed.
    unsure = (pl.col("grade") == BOUNDS_UNKNOWN) & ~pl.col("is_armed")
    doubtful = ranked.filter(unsure).select(row="attempt").unique()
    operands = evidence.calls[rows["row"]].select("start_ns", "td_id", "gpa", "vp_id", *PAGES)
    entries = evidence.calls.group_by("leaf").agg(entries=pl.col("start_ns").is_not_null().any())
    locks = rows["lock"].drop_nulls().unique()
    missing = {str(lock): _unprobed(evidence, str(lock)) for lock in locks}
    named = pl.col("lock").replace_strict(missing, default="", return_dtype=pl.String)
    return (
        pl.concat([rows, operands], how="horizontal")
        .join(call_cause, on="row", how="left", maintain_order="left")
        .join(entries, on="leaf", how="left", maintain_order="left")
        .join(_shut_out(tries), on="row", how="left", maintain_order="left")
        .with_columns(
            # Only where no host call fits does it matter what a guest can have done.
            pl.col("disagree", "kept_out").fill_null(False)
            & (pl.col("call_cause") == NO_CANDIDATE),
            lossy=evidence.lossy.gather(rows["row"]),
            doubtful=pl.col("row").is_in(doubtful["row"].implode()),
            missing=pl.when(pl.col("lock").is_null())
            .then(pl.lit(_entry_probe(evidence)))
            .otherwise(named),
        )
    )


def _shut_out(tries: pl.DataFrame) -> pl.DataFrame:
    """Columns row, disagree and kept_out: no guest can have held the entry for so long."""
    return tries.select("row", "disagree", kept_out=~pl.col("by_guest") & pl.col("is_late"))


def _lacks_operands(rows: pl.DataFrame) -> pl.Expr:
    """Whether the operands that identify the attempt's lock were not captured."""
    missing = pl.lit(False)
    for scope in rows["scope"].drop_nulls().unique():
        columns = keys.required_columns(str(scope))
        if not keys.is_named(str(scope)):
            missing |= pl.col("scope") == scope
        elif columns:
            without = pl.any_horizontal(pl.col(c).is_null() for c in columns)
            missing |= (pl.col("scope") == scope) & without
    return missing.fill_null(False)


def _unprobed(evidence: BusyEvidence, lock: str) -> str:
    """Names of probes on leaves that can hold the lock and of which no call was recorded."""
    attempting = evidence.busy.attempts.filter(pl.col("lock") == lock)
    leaves = attempting["leaf"].unique().to_numpy().astype("intp")
    holding = np.any(
        [
            conflicts.holders(leaves, evidence.mask)
            for scope in attempting["scope"].unique()
            for conflicts in lock_conflicts(lock, scope)
        ],
        axis=0,
    )
    seen = set(evidence.calls["leaf"].unique())
    wrappers = dict(leaf_table().select("leaf", "wrappers").iter_rows())
    names = [
        _VCPU_RUN if leaf == VP_ENTER else wrappers[leaf][0]
        for leaf in wrappers
        if holding[leaf] and leaf not in seen and (leaf == VP_ENTER or wrappers[leaf])
    ]
    return ", ".join(names[:_MAX_PROBES_NAMED]) + (", …" if len(names) > _MAX_PROBES_NAMED else "")


def _entry_probe(evidence: BusyEvidence) -> str:
    return "" if VP_ENTER in set(evidence.calls["leaf"].unique()) else _VCPU_RUN
