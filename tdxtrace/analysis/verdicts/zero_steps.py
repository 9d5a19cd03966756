"""Verdicts on zero-step episodes: a race, the VMM, the module, or an attack."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.threads import VP_ENTER, unprobed_entries
from tdxtrace.analysis.verdicts.rules import group_findings, look_up, verdict_rows
from tdxtrace.tables.findings import ZERO_STEP_CAUSES, ZERO_STEPS
from tdxtrace.tables.verdicts import VERDICTS

# A host that serves faults lets the guest execute something between them.  It does not if more
# than half of the entries of the vCPUs ran no guest code: a choice of ours.
REFUSED_SHARE: Final = 0.5
# Standard errors by which the share must exceed it: p = 1/700 for a host at the share.
_SIGMA: Final = 3.0
_KEY: Final = ["source", "first_seq", "form"]
_EXPECTED: Final = {
    "memory_fault_ignored": "userspace entered again without converting the page that "
    "KVM_EXIT_MEMORY_FAULT had asked it to convert; the mitigation is right, the VMM is not",
    "frozen_spte": "another thread was installing the page meanwhile; the race is known and ends "
    "by itself",
    "invalidation": "the page was being taken away; the vCPU waits until that is done",
    "memslot_change": "a long invalidation, such as a memory slot's, was taking pages away",
    "left_loop": "KVM left its retry loop for a signal or an interrupt while the page was busy",
    "many_pages": "one instruction touched more new pages than the threshold; all were served",
}
_RULE_OF: Final = {
    "memory_fault_ignored": "vmm_must_convert",
    **dict.fromkeys(("frozen_spte", "invalidation", "memslot_change", "left_loop"), "known_race"),
    "many_pages": "honest_run_of_pages",
    "pending_page": "pending_counts_as_missing",
    "block_churn": "kept_out_more_than_not",
    "unknown": "no_majority",
}
_PENDING: Final = (
    "the page was installed and the guest had not accepted it yet: modules before 1.5.20 keep "
    "such a vCPU out though it could take a #VE; a TD without #VE has touched it too early"
)
_PENDING_C: Final = (
    "the page was installed and the guest had not accepted it yet: this module keeps a vCPU out "
    "for that only where the TD takes no #VE, so the guest touched it too early"
)
_CHURN: Final = (
    "the host blocked pages and unblocked them with nothing done in between, which KVM never "
    "does; only {} of these vCPUs' entries ran guest code"
)
_WHO_BLOCKS: Final = (
    "record call stacks of tdh_mem_range_unblock (perf record -g) and which process makes them: "
    "an attack (TDXRay) and an odd host look alike in the calls"
)
_WHICH_TD: Final = (
    "the TD's attribute SEPT_VE_DISABLE (QEMU: sept-ve-disable), and the module's release (--dmesg "
    "of the host's boot, or --module): its defect needs a TD with #VE and one before 1.5.20"
)
_RIP: Final = "the guest's RIP, which no host trace has"


def on_zero_steps(
    steps: pl.DataFrame,
    causes: pl.DataFrame,
    seamcalls: pl.DataFrame,
    vm_entries: pl.DataFrame,
    generation: str | None,
) -> pl.DataFrame:
    """Give verdicts on zero-step episodes, per TD and cause.

    HOSTILE requires sure episodes (not only weak ones), pages that were blocked and unblocked
    without use, and vCPUs of which more than half of the entries ran no guest code.

    Args:
        steps: The ``zero_steps`` table.
        causes: The ``zero_step_causes`` table of it.
        seamcalls: The ``seamcalls`` table.
        vm_entries: The ``vm_entries`` table.
        generation: Lock generation of the module, where it is known.
    """
    found = ZERO_STEP_CAUSES.conform(causes).select(*_KEY, "td_id", "cause", "advice")
    rows = ZERO_STEPS.conform(steps).drop("td_id").join(found, on=_KEY, maintain_order="left")
    if rows.is_empty():
        return VERDICTS.empty()
    entries = pl.concat(
        [
            seamcalls.filter(pl.col("leaf") == VP_ENTER).select("source", "tid"),
            unprobed_entries(vm_entries, seamcalls).select("source", "tid"),
        ]
    )
    rows = rows.with_columns(leaf=pl.lit(VP_ENTER, pl.UInt16), sure=pl.col("strength") != "weak")
    groups = group_findings(
        rows,
        ["cause", "sure"],
        "first_seq",
        tids=pl.col("tid").unique(),
        n_out=(pl.col("n_refused") + pl.col("n_emulated")).sum().cast(pl.Int64),
        advice=pl.col("advice").drop_nulls().first(),
    )
    groups = _with_refused_share(groups, entries)
    return verdict_rows(groups, "zero_step", "zero_steps", _verdict_columns(generation))


def _with_refused_share(groups: pl.DataFrame, entries: pl.DataFrame) -> pl.DataFrame:
    """Add the share of the vCPUs' entries that were refused, and its lower bound."""
    counts = entries.group_by("source", "tid").len("n_entries")
    summed = (
        groups.with_row_index("group")
        .explode("tids")
        .join(counts, left_on=["source", "tids"], right_on=["source", "tid"], how="left")
        .group_by("group", maintain_order=True)
        .agg(pl.col("n_entries").sum())
    )
    n = pl.max_horizontal(pl.col("n_entries").cast(pl.Float64), pl.col("n_out"), 1.0)
    share = pl.col("n_out") / n
    bound = share - _SIGMA * (share * (1 - share) / n).sqrt()
    return pl.concat([groups, summed.drop("group")], how="horizontal").with_columns(
        share=share, bound=bound
    )


def _verdict_columns(generation: str | None) -> dict[str, pl.Expr]:
    cause, sure = pl.col("cause").cast(pl.String), pl.col("sure")
    is_hostile = sure & (cause == "block_churn") & (pl.col("bound") > REFUSED_SHARE)
    verdict = (
        pl.when(cause.is_in(list(_EXPECTED)))
        .then(pl.lit("EXPECTED"))
        .when(is_hostile)
        .then(pl.lit("HOSTILE"))
        .otherwise(pl.lit("UNDECIDED"))
    )
    executed = ((1 - pl.col("share")) * 100).round(0).cast(pl.Int64).cast(pl.String) + " %"
    reason = (
        pl.when(cause == "block_churn")
        .then(pl.format(_CHURN, executed))
        .when(cause == "pending_page")
        .then(pl.lit(_PENDING_C if generation == "C" else _PENDING))
        .otherwise(look_up("cause", _EXPECTED).fill_null("why is not to be seen"))
    )
    n = pl.col("n_rows")
    episodes = (
        pl.when(n == 1).then(pl.lit(" zero-step episode")).otherwise(pl.lit(" zero-step episodes"))
    )
    decided_by = (
        pl.when(cause == "block_churn")
        .then(pl.lit(_WHO_BLOCKS))
        .when(cause == "pending_page")
        .then(pl.lit(_WHICH_TD))
        .otherwise(pl.col("advice").fill_null(_RIP))
    )
    return {
        "verdict": verdict,
        "what": pl.when(sure).then(cause).otherwise(cause + ", weak signs"),
        "sentence": pl.concat_str(n.cast(pl.String), episodes, pl.lit(": "), reason, pl.lit(".")),
        "rule": look_up("cause", _RULE_OF),
        "decided_by": decided_by,
    }
