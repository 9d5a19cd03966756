"""Verdicts on busy answers and on broken kernel rules."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.mmu_lock import EXCLUDES, excluded
from tdxtrace.analysis.threads import left_lookup
from tdxtrace.analysis.verdicts.rules import group_findings, look_up, rule_statements, verdict_rows
from tdxtrace.tables.causes import BROKEN_RULES, BUG_RULES, BUSY_CAUSES
from tdxtrace.tables.verdicts import VERDICTS
from tdxtrace.tdx.leaves import leaf_name

# Confidences that are sufficient to call a rule broken.
_SURE_CONFIDENCE: Final = ("proof", "strong")
_VERDICT_OF: Final = {
    "host_conflict": "EXPECTED",
    "armed_entry": "EXPECTED",
    "guest": "EXPECTED",
    "kernel_bug": "BUG",
    "unexplained": "UNDECIDED",
}
_RULE_OF: Final = {
    "host_conflict": "locks_never_wait",
    "armed_entry": "armed_entry_holds_tree",
    "guest": "host_priority",
    "unexplained": "no_cause_without_holder",
}
_REASON: Final = {
    "host_conflict": "another SEAMCALL of the host held the lock; the caller must retry",
    "armed_entry": "an entry that zero-step mitigation had armed held the lock",
    "guest": "a TDCALL of the guest held it; host priority gives it to the host's next try",
    "kernel_bug": "in a correct kernel",
    "unexplained": "the trace does not show who held it",
}
_RULE: Final = pl.Enum(BUG_RULES)
JUDGED: Final = (
    *("source", "seq", "rank", "td_id", "leaf", "resource", "cause", "rule"),
    *("holder_seq", "holder_leaf", "holder_td_id", "advice", "confidence"),
)
"""Columns of ``busy_causes`` that verdicts need."""
_PROBE: Final = "probe entry and return of every tdh_* wrapper, and tdx_vcpu_run for TDH.VP.ENTER"


def on_busy(causes: pl.DataFrame | pl.LazyFrame, broken: pl.DataFrame) -> pl.DataFrame:
    """Give verdicts on busy answers, per TD, leaf, resource and cause.

    BUG requires a rule that was certainly broken: one that the answer itself breaks, or
    ``mmu_lock_excludes`` for the answer and its holder.  The verdict is UNDECIDED if mmu_lock
    should exclude the holder but the clock does not prove that the two calls overlapped, or if
    the cause is a guest with weak evidence.

    Evidence, meaning of absence and nearest innocent trace are documented with each cause and rule:
    :mod:`~tdxtrace.analysis.causes`.  No verdict here relies on the absence of a row.

    Args:
        causes: The ``busy_causes`` table or a lazy query of it; only rows of rank 1 are judged.
        broken: The ``broken_rules`` table.
    """
    rows = BUSY_CAUSES.pick(causes, *JUDGED).filter(pl.col("rank") == 1)
    if rows.is_empty():
        return VERDICTS.empty()
    keys = ["source", "seq", "holder_seq"]
    rows = rows.with_columns(apart=_is_separate())
    at = rows["apart"].arg_true()
    overlaps = left_lookup(rows.select(keys)[at], _proven_overlaps(broken), keys)
    is_unused = pl.repeat(False, rows.height, eager=True)
    rows = rows.with_columns(overlaps=is_unused.scatter(at, overlaps.fill_null(False)))
    confident = pl.col("confidence").is_in(_SURE_CONFIDENCE)
    is_certain = (
        pl.when("apart")
        .then("overlaps")
        .when(pl.col("cause").is_in(["kernel_bug", "guest"]))
        .then(confident)
        .otherwise(pl.lit(True))
    )
    groups = group_findings(
        rows.with_columns(sure=is_certain),
        ["resource", "cause", "rule", "apart", "sure"],
        "seq",
        advice=pl.col("advice").drop_nulls().first(),
    )
    is_separate = pl.when("apart").then(pl.lit(EXCLUDES))
    groups = groups.with_columns(rule=pl.coalesce(pl.col("rule").cast(pl.String), is_separate))
    return verdict_rows(groups, "busy", "busy_causes", _verdict_columns())


def _is_separate() -> pl.Expr:
    """Return whether mmu_lock prevents the call and its holder from overlapping."""
    same_td = pl.col("td_id") == pl.col("holder_td_id")
    by_call = pl.col("cause") == "host_conflict"
    return (by_call & same_td & excluded(pl.col("leaf"), pl.col("holder_leaf"))).fill_null(False)


def _proven_overlaps(broken: pl.DataFrame) -> pl.DataFrame:
    """Both orders of pairs that break mmu_lock_excludes: source, seq, holder_seq, overlaps."""
    pairs = BROKEN_RULES.conform(broken).filter(
        pl.col("rule") == EXCLUDES, pl.col("confidence").is_in(_SURE_CONFIDENCE)
    )
    rows_by_side = [
        pairs.select("source", "seq", holder_seq="evidence_seq"),
        pairs.select("source", seq="evidence_seq", holder_seq="seq"),
    ]
    return pl.concat(rows_by_side).unique().with_columns(overlaps=pl.lit(True))


def _verdict_columns() -> dict[str, pl.Expr]:
    verdict = (
        pl.when(~pl.col("sure"))
        .then(pl.lit("UNDECIDED"))
        .when("apart")
        .then(pl.lit("BUG"))
        .otherwise(look_up("cause", _VERDICT_OF))
    )
    rule = pl.col("rule")
    subject = pl.concat_str(
        pl.coalesce(rule, pl.col("cause").cast(pl.String)),
        pl.lit(" of "),
        pl.col("resource").fill_null("?"),
        pl.when("sure").then(pl.lit("")).otherwise(pl.lit(", not sure")),
    )
    sentence = pl.concat_str(
        _count_of("busy answer"),
        pl.lit(" of "),
        _leaf(),
        pl.lit(" ("),
        pl.col("resource").fill_null("operand unknown"),
        pl.lit("): "),
        _reason(),
        pl.lit("."),
    )
    return {
        "verdict": verdict,
        "what": subject,
        "sentence": sentence,
        "rule": pl.when(_is_unsure_guest())
        .then(pl.lit(_RULE_OF["unexplained"]))
        .otherwise(pl.coalesce(rule, look_up("cause", _RULE_OF))),
        "decided_by": pl.when("apart")
        .then(pl.lit(_FINER_CLOCK))
        .otherwise(pl.col("advice").fill_null(_PROBE)),
    }


def _reason() -> pl.Expr:
    """Return the part of a verdict's sentence about the holder and the broken rule."""
    statement = pl.concat_str(pl.lit(" "), look_up("rule", rule_statements())).fill_null("")
    not_proven = pl.when(pl.col("apart") & ~pl.col("sure")).then(pl.lit(_NOT_PROVEN))
    return pl.concat_str(
        pl.when("apart")
        .then(pl.lit(_KEPT_APART))
        .when(_is_unsure_guest())
        .then(pl.lit(_PERHAPS_GUEST))
        .otherwise(look_up("cause", _REASON)),
        statement,
        not_proven.otherwise(pl.lit("")),
    )


