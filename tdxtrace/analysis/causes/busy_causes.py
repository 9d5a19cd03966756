"""The tables ``busy_causes``, ``broken_rules``, ``cause_shares`` and ``td_conflicts``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.causes import attribution, guests
from tdxtrace.analysis.causes.clock_drift import is_near_armed_entry
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, ENTRY, TREE, mode_of, names_of
from tdxtrace.analysis.causes.evidence import BusyEvidence
from tdxtrace.analysis.causes.mmu_lock import EXCLUDES
from tdxtrace.analysis.causes.ranking import Ranking, is_proven, rank_candidates
from tdxtrace.analysis.loops.ranking import (
    ARMED_ENTRY,
    BOUNDS_UNKNOWN,
    HELD_TO_END,
    HOST_CONFLICT,
)
from tdxtrace.tables.causes import (
    BROKEN_RULES,
    BUSY_CAUSES,
    CAUSE_SHARES,
    CAUSES,
    CONFIDENCES,
)
from tdxtrace.tables.verdicts import TD_CONFLICTS
from tdxtrace.tdx import word
from tdxtrace.tdx.operands import resource

_WHOLE: Final = 1_000_000
# Maximum number of candidates listed for an attempt in addition to the row of rank 1.
_MAX_OTHERS: Final = 3
_EPOCH: Final = "previous TLB epoch"


def busy_causes(sources: Iterable[BusyEvidence]) -> pl.DataFrame:
    """Find the cause of each busy attempt.

    A candidate is a call of another thread that overlaps the attempt in time, works on the
    same resource and holds a lock that excludes it, under a lock generation of the module that
    neither the user nor the trace rules out.  ``host_conflict`` and ``armed_entry`` are such
    calls; ``guest`` is inferred for the lock of an SEPT entry if a complete capture shows no
    host call that held it; ``kernel_bug`` is a busy answer that a correct kernel never gets,
    whatever held the lock.  Everything else is ``unexplained``, with the reason.

    A coarse clock widens the test for overlap and lowers the confidence; so does a loss near the
    attempt.  A call whose start or end was lost is listed, but is never reported as the holder.

    Args:
        sources: Evidence of each source (:func:`~.evidence.gather_evidence`).

    Returns:
        The ``busy_causes`` table, by source, seq and rank.  Every attempt that was answered
        OPERAND_BUSY, PREVIOUS_TLB_EPOCH_BUSY or SYS_BUSY has exactly one row of rank 1, so
        shares of causes sum to one.

    Sources:
        Locks and modes, and that guests take entry locks only: ``tdxtrace.tdx.locks``.
    """
    return BUSY_CAUSES.conform(scan_busy_causes(sources).collect())


def scan_busy_causes(sources: Iterable[BusyEvidence]) -> pl.LazyFrame:
    """Return a lazy ``busy_causes`` table that computes only the selected columns.

    Args:
        sources: As for :func:`busy_causes`.
    """
    parts = [
        _described(evidence, _answers(evidence))
        for evidence in sources
        if not evidence.busy.attempts.is_empty()
    ]
    return pl.concat([BUSY_CAUSES.empty().lazy(), *parts])


def broken_rules(sources: Iterable[BusyEvidence]) -> pl.DataFrame:
    """Return the calls that break a rule which every correct kernel keeps.

    Args:
        sources: Evidence of each source.

    Returns:
        The ``broken_rules`` table, by source, seq and rule.  It lists every rule that a call
        breaks; ``busy_causes`` has only the first rule of a busy call, and never
        ``mmu_lock_excludes``: there the cause is still the call that held the lock.

    Sources:
        ``tdxtrace.tdx.locks.bug_rule_table`` has the source of each rule.
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


