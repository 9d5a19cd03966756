"""The ``busy_causes`` and ``broken_rules`` tables, and ``cause_shares`` and ``td_conflicts``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import polars as pl

from tdxtrace.analysis.causes import attribution, guests
from tdxtrace.analysis.causes.candidates import BOUNDS_UNKNOWN
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, modes, names_of
from tdxtrace.analysis.causes.evidence import BusyEvidence
from tdxtrace.analysis.causes.mmu_lock import EXCLUDES
from tdxtrace.tables.causes import (
    BROKEN_RULES,
    BUG_RULES,
    BUSY_CAUSES,
    CAUSE_SHARES,
    CAUSES,
    CONFIDENCES,
)
from tdxtrace.tables.verdicts import TD_CONFLICTS
from tdxtrace.tdx import word
from tdxtrace.tdx.operands import resource

_WHOLE: Final = 1_000_000
# Candidates listed for an attempt beside the row of rank 1.
_MAX_OTHERS: Final = 3
_EPOCH: Final = "previous TLB epoch"


def busy_causes(sources: Iterable[BusyEvidence]) -> pl.DataFrame:
    """Find the cause of each busy attempt.

    A candidate is a call of another thread that overlaps the attempt in time, works on the
    same resource and holds a lock that excludes it, under a lock generation of the module that
    the user and the trace leave possible.  ``host_conflict`` and ``armed_entry`` are such
    calls; ``guest`` is what remains for the lock of an SEPT entry where a complete capture
    shows no call of the host; ``kernel_bug`` is a busy answer that a correct kernel never
    gets, whoever held the lock.  Everything else is ``unexplained``, with the reason.

    Clock resolution widens the test for overlap and lowers the confidence; so does a loss
    near the attempt.  A call whose start or end was lost is listed, but is never the holder.

    Args:
        sources: Evidence of each source (:func:`~.evidence.gather_evidence`).

    Returns:
        The ``busy_causes`` table, by source, seq and rank.  Every attempt that was answered
        OPERAND_BUSY, PREVIOUS_TLB_EPOCH_BUSY or SYS_BUSY has exactly one row of rank 1, so
        shares of causes sum to one.

    Sources:
        Locks and modes: ``tdxtrace.tdx.locks``; that guests take entry locks only: the same.
    """
    parts = [_answers_of_source(evidence) for evidence in sources]
    return BUSY_CAUSES.conform(pl.concat([BUSY_CAUSES.empty(), *parts]))


def broken_rules(sources: Iterable[BusyEvidence]) -> pl.DataFrame:
    """List the calls that break a rule which a correct kernel keeps.

    Args:
        sources: Evidence of each source.

    Returns:
        The ``broken_rules`` table, by source, seq and rule.  It has every rule that a call
        breaks; ``busy_causes`` names the first for a call that was busy, but for
        ``mmu_lock_excludes``: there the cause remains the call that held the lock.

    Sources:
        Of each rule: ``tdxtrace.tdx.locks.bug_rule_table``.
    """
    parts = [BROKEN_RULES.empty()]
    for evidence in sources:
        found, calls = evidence.broken, evidence.calls
        breaking = calls[found["row"]].select(
            "seq", "end_ns", "leaf", "tid", "tgid", "td_id", "gpa", "status"
        )
        other_seq = calls["seq"].gather(found["evidence"].fill_null(0))
        rows = pl.concat([breaking, found.drop("row")], how="horizontal").with_columns(
            source=pl.lit(evidence.source, pl.UInt16),
            evidence_seq=pl.when(pl.col("evidence").is_not_null()).then(other_seq),
        )
        parts.append(BROKEN_RULES.conform(rows))
    return pl.concat(parts).sort("source", "seq", "rule")


def _answers_of_source(evidence: BusyEvidence) -> pl.DataFrame:
    if evidence.busy.attempts.is_empty():
        return BUSY_CAUSES.empty()
    ranked = attribution.rank_candidates(evidence)
    call_cause = attribution.cause_from_calls(evidence, ranked)
    tries = guests.tries_on_entries(evidence)
    answers = _answers(evidence, _gather_facts(evidence, call_cause, ranked, tries)).join(
        attribution.reasons(evidence, call_cause, ranked, tries), on="row", how="left"
    )
    unexplained = pl.col("cause") == "unexplained"
    answers = answers.with_columns(
        pl.when(unexplained).then(name).alias(name) for name in ("lacks", "advice")
    )
    rest = _others(ranked, answers)
    rows = pl.concat([answers.select(_KEPT), rest], how="diagonal_relaxed").sort("row", "rank")
    return BUSY_CAUSES.conform(_described(evidence, rows))


def _gather_facts(
    evidence: BusyEvidence, call_cause: pl.DataFrame, ranked: pl.DataFrame, tries: pl.DataFrame
) -> pl.DataFrame:
    """Per attempt: its cause by host calls, its best candidate, guests inside, broken rules."""
    best = ranked.unique("attempt", keep="first", maintain_order=True).rename({"attempt": "row"})
    # That mmu_lock was not held says nothing of who held the module's lock: the overlapping call.
    bugs = (
        evidence.broken.filter(pl.col("rule") != EXCLUDES)
        .join(call_cause, on="row", how="semi")
        .sort("row", "rule")
        .unique("row", keep="first", maintain_order=True)
    )
    inside = guests.guest_holders(evidence, call_cause, ranked, tries)
    return (
        call_cause.join(best, on="row", how="left")
        .join(_tied(evidence, ranked), on="row", how="left")
        .join(inside, on="row", how="left", suffix="_inside")
        .join(bugs, on="row", how="left", suffix="_bug")
        .sort("row")
        .with_columns(lossy=evidence.lossy.gather(call_cause["row"]))
        .with_columns(
            is_bug=pl.col("rule").is_not_null(),
            by_call=pl.col("call_cause").is_in(["host_conflict", "armed_entry"]),
            by_guest=pl.col("n_inside").is_not_null(),
            fits=(pl.col("grade") < BOUNDS_UNKNOWN).fill_null(False),
        )
    )


def _answers(evidence: BusyEvidence, facts: pl.DataFrame) -> pl.DataFrame:
    """Rows of rank 1, one per attempt.  A broken rule comes before who held the lock."""
    others = guests.shows_other_holders(set(evidence.calls["leaf"].unique()))
    # After the first try host priority keeps a guest out, unless a write of the entry lost it.
    one_call = pl.col("is_inside") & ~pl.col("is_late")
    is_whole = others and not evidence.misses_holders
    by_guest = pl.when(one_call & pl.lit(is_whole)).then(pl.lit("strong"))
    one_guest = pl.col("by_guest") & (pl.col("n_inside") == 1)
    has_holder = pl.col("by_call") | (pl.col("is_bug") & pl.col("fits"))
    return facts.select(
        "row",
        "rule",
        rank=pl.lit(1, pl.UInt32),
        cause=_choose_cause("kernel_bug", "call_cause", "guest", "unexplained"),
        confidence=pl.when("is_bug")
        .then(pl.col("confidence").cast(pl.String))
        .when("by_call")
        .then(attribution.confidence_of_call())
        .when("by_guest")
        .then(by_guest.otherwise(pl.lit("weak")))
        .otherwise(pl.lit("none")),
        holder=pl.when(has_holder)
        .then("holder")
        .when("is_bug")
        .then("evidence")
        .when(one_guest)
        .then("holder_inside"),
        overlap_ns=pl.when(has_holder).then("overlap_ns").when(one_guest).then("overlap_ns_inside"),
        n_tied=pl.when(has_holder).then("n_tied").when("by_guest").then("n_inside").otherwise(1),
        lock=pl.when(has_holder).then("lock"),
        mask=pl.when(has_holder).then("mask"),
    ).with_columns(pl.col("n_tied").cast(pl.UInt32))


def _choose_cause(bug: str, call: str, guest: str, nothing: str) -> pl.Expr:
    """Cause of an attempt: of a broken rule, of host calls, a guest, or none."""
    return (
        pl.when("is_bug")
        .then(pl.lit(bug))
        .when("by_call")
        .then(call)
        .when("by_guest")
        .then(pl.lit(guest))
        .otherwise(pl.lit(nothing))
    )


_KEPT: Final = (
    *("row", "rank", "cause", "confidence", "n_tied", "holder", "overlap_ns", "lock", "mask"),
    *("rule", "lacks", "advice"),
)


def _tied(evidence: BusyEvidence, ranked: pl.DataFrame) -> pl.DataFrame:
    """Number of candidates that fit as well as the best of their attempt, and of their causes."""
    slack = evidence.busy.slack_ns
    first = pl.col("miss_ns", "grade", "cause", "is_armed").first()
    same = (
        (pl.col("grade") == pl.col("grade_best"))
        & (pl.col("cause") == pl.col("cause_best"))
        & (pl.col("miss_ns") <= pl.col("miss_ns_best") + slack)
    )
    near = pl.col("miss_ns") <= pl.col("miss_ns_best") + 2 * slack
    # Whether a call that overlaps more than it misses had the tree is a matter of latencies that
    # are estimated: beside it an armed entry is a weak answer.
    near |= pl.col("is_armed_best") & (pl.col("overlap_ns") > pl.col("miss_ns"))
    return (
        ranked.with_columns(first.over("attempt").name.suffix("_best"))
        .group_by(row="attempt")
        .agg(
            n_tied=same.sum().cast(pl.UInt32),
            n_causes_of=pl.col("cause").filter(near).n_unique(),
        )
    )


def _others(ranked: pl.DataFrame, answers: pl.DataFrame) -> pl.DataFrame:
    """Rows of rank 2 and above: candidates that are not the holder, best first."""
    taken = answers.select("row", "holder").drop_nulls()
    rest = ranked.rename({"attempt": "row"}).join(
        taken, on=["row", "holder"], how="anti", maintain_order="left"
    )
    place = pl.int_range(pl.len(), dtype=pl.UInt32).over("row")
    sure = pl.when("is_proven").then(pl.lit("strong")).otherwise(pl.lit("weak"))
    shown = rest.with_columns(rank=place + 2, confidence=sure, n_tied=pl.lit(1, pl.UInt32)).filter(
        pl.col("rank") < 2 + _MAX_OTHERS
    )
    return shown.select(name for name in _KEPT if name in shown.columns)


def _described(evidence: BusyEvidence, rows: pl.DataFrame) -> pl.DataFrame:
    """Add the columns of attempt and holder, looked up by their rows of ``calls``."""
    attempts = evidence.busy.attempts.unique("row", keep="first")
    first = attempts.select("row", first_lock="lock", every="mask")
    frame = _with_attempt_and_holder(evidence.calls, rows).join(
        first, on="row", how="left", maintain_order="left"
    )
    letters = {mask: names_of(mask) for mask in range(ALL_GENERATIONS + 1)}
    mask = pl.coalesce("mask", "every") & pl.lit(evidence.mask, pl.UInt8)
    frame = frame.with_columns(
        source=pl.lit(evidence.source, pl.UInt16),
        resource=pl.coalesce(resource(pl.col("status"), pl.col("leaf")), _epoch()),
        lock=pl.coalesce("lock", "first_lock"),
        generations=mask.replace_strict(letters, return_dtype=pl.String),
        cause=pl.col("cause").cast(pl.Enum(CAUSES)),
        confidence=pl.col("confidence").cast(pl.Enum(CONFIDENCES)),
        rule=pl.col("rule").cast(pl.Enum(BUG_RULES)),
    )
    return _with_modes(frame, mask)


def _with_attempt_and_holder(calls: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    attempt_columns = calls[rows["row"]].select(
        *("seq", "start_ns", "end_ns", "leaf", "tid", "tgid", "td_id", "vp_id", "gpa", "status")
    )
    holder_columns = calls[rows["holder"].fill_null(0)].select(
        holder_seq="seq",
        holder_leaf="leaf",
        holder_tid="tid",
        holder_td_id="td_id",
        holder_vp_id="vp_id",
    )
    known = rows["holder"].is_not_null()
    return pl.concat([rows, attempt_columns, holder_columns], how="horizontal").with_columns(
        pl.when(known).then(name).alias(name) for name in holder_columns.columns
    )


def _epoch() -> pl.Expr:
    """Name of the resource that a TRACK waits for, which has no operand id."""
    code = word.status_code(pl.col("status"))
    return pl.when(code == word.TDX_PREVIOUS_TLB_EPOCH_BUSY).then(pl.lit(_EPOCH))


def _with_modes(frame: pl.DataFrame, mask: pl.Expr) -> pl.DataFrame:
    """Add the mode in which each of the two took the lock, in the newest possible generation."""
    newest = pl.when(mask & 4 > 0).then(4).when(mask & 2 > 0).then(2).otherwise(1).cast(pl.UInt8)
    status = pl.col("status")
    operand = pl.when(word.is_busy(status)).then(word.low32(status))
    frame = frame.with_columns(newest=newest, operand_id=operand)
    for leaf, name, more in (
        ("leaf", "mode", ()),
        ("leaf", "operand_mode", ("operand_id",)),
        ("holder_leaf", "holder_mode", ()),
    ):
        frame = frame.join(
            modes(*more).rename({"mode": name, "leaf": leaf, "mask": "newest"}),
            on=["newest", leaf, "lock", *more],
            how="left",
            maintain_order="left",
        )
    # A leaf may take a lock in another mode for each of its operands.
    return frame.with_columns(mode=pl.coalesce("operand_mode", "mode"))


def cause_shares(busy_causes: pl.DataFrame) -> pl.DataFrame:
    """Count the busy attempts by leaf, resource and cause.

    Every busy attempt has one row of rank 1, so the counts of a source sum to its busy attempts
    and the shares to one exactly (largest remainder method).

    Args:
        busy_causes: The ``busy_causes`` table, or a part of it with its rows of rank 1.

    Returns:
        The ``cause_shares`` table, by source, largest first.

    Raises:
        TableError: If the argument lacks a column or has one of another type.
    """
    answers = BUSY_CAUSES.conform(busy_causes).filter(pl.col("rank") == 1)
    counts = answers.group_by("source", "leaf", "resource", "cause").agg(
        n_busy=pl.len().cast(pl.UInt64),
        n_sure=pl.col("confidence").is_in(["proof", "strong"]).sum().cast(pl.UInt64),
    )
    ordered = counts.sort(
        "source",
        "n_busy",
        "leaf",
        "resource",
        "cause",
        descending=[False, True, False, False, False],
    )
    parts = ordered.with_columns(n_all=pl.col("n_busy").sum().over("source"))
    exact = pl.col("n_busy") * _WHOLE
    parts = parts.with_columns(floor=exact // pl.col("n_all"), remainder=exact % pl.col("n_all"))
    missing = _WHOLE - pl.col("floor").sum().over("source").cast(pl.Int64)
    place = pl.col("remainder").rank("ordinal", descending=True).over("source").cast(pl.Int64)
    share = pl.col("floor") + (place <= missing).cast(pl.UInt64)
    return CAUSE_SHARES.conform(parts.with_columns(share_ppm=share.cast(pl.UInt32)))


def td_conflicts(causes: pl.DataFrame) -> pl.DataFrame:
    """Count busy answers by whether their holder was of the same TD or of another one.

    Locks of one TD cannot be held for another; what TDs share is the PAMT of a 2 MB range,
    the KOT, the write-back of caches and the module as a whole (SYS_BUSY).  A guest, and an
    armed entry, that made a call busy are of the call's own TD.

    Args:
        causes: The ``busy_causes`` table; its answers (rank 1) are counted.

    Returns:
        The ``td_conflicts`` table, by source and leaf.

    Raises:
        TableError: If ``causes`` lacks a column or has one of another type.

    Sources:
        Scopes of locks: intel/tdx-module 1.5 (tdx/data/locks.csv); the range of a PAMT lock across
        TDs: R. Edgecombe, Dynamic PAMT v3, 2025-09.
    """
    answers = BUSY_CAUSES.conform(causes).filter(pl.col("rank") == 1)
    own = pl.col("cause").is_in(["guest", "armed_entry"])
    same = own | (pl.col("holder_td_id") == pl.col("td_id")).fill_null(False)
    other = ~own & (pl.col("holder_td_id") != pl.col("td_id")).fill_null(False)
    found = (
        answers.group_by("source", "leaf", "resource")
        .agg(
            n_busy=pl.len().cast(pl.UInt64),
            n_same_td=same.sum().cast(pl.UInt64),
            n_other_td=other.sum().cast(pl.UInt64),
            n_unknown=(~same & ~other).sum().cast(pl.UInt64),
            n_tds=pl.col("td_id").drop_nulls().n_unique().cast(pl.UInt32),
        )
        .sort("source", "leaf", "resource")
    )
    return TD_CONFLICTS.conform(found)