def _is_unsure_guest() -> pl.Expr:
    return (pl.col("cause") == "guest") & ~pl.col("sure")


_PERHAPS_GUEST: Final = (
    "no call of the host that was recorded held it; a TDCALL of the guest may have, or a call that "
    "was not recorded"
)
_KEPT_APART: Final = "another SEAMCALL of the host held the lock; in a correct kernel"
_NOT_PROVEN: Final = "; the clock does not show whether these calls overlapped"
_FINER_CLOCK: Final = "record with a clock of nanoseconds that all CPUs share (trace-cmd -C mono)"


def on_broken_rules(broken: pl.DataFrame, causes: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """Give verdicts on broken rules that no verdict on a busy answer covers.

    Args:
        broken: The ``broken_rules`` table.
        causes: The ``busy_causes`` table or a lazy query of it: :func:`on_busy` judges its rows.
    """
    if broken.is_empty():
        return VERDICTS.empty()
    answers = BUSY_CAUSES.pick(causes, *JUDGED).filter(pl.col("rank") == 1)
    explained = answers.select("source", "seq", "rule")
    of_busy = _proven_overlaps(broken).join(
        answers.filter(_is_separate()), on=["source", "seq", "holder_seq"], how="semi"
    )
    pair = pl.concat(
        [of_busy, of_busy.rename({"seq": "holder_seq", "holder_seq": "seq"})], how="diagonal"
    ).select("source", "seq", evidence_seq="holder_seq", rule=pl.lit(EXCLUDES, _RULE))
    rows = (
        BROKEN_RULES.conform(broken)
        .join(explained, on=["source", "seq", "rule"], how="anti")
        .join(pair, on=["source", "seq", "evidence_seq", "rule"], how="anti")
    )
    if rows.is_empty():
        return VERDICTS.empty()
    is_certain = pl.col("confidence").is_in(_SURE_CONFIDENCE)
    groups = group_findings(rows.with_columns(sure=is_certain), ["rule", "sure"], "seq")
    name = pl.col("rule").cast(pl.String)
    return verdict_rows(
        groups,
        "broken_rule",
        "broken_rules",
        {
            "verdict": pl.when("sure").then(pl.lit("BUG")).otherwise(pl.lit("UNDECIDED")),
            "what": pl.when("sure").then(name).otherwise(name + ", not sure"),
            "sentence": pl.concat_str(
                _count_of("call"),
                pl.lit(" of "),
                _leaf(),
                pl.lit(" that should not be: in a correct kernel "),
                look_up("rule", rule_statements()) + ".",
            ),
            "rule": name,
            "decided_by": pl.lit(_PROBE),
        },
    )


def _leaf() -> pl.Expr:
    number = pl.concat_str(pl.lit("leaf "), pl.col("leaf").cast(pl.String))
    return pl.coalesce(leaf_name(pl.col("leaf")), number, pl.lit("a call"))


def _count_of(subject: str) -> pl.Expr:
    n = pl.col("n_rows")
    plural = pl.when(n == 1).then(pl.lit(f" {subject}")).otherwise(pl.lit(f" {subject}s"))
    return pl.concat_str(n.cast(pl.String), plural)
