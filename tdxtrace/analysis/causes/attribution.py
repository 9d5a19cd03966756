"""What a capture lacks to explain a busy attempt, and what to record instead."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.arrays import Index
from tdxtrace.analysis.causes import keys
from tdxtrace.analysis.causes.conflicts import lock_conflicts
from tdxtrace.analysis.causes.evidence import BusyEvidence
from tdxtrace.analysis.causes.ranking import Ranking
from tdxtrace.analysis.loops.ranking import (
    BOUNDS_UNKNOWN,
    CLOCK_TOO_COARSE,
    GENERATIONS_DISAGREE,
    NO_CANDIDATE,
)
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tables.causes import LACKS
from tdxtrace.tdx.leaves import leaf_table
from tdxtrace.tdx.wrappers import PAGES

# TDH.VP.ENTER is called by tdx_vcpu_run: Linux 6.16 arch/x86/kvm/vmx/tdx.c.
_VCPU_RUN: Final = "tdx_vcpu_run"
_MAX_PROBES_NAMED: Final = 3

_ADVICE: Final = {
    "entry_probes": "probe entries too: without its start, no overlapping call can be found",
    "arguments": "let the probes fetch td, gpa, level and page: they must be equal to the holder's",
    "lost_events": "record with a larger buffer: the holder may be among the events lost here",
    "trace_edge": "record for longer: the holder's call may reach beyond the edge of the trace",
    "generation": "name the module (--module or --generation): A, B and C give different causes",
    "clock": "record with a nanosecond clock (trace_clock mono): with this one several calls fit",
    "holder": "no recorded call fits, although every possible holder was probed",
}
_GUEST_EXCLUDED: Final = (
    "a host call held it, as host priority excludes the guest after the first try: record every "
    "leaf that uses an SEPT entry (probe __seamcall and __seamcall_ret)"
)


def reasons(
    evidence: BusyEvidence, ranking: Ranking, places: Index, tries: pl.DataFrame
) -> pl.DataFrame:
    """Return why the cause of each attempt could not be determined.

    Args:
        evidence: The attempts of one source.
        ranking: Their candidates.
        places: Indices into the attempts of ``ranking``, ascending.
        tries: Attempts that a guest may have made busy (:func:`~.guests.tries_on_entries`).

    Returns:
        Columns lacks (Enum of LACKS) and advice, in the order of ``places``.
    """
    facts = _facts(evidence, ranking, places, tries)
    timed = pl.col("start_ns").is_not_null()
    lost = pl.col("lossy") | (pl.col("doubtful") & pl.lit(evidence.lossy.any()))
    reason = (
        pl.when(~timed & ~pl.col("entries"))
        .then(pl.lit("entry_probes"))
        .when(~timed)
        .then(pl.lit("lost_events"))
        .when(_lacks_operands(facts))
        .then(pl.lit("arguments"))
        .when(pl.col("by_calls") == GENERATIONS_DISAGREE)
        .then(pl.lit("generation"))
        .when(lost)
        .then(pl.lit("lost_events"))
        .when("doubtful")
        .then(pl.lit("trace_edge"))
        .when("disagree")
        .then(pl.lit("generation"))
        .when("kept_out")
        .then(pl.lit("holder"))
        .when((pl.col("missing") != "") & (pl.col("by_calls") != CLOCK_TOO_COARSE))
        .then(pl.lit("holder_probes"))
        .when(pl.col("by_calls") == CLOCK_TOO_COARSE)
        .then(pl.lit("clock"))
        .otherwise(pl.lit("holder"))
    )
    probe = pl.format("also probe {}; they may hold this lock and were not recorded", "missing")
    advice = pl.col("lacks").replace_strict(_ADVICE, default=None, return_dtype=pl.String)
    return facts.with_columns(lacks=reason).select(
        pl.col("lacks").cast(pl.Enum(LACKS)),
        advice=pl.when(pl.col("lacks") == "holder_probes")
        .then(probe)
        .when((pl.col("lacks") == "holder") & pl.col("kept_out"))
        .then(pl.lit(_GUEST_EXCLUDED))
        .otherwise(advice),
    )


def _facts(
    evidence: BusyEvidence, ranking: Ranking, places: Index, tries: pl.DataFrame
) -> pl.DataFrame:
    """Return one row per attempt: its lock, its operands and which evidence is missing."""
    rows = evidence.busy.first_locks[places]
    call_rows = rows["row"]
    # Not armed entries: a longer trace would not show whether one was armed.
    is_uncertain = (pl.col("grade") == BOUNDS_UNKNOWN) & ~pl.col("is_armed")
    doubtful = ranking.candidates.filter(is_uncertain)["attempt"].unique()
    operands = evidence.calls.select("start_ns", "td_id", "gpa", "vp_id", *PAGES)[call_rows]
    begun = evidence.calls.filter(pl.col("start_ns").is_not_null())["leaf"].unique()
    locks = rows["lock"].drop_nulls().unique()
    missing = {str(lock): _unprobed(evidence, str(lock)) for lock in locks}
    named = pl.col("lock").replace_strict(missing, default="", return_dtype=pl.String)
    return (
        pl.concat([rows, operands], how="horizontal")
        .join(_excluded_guests(tries), on="row", how="left", maintain_order="left")
        .with_columns(
            by_calls=pl.Series(ranking.cause[places]), entries=pl.col("leaf").is_in(begun.implode())
        )
        .with_columns(
            # Whether a guest could have held the lock matters only where no host call fits.
            pl.col("disagree", "kept_out").fill_null(False) & (pl.col("by_calls") == NO_CANDIDATE),
            lossy=evidence.lossy.gather(call_rows),
            doubtful=pl.col("row").is_in(doubtful.implode()),
            missing=pl.when(pl.col("lock").is_null())
            .then(pl.lit(_entry_probe(evidence)))
            .otherwise(named),
        )
    )


def _excluded_guests(tries: pl.DataFrame) -> pl.DataFrame:
    """Return row, disagree and kept_out (no guest can have held the entry for that long)."""
    return tries.select("row", "disagree", kept_out=~pl.col("by_guest") & pl.col("is_late"))


def _lacks_operands(rows: pl.DataFrame) -> pl.Expr:
    """Return whether the capture lacks operands that identify the attempt's lock."""
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
    """Return the probes for leaves that can hold the lock but have no recorded call."""
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
    recorded_leaves = evidence.leaves
    wrappers = dict(leaf_table().select("leaf", "wrappers").iter_rows())
    names = [
        _VCPU_RUN if leaf == VP_ENTER else wrappers[leaf][0]
        for leaf in wrappers
        if holding[leaf] and leaf not in recorded_leaves and (leaf == VP_ENTER or wrappers[leaf])
    ]
    return ", ".join(names[:_MAX_PROBES_NAMED]) + (", …" if len(names) > _MAX_PROBES_NAMED else "")


def _entry_probe(evidence: BusyEvidence) -> str:
    return "" if VP_ENTER in evidence.leaves else _VCPU_RUN
