"""The rule that no lock of a TD is contended while the TD is built."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.rule_evidence import BROKEN_CALLS, RuleEvidence, broken_calls
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tdx import word
from tdxtrace.tdx.leaves import numbers_of, parse_leaf

_CREATIONS: Final = numbers_of(["TDH.MNG.CREATE", "TDH.MNG.INIT"])
_FINALIZE: Final = parse_leaf("TDH.MR.FINALIZE")[0]
# KVM calls these only for a finalized TD: AUG and TRACK if kvm_tdx->state is TD_STATE_RUNNABLE
# (Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_sept_set_private_spte and tdx_track); VP.ENTER because
# the module refuses it earlier (1.5.01 include/auto_gen/op_state_lookup.c).
_OF_RUNNING: Final = [*numbers_of(["TDH.MEM.PAGE.AUG", "TDH.MEM.TRACK"]), VP_ENTER]
# Scopes of locks that only calls for one TD take.
_TD_SCOPES: Final = ("td", "vcpu", "entry")
_SEAMCALL: Final = "seamcall"


def busy_before_finalize(evidence: RuleEvidence) -> pl.DataFrame:
    """Find attempts that were busy on a lock of their own TD while that TD was built.

    Evidence: the TD's creation before the attempt and its TDH.MR.FINALIZE after it (proof).
    With only one of the two, the evidence is strong if the trace has any call of the other leaf,
    no event may be lost between, and KVM does not make the call only for a running TD.

    Absence: a missing FINALIZE may have happened without a probe.  An AUG or a TRACK that
    succeeded, or a vCPU entry, shows that the TD was built.  If its creation was not recorded,
    the attempt may belong to an earlier TD at the same address.

    Nearest innocent trace: INIT is recorded, FINALIZE is not probed; an AUG succeeds, and a
    later AUG is busy.  An operand id that may mean a page, whose 2M range TDs share.
    """
    leaves = set(evidence.calls["leaf"].unique())
    if not leaves & {*_CREATIONS, _FINALIZE}:
        return pl.DataFrame(schema=BROKEN_CALLS)
    of_td = pl.col("scope").is_in(_TD_SCOPES).fill_null(False).all().over("row")
    rows = evidence.attempts.filter(of_td).select("row").unique()
    own = evidence.calls.select("td_id", "leaf", at="ends")[rows["row"]].with_columns(rows["row"])
    own = own.drop_nulls().sort("at")
    if own.is_empty():
        return pl.DataFrame(schema=BROKEN_CALLS)
    marks = _milestones(evidence.calls)
    before = marks.select("td_id", "at", built="kind", built_at="at", evidence="row").sort("at")
    after = marks.select("td_id", "at", next="kind", next_at="at", later="row").sort("at")
    own = own.join_asof(before, on="at", by="td_id", check_sortedness=False)
    own = own.join_asof(after, on="at", by="td_id", strategy="forward", check_sortedness=False)
    created = pl.col("built") == "created"
    finalized = pl.col("next") == "finalized"
    early = ~pl.col("leaf").is_in(_OF_RUNNING)
    proven = own.filter(created, finalized)
    begun = own.filter(created, pl.col("next").is_null(), early)
    if _FINALIZE not in leaves:
        # A probe on the function that makes every SEAMCALL records creation and FINALIZE alike.
        begun = begun.filter(_recorded_by_seamcall(evidence.calls, begun["evidence"]))
    ended = own.filter(pl.col("built").is_null(), finalized, early)
    if not leaves & set(_CREATIONS):
        ended = ended.clear()
    likely = [
        evidence.without_losses(begun, "built_at", "at"),
        evidence.without_losses(ended, "at", "next_at").with_columns(evidence="later"),
    ]
    return pl.concat(
        [
            broken_calls(proven, "busy_before_finalize"),
            broken_calls(pl.concat(likely), "busy_before_finalize", "strong"),
        ]
    )


def _recorded_by_seamcall(calls: pl.DataFrame, rows: pl.Series) -> pl.Series:
    return calls["probe"].gather(rows).cast(pl.String).eq_missing(_SEAMCALL)


def _milestones(calls: pl.DataFrame) -> pl.DataFrame:
    """Return successful calls: row, td_id, at (end, ns), kind (created, finalized, running)."""
    kind = (
        pl.when(pl.col("leaf").is_in(_CREATIONS))
        .then(pl.lit("created"))
        .when(pl.col("leaf") == _FINALIZE)
        .then(pl.lit("finalized"))
        .when(pl.col("leaf").is_in(_OF_RUNNING))
        .then(pl.lit("running"))
    )
    return (
        calls.select("td_id", "leaf", "status", at="ends")
        .with_row_index("row")
        .filter((pl.col("status") < word.ERROR_BIT) & pl.col("td_id").is_not_null())
        .select("row", "td_id", "at", kind=kind)
        .filter(pl.col("kind").is_not_null())
    )
