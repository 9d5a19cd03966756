"""Busy causes: who made each SEAMCALL busy, by which lock of which module generation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import polars as pl

from tdxtrace.analysis.causes import judgement, lacking
from tdxtrace.analysis.causes.candidates import UNCERTAIN
from tdxtrace.analysis.causes.conflicts import EVERY, modes, names_of
from tdxtrace.analysis.causes.scene import Scene
from tdxtrace.tables.causes import BROKEN_RULES, BUG_RULES, BUSY_CAUSES, CAUSES, CONFIDENCES
from tdxtrace.tdx import word
from tdxtrace.tdx.operands import resource

# Candidates shown for an attempt beside the answer.
_OTHERS: Final = 3
_EPOCH: Final = "previous TLB epoch"


def busy_causes(scenes: Iterable[Scene]) -> pl.DataFrame:
    """Say who made each attempt busy.

    A candidate is a call of another thread that overlaps the attempt in time, works on the
    same thing and holds a lock that excludes it, under a lock generation of the module that
    the user and the trace leave possible.  ``host_conflict`` and ``armed_entry`` are such
    calls; ``guest`` is what remains for the lock of an SEPT entry where a complete capture
    shows no call of the host; ``kernel_bug`` is a busy answer that a correct kernel never
    gets, whoever held the lock.  Everything else is ``unexplained``, with the reason.

    Clock resolution widens the test for overlap and lowers the confidence; so does a loss
    near the attempt.  A call whose start or end was lost is listed, but is never an answer.

    Args:
        scenes: One per source (:func:`~.scene.scenes`).

    Returns:
        The ``busy_causes`` table, by source, seq and rank.  Every attempt that was answered
        OPERAND_BUSY, PREVIOUS_TLB_EPOCH_BUSY or SYS_BUSY has exactly one row of rank 1, so
        shares of causes sum to one.

    Sources:
        Locks and modes: ``tdxtrace.tdx.locks``; that guests take entry locks only: the same.
    """
    parts = [_of_source(scene) for scene in scenes]
    return BUSY_CAUSES.conform(pl.concat([BUSY_CAUSES.empty(), *parts]))


def broken_rules(scenes: Iterable[Scene]) -> pl.DataFrame:
    """List the calls that break a rule which a correct kernel keeps.

    Args:
        scenes: One per source.

    Returns:
        The ``broken_rules`` table, by source, seq and rule.  It has every rule that a call
        breaks; ``busy_causes`` names the first for a call that was busy.

    Sources:
        Of each rule: ``tdxtrace.tdx.bug_rules.bug_rule_table``.
    """
    parts = [BROKEN_RULES.empty()]
    for scene in scenes:
        found, done = scene.broken, scene.done
        calls = done[found["row"]].select(
            "seq", "end_ns", "leaf", "tid", "tgid", "td_id", "gpa", "status"
        )
        evidence = done["seq"].gather(found["evidence"].fill_null(0))
        rows = pl.concat([calls, found.drop("row")], how="horizontal").with_columns(
            source=pl.lit(scene.source, pl.UInt16),
            evidence_seq=pl.when(pl.col("evidence").is_not_null()).then(evidence),
        )
        parts.append(BROKEN_RULES.conform(rows))
    return pl.concat(parts).sort("source", "seq", "rule")


def _of_source(scene: Scene) -> pl.DataFrame:
    if scene.asked.attempts.is_empty():
        return BUSY_CAUSES.empty()
    order = judgement.ranked(scene)
    told = judgement.causes_of(scene, order)
    answers = _answers(scene, _gathered(scene, told, order)).join(
        lacking.reasons(scene, told, order), on="row", how="left"
    )
    unexplained = pl.col("cause") == "unexplained"
    answers = answers.with_columns(
        pl.when(unexplained).then(name).alias(name) for name in ("lacks", "advice")
    )
    rest = _others(order, answers)
    rows = pl.concat([answers.select(_KEPT), rest], how="diagonal_relaxed").sort("row", "rank")
    return BUSY_CAUSES.conform(_described(scene, rows))


def _gathered(scene: Scene, told: pl.DataFrame, order: pl.DataFrame) -> pl.DataFrame:
    """What is known of each attempt: what calls tell, the best of them, guests, broken rules."""
    best = order.unique("attempt", keep="first", maintain_order=True).rename({"attempt": "row"})
    bugs = (
        scene.broken.join(told, on="row", how="semi")
        .sort("row", "rule")
        .unique("row", keep="first", maintain_order=True)
    )
    guests = judgement.guests_of(scene, told, order)
    return (
        told.join(best, on="row", how="left")
        .join(_tied(scene, order), on="row", how="left")
        .join(guests, on="row", how="left", suffix="_inside")
        .join(bugs, on="row", how="left", suffix="_bug")
        .sort("row")
        .with_columns(lossy=scene.lossy.gather(told["row"]))
        .with_columns(
            is_bug=pl.col("rule").is_not_null(),
            by_call=pl.col("told").is_in(["host_conflict", "armed_entry"]),
            by_guest=pl.col("n_inside").is_not_null(),
            fits=(pl.col("grade") < UNCERTAIN).fill_null(False),
        )
    )


def _answers(scene: Scene, known: pl.DataFrame) -> pl.DataFrame:
    """The row of rank 1 of each attempt.  A broken rule comes before who held the lock."""
    zaps = judgement.shows_zaps(set(scene.done["leaf"].unique()))
    by_guest = pl.when(pl.col("is_inside") & pl.lit(zaps)).then(pl.lit("strong"))
    one_guest = pl.col("by_guest") & (pl.col("n_inside") == 1)
    held = pl.col("by_call") | (pl.col("is_bug") & pl.col("fits"))
    return known.select(
        "row",
        "rule",
        rank=pl.lit(1, pl.UInt32),
        cause=_first("kernel_bug", "told", "guest", "unexplained"),
        confidence=pl.when("is_bug")
        .then(pl.col("confidence").cast(pl.String))
        .when("by_call")
        .then(judgement.confidence_of_call())
        .when("by_guest")
        .then(by_guest.otherwise(pl.lit("weak")))
        .otherwise(pl.lit("none")),
        holder=pl.when(held)
        .then("holder")
        .when("is_bug")
        .then("evidence")
        .when(one_guest)
        .then("holder_inside"),
        overlap_ns=pl.when(held).then("overlap_ns").when(one_guest).then("overlap_ns_inside"),
        n_tied=pl.when(held).then("n_tied").when("by_guest").then("n_inside").otherwise(1),
        lock=pl.when(held).then("lock"),
        mask=pl.when(held).then("mask"),
    ).with_columns(pl.col("n_tied").cast(pl.UInt32))


def _first(bug: str, call: str, guest: str, nothing: str) -> pl.Expr:
    """Which cause an attempt has: a broken rule's, what calls tell, a guest's, or none."""
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


def _tied(scene: Scene, order: pl.DataFrame) -> pl.DataFrame:
    """How many candidates fit as well as the best of their attempt, and of how many causes."""
    slack = scene.asked.slack_ns
    first = pl.col("short_ns", "grade", "cause").first().over("attempt").name.suffix("_best")
    same = (
        (pl.col("grade") == pl.col("grade_best"))
        & (pl.col("cause") == pl.col("cause_best"))
        & (pl.col("short_ns") <= pl.col("short_ns_best") + slack)
    )
    near = pl.col("short_ns") <= pl.col("short_ns_best") + 2 * slack
    return (
        order.with_columns(first)
        .group_by(row="attempt")
        .agg(
            n_tied=same.sum().cast(pl.UInt32),
            n_causes_of=pl.col("cause").filter(near).n_unique(),
        )
    )


def _others(order: pl.DataFrame, answers: pl.DataFrame) -> pl.DataFrame:
    """Candidates that are not the answer, best first."""
    taken = answers.select("row", "holder").drop_nulls()
    rest = order.rename({"attempt": "row"}).join(
        taken, on=["row", "holder"], how="anti", maintain_order="left"
    )
    place = pl.int_range(pl.len(), dtype=pl.UInt32).over("row")
    sure = pl.when("is_proven").then(pl.lit("strong")).otherwise(pl.lit("weak"))
    shown = rest.with_columns(rank=place + 2, confidence=sure, n_tied=pl.lit(1, pl.UInt32)).filter(
        pl.col("rank") < 2 + _OTHERS
    )
    return shown.select(name for name in _KEPT if name in shown.columns)


def _described(scene: Scene, rows: pl.DataFrame) -> pl.DataFrame:
    """Attempt and holder in full, by the rows of ``done`` they stand in."""
    attempts = scene.asked.attempts.unique("row", keep="first")
    first = attempts.select("row", first_lock="lock", every="mask")
    frame = _both(scene.done, rows).join(first, on="row", how="left", maintain_order="left")
    letters = {mask: names_of(mask) for mask in range(EVERY + 1)}
    mask = pl.coalesce("mask", "every") & pl.lit(scene.mask, pl.UInt8)
    frame = frame.with_columns(
        source=pl.lit(scene.source, pl.UInt16),
        resource=pl.coalesce(resource(pl.col("status"), pl.col("leaf")), _epoch()),
        lock=pl.coalesce("lock", "first_lock"),
        generations=mask.replace_strict(letters, return_dtype=pl.String),
        cause=pl.col("cause").cast(pl.Enum(CAUSES)),
        confidence=pl.col("confidence").cast(pl.Enum(CONFIDENCES)),
        rule=pl.col("rule").cast(pl.Enum(BUG_RULES)),
    )
    return _with_modes(frame, mask)


def _both(done: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    mine = done[rows["row"]].select(
        *("seq", "start_ns", "end_ns", "leaf", "tid", "tgid", "td_id", "vp_id", "gpa", "status")
    )
    theirs = done[rows["holder"].fill_null(0)].select(
        holder_seq="seq",
        holder_leaf="leaf",
        holder_tid="tid",
        holder_td_id="td_id",
        holder_vp_id="vp_id",
    )
    known = rows["holder"].is_not_null()
    return pl.concat([rows, mine, theirs], how="horizontal").with_columns(
        pl.when(known).then(name).alias(name) for name in theirs.columns
    )


def _epoch() -> pl.Expr:
    """The name of what TRACK waits for, which no operand id has."""
    code = word.status_code(pl.col("status"))
    return pl.when(code == word.TDX_PREVIOUS_TLB_EPOCH_BUSY).then(pl.lit(_EPOCH))


def _with_modes(frame: pl.DataFrame, mask: pl.Expr) -> pl.DataFrame:
    """How each of the two took the lock, in the newest generation that is left."""
    newest = pl.when(mask & 4 > 0).then(4).when(mask & 2 > 0).then(2).otherwise(1).cast(pl.UInt8)
    frame = frame.with_columns(newest=newest)
    for leaf, name in (("leaf", "mode"), ("holder_leaf", "holder_mode")):
        frame = frame.join(
            modes().rename({"mode": name, "leaf": leaf, "mask": "newest"}),
            on=["newest", leaf, "lock"],
            how="left",
            maintain_order="left",
        )
    return frame
