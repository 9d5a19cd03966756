"""Verdicts on busy answers, and on rules that a correct kernel keeps."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.verdicts.rules import group_findings, look_up, rule_statements, verdict_rows
from tdxtrace.tables.causes import BROKEN_RULES, BUSY_CAUSES
from tdxtrace.tables.verdicts import VERDICTS
from tdxtrace.tdx.leaves import leaf_name

# Confidences from which on a rule counts as broken.
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
    "host_conflict": "another SEAMCALL of the host held the lock; it has to be tried again",
    "armed_entry": "an entry that zero-step mitigation had armed held the lock",
    "guest": "a TDCALL of the guest held it; host priority gives it to the host's next try",
    "kernel_bug": "in a correct kernel",
    "unexplained": "the trace does not show who held it",
}
_PROBE: Final = "probe entry and return of every tdh_* wrapper, and tdx_vcpu_run for TDH.VP.ENTER"


def on_busy(causes: pl.DataFrame) -> pl.DataFrame:
    """Give verdicts on busy answers, per TD, leaf, resource and cause.

    Args:
        causes: The ``busy_causes`` table; its answers (rank 1) are judged.
    """
    rows = BUSY_CAUSES.conform(causes).filter(pl.col("rank") == 1)
    if rows.is_empty():
        return VERDICTS.empty()
    sure = (pl.col("cause") != "kernel_bug") | pl.col("confidence").is_in(_SURE_CONFIDENCE)
    groups = group_findings(
        rows.with_columns(sure=sure),
        ["resource", "cause", "rule", "sure"],
        "seq",
        advice=pl.col("advice").drop_nulls().first(),
    )
    return verdict_rows(groups, "busy", "busy_causes", _verdict_columns())


def _verdict_columns() -> dict[str, pl.Expr]:
    verdict = pl.when("sure").then(look_up("cause", _VERDICT_OF)).otherwise(pl.lit("UNDECIDED"))
    rule = pl.col("rule").cast(pl.String)
    what = pl.concat_str(
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
        look_up("cause", _REASON),
        pl.concat_str(pl.lit(" "), look_up("rule", rule_statements())).fill_null(""),
        pl.lit("."),
    )
    return {
        "verdict": verdict,
        "what": what,
        "sentence": sentence,
        "rule": pl.coalesce(rule, look_up("cause", _RULE_OF)),
        "decided_by": pl.col("advice").fill_null(_PROBE),
    }


def on_broken_rules(broken: pl.DataFrame, causes: pl.DataFrame) -> pl.DataFrame:
    """Give verdicts on rules that were broken without a busy answer that says so.

    Args:
        broken: The ``broken_rules`` table.
        causes: The ``busy_causes`` table, whose answers have their own verdicts.
    """
    given = BUSY_CAUSES.conform(causes).filter(pl.col("rank") == 1).select("source", "seq", "rule")
    rows = BROKEN_RULES.conform(broken).join(given, on=["source", "seq", "rule"], how="anti")
    if rows.is_empty():
        return VERDICTS.empty()
    sure = pl.col("confidence").is_in(_SURE_CONFIDENCE)
    groups = group_findings(rows.with_columns(sure=sure), ["rule", "sure"], "seq")
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


def _count_of(what: str) -> pl.Expr:
    n = pl.col("n_rows")
    plural = pl.when(n == 1).then(pl.lit(f" {what}")).otherwise(pl.lit(f" {what}s"))
    return pl.concat_str(n.cast(pl.String), plural)