def _answers(evidence: BusyEvidence) -> pl.DataFrame:
    """Return the rows of one source for all ranks, sorted by row and rank."""
    ranking = rank_candidates(evidence)
    tries = guests.tries_on_entries(evidence)
    answers = _first_answers(evidence, _facts(evidence, ranking, tries))
    unexplained = np.flatnonzero((answers["cause"] == "unexplained").to_numpy())
    advice = attribution.reasons(evidence, ranking, unexplained, tries)
    place = np.full(answers.height, len(unexplained))
    place[unexplained] = np.arange(len(unexplained))
    nothing = pl.DataFrame({name: [None] for name in advice.columns}, schema=advice.schema)
    advice = pl.concat([advice, nothing])[place]
    rows = pl.concat([answers, advice], how="horizontal")
    rows = pl.concat([rows, _others(evidence, ranking, answers)], how="diagonal")
    # Both parts are sorted by row, so a stable sort keeps rank 1 first.
    return rows[np.argsort(rows["row"].to_numpy(), kind="stable")]


def _facts(evidence: BusyEvidence, ranking: Ranking, tries: pl.DataFrame) -> pl.DataFrame:
    """Return per attempt: cause by host calls, best candidate, guests inside, broken rule."""
    rows = pl.Series("row", ranking.attempts)
    # A broken mmu_lock rule is not the cause: the overlapping call held the module's lock.
    bugs = (
        evidence.broken.filter(pl.col("rule") != EXCLUDES, pl.col("row").is_in(rows.implode()))
        .sort("row", "rule")
        .unique("row", keep="first", maintain_order=True)
    )
    inside = guests.guest_holders(evidence, ranking, tries)
    first = evidence.busy.first_locks
    facts = ranking.best.with_columns(
        rows,
        lossy=evidence.lossy.gather(rows),
        by_calls=pl.Series(ranking.cause),
        n_tied=pl.Series(ranking.n_tied),
        is_only_cause=pl.Series(ranking.is_only_cause),
        first_lock=first["lock"],
        every=first["mask"],
        is_doubted=_uncertain_order(evidence, ranking),
    )
    return (
        facts.join(inside, on="row", how="left", suffix="_inside", maintain_order="left")
        .join(bugs, on="row", how="left", maintain_order="left")
        .with_columns(
            is_bug=pl.col("rule").is_not_null(),
            by_call=pl.col("by_calls").is_in([HOST_CONFLICT, ARMED_ENTRY]),
            by_guest=pl.col("n_inside").is_not_null(),
            fits=(pl.col("grade") < BOUNDS_UNKNOWN).fill_null(False),
        )
    )


def _first_answers(evidence: BusyEvidence, facts: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of rank 1, one per attempt; a broken rule has priority over a holder."""
    others = guests.shows_other_holders(evidence.leaves)
    # After the first try host priority keeps a guest out, unless a write of the entry cleared it.
    one_call = pl.col("is_inside") & ~pl.col("is_late")
    is_whole = others and not evidence.misses_holders
    by_guest = (
        pl.when(one_call & pl.lit(is_whole)).then(_category("strong")).otherwise(_category("weak"))
    )
    one_guest = pl.col("by_guest") & (pl.col("n_inside") == 1)
    has_holder = pl.col("by_call") | (pl.col("is_bug") & pl.col("fits"))
    return facts.select(
        "row",
        rank=pl.lit(1, pl.UInt32),
        cause=_cause(),
        confidence=pl.when("is_bug")
        .then("confidence")
        .when("by_call")
        .then(_confidence_of_call(evidence.busy.slack_ns, evidence.clock_is_global))
        .when("by_guest")
        .then(by_guest)
        .otherwise(_category("none")),
        holder=pl.when(has_holder)
        .then("holder")
        .when("is_bug")
        .then("evidence")
        .when(one_guest)
        .then("holder_inside"),
        overlap_ns=pl.when(has_holder).then("overlap_ns").when(one_guest).then("overlap_ns_inside"),
        n_tied=pl.when(has_holder)
        .then("n_tied")
        .when("by_guest")
        .then("n_inside")
        .otherwise(pl.lit(1, pl.UInt32)),
        lock=pl.when(has_holder).then("lock").otherwise("first_lock"),
        mask=pl.when(has_holder).then("mask").otherwise("every"),
        rule="rule",
    )


def _cause() -> pl.Expr:
    """Return the cause of an attempt, by priority: broken rule, host call, guest, unexplained."""
    return (
        pl.when("is_bug")
        .then(_category("kernel_bug", _CAUSE))
        .when(pl.col("by_calls") == ARMED_ENTRY)
        .then(_category("armed_entry", _CAUSE))
        .when("by_call")
        .then(_category("host_conflict", _CAUSE))
        .when("by_guest")
        .then(_category("guest", _CAUSE))
        .otherwise(_category("unexplained", _CAUSE))
    )


def _confidence_of_call(slack_ns: int, clock_is_global: bool) -> pl.Expr:
    """Return the confidence in the best candidate of an attempt.

    A call that certainly held the lock is only weak evidence if an armed entry may have held it
    too: the trace does not show which of the two blocked the attempt, but calls are more frequent.
    Timestamps do not prove an overlap if the clocks of two CPUs may differ.
    """
    only_cause, proven = pl.col("is_only_cause"), is_proven(slack_ns)
    is_certain = proven & only_cause & ~pl.col("is_doubted")
    armed_fits = pl.col("is_armed") & (pl.col("grade") == HELD_TO_END) & (pl.col("core_ns") >= 0)
    return (
        pl.when(is_certain & ~pl.col("lossy") & pl.lit(clock_is_global))
        .then(_category("proof"))
        .when(is_certain | (armed_fits & only_cause))
        .then(_category("strong"))
        .otherwise(_category("weak"))
    )


def _uncertain_order(evidence: BusyEvidence, ranking: Ranking) -> pl.Series:
    """Return whether another holder is as plausible as the best, which certainly overlaps.

    For an SEPT entry it may be a guest, if a level was not recorded or CPU clocks may differ;
    for the tree it may be an armed entry, if CPU clocks may differ.
    """
    lock, level = ranking.best["lock"], evidence.calls["level"]
    own, held = (level.gather(rows) for rows in (ranking.attempts, ranking.best["holder"]))
    of_entry = lock == ENTRY
    if evidence.clock_is_global:
        return (of_entry & (own.is_null() | held.is_null())).fill_null(False)
    may_be_armed_entry = is_near_armed_entry(evidence.calls, pl.Series(ranking.attempts))
    return (of_entry | ((lock == TREE) & may_be_armed_entry)).fill_null(False)


_CAUSE: Final = pl.Enum(CAUSES)
_CONFIDENCE: Final = pl.Enum(CONFIDENCES)


def _category(name: str, kind: pl.Enum = _CONFIDENCE) -> pl.Expr:
    return pl.lit(name, kind)


def _others(evidence: BusyEvidence, ranking: Ranking, answers: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of rank 2 and above: candidates other than the holder, best first."""
    n = ranking.first[1:] - ranking.first[:-1]
    holder = np.repeat(answers["holder"].cast(pl.Int64).fill_null(-1).to_numpy(), n)
    is_other = ranking.candidates["holder"].to_numpy() != holder
    before = np.cumsum(is_other) - is_other
    place = before - np.repeat(np.append(before, 0)[ranking.first[:-1]], n)
    shown = np.flatnonzero(is_other & (place < _MAX_OTHERS))
    rows = ranking.candidates[shown]
    confidence = (
        pl.when(is_proven(evidence.busy.slack_ns))
        .then(_category("strong"))
        .otherwise(_category("weak"))
    )
    is_armed = pl.when("is_armed").then(_category("armed_entry", _CAUSE))
    return rows.select(
        row="attempt",
        rank=pl.Series(place[shown] + 2, dtype=pl.UInt32),
        cause=is_armed.otherwise(_category("host_conflict", _CAUSE)),
        confidence=confidence,
        holder="holder",
        overlap_ns="overlap_ns",
        n_tied=pl.lit(1, pl.UInt32),
        lock="lock",
        mask="mask",
    )


_ATTEMPT_COLUMNS: Final = (
    *("seq", "start_ns", "end_ns", "leaf", "tid", "tgid", "td_id", "vp_id", "gpa"),
)
_HOLDER_COLUMNS: Final = ("seq", "leaf", "tid", "td_id", "vp_id")


def _described(evidence: BusyEvidence, rows: pl.DataFrame) -> pl.LazyFrame:
    """Add the columns of attempt and holder, looked up in ``calls`` by row."""
    calls = evidence.calls

    def of(name: str, row: str = "row") -> pl.Expr:
        return pl.lit(calls[name]).gather(pl.col(row))

    letters = {mask: names_of(mask) for mask in range(ALL_GENERATIONS + 1)}
    mask = pl.col("mask") & pl.lit(evidence.mask, pl.UInt8)
    newest = pl.when(mask & 4 > 0).then(4).when(mask & 2 > 0).then(2).otherwise(1)
    leaf, status, lock = of("leaf"), of("status"), pl.col("lock")
    operand = pl.when(word.is_busy(status)).then(word.low32(status))
    # A leaf may take the same lock in different modes for different operands.
    mode = pl.coalesce(mode_of(newest, leaf, lock, operand), mode_of(newest, leaf, lock))
    code = word.status_code(status)
    epoch = pl.when(code == word.TDX_PREVIOUS_TLB_EPOCH_BUSY).then(pl.lit(_EPOCH))
    attempt = {name: of(name) for name in _ATTEMPT_COLUMNS}
    holder = {f"holder_{name}": of(name, "holder") for name in _HOLDER_COLUMNS}
    answer_columns = (
        "rank",
        "cause",
        "confidence",
        "n_tied",
        "overlap_ns",
        "rule",
        "lacks",
        "advice",
    )
    query = rows.lazy().select(
        *answer_columns,
        source=pl.lit(evidence.source, pl.UInt16),
        **attempt,
        **holder,
        status=status,
        resource=pl.coalesce(resource(status, leaf), epoch),
        lock=lock.cast(pl.String),
        mode=mode,
        holder_mode=mode_of(newest, of("leaf", "holder"), lock),
        generations=mask.replace_strict(letters, return_dtype=pl.String),
    )
    return query.select(BUSY_CAUSES.schema.names())


def cause_shares(busy_causes: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """Count the busy attempts by leaf, resource and cause.

    Every busy attempt has one row of rank 1, so the counts of a source sum to its busy attempts
    and the shares to one exactly (largest remainder method).

    Args:
        busy_causes: The ``busy_causes`` table or a lazy query of it; only rows of rank 1 are
            used.

    Returns:
        The ``cause_shares`` table, by source, largest first.

    Raises:
        TableError: If the argument lacks a column or has one of another type.
    """
    needed = ("source", "rank", "leaf", "resource", "cause", "confidence")
    answers = BUSY_CAUSES.pick(busy_causes, *needed).filter(pl.col("rank") == 1)
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


def td_conflicts(causes: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """Count busy answers whose holder belongs to the same TD, another TD or an unknown one.

    A call for one TD never holds the locks of another TD; TDs share only the PAMT of a 2 MB
    range, the KOT, the write-back of caches and the module as a whole (SYS_BUSY).  A guest or an
    armed entry that made a call busy belongs to the TD of that call.

    Args:
        causes: The ``busy_causes`` table or a lazy query of it; only rows of rank 1 are counted.

    Returns:
        The ``td_conflicts`` table, by source and leaf.

    Raises:
        TableError: If ``causes`` lacks a column or has one of another type.

    Sources:
        Scopes of locks: intel/tdx-module 1.5 (tdx/data/locks.csv); the range of a PAMT lock across
        TDs: R. Edgecombe, Dynamic PAMT v3, 2025-09.
    """
    needed = ("source", "rank", "leaf", "resource", "cause", "td_id", "holder_td_id")
    answers = BUSY_CAUSES.pick(causes, *needed).filter(pl.col("rank") == 1)
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
