"""Verdicts on zero-step episodes: a race, the VMM, the module, or an attack."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.block_rounds import ENTRY, block_rounds, entry_key
from tdxtrace.analysis.fault_handling import number_faults
from tdxtrace.analysis.guest_progress import entries_by_progress
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.analysis.verdicts.rules import group_findings, look_up, verdict_rows
from tdxtrace.tables.events import PAGE_FAULTS
from tdxtrace.tables.findings import ZERO_STEP_CAUSES, ZERO_STEPS
from tdxtrace.tables.trace import Trace
from tdxtrace.tables.verdicts import VERDICTS

# Minimum number of times that a vCPU was kept out by blocking one range, to rule out an accident.
# No source gives a number, and an exact one is not needed: no kernel that was read does it once
# (Linux has no caller of UNBLOCK since the series of 2024-09), and an attack does it for each
# instruction.  Once may be a change that was cancelled for a reason outside the trace, twice a
# second try of that change.
REPEATED: Final = 3
_KEY: Final = ["source", "first_seq", "form"]
_VCPU: Final = ["source", "tid"]
_EXPECTED: Final = {
    "memory_fault_ignored": "userspace entered again without converting the page that "
    "KVM_EXIT_MEMORY_FAULT had asked it to convert; the mitigation is right, the VMM is not",
    "frozen_spte": "another thread was installing the page meanwhile; the race is known and ends "
    "by itself",
    "invalidation": "the page was being removed; the vCPU waits until that is done",
    "memslot_change": "a long invalidation, such as a memory slot's, was removing pages",
    "left_loop": "KVM left its retry loop for a signal or an interrupt while the page was busy",
    "many_pages": "one instruction touched more new pages than the threshold; all were served",
}
_RULE_OF: Final = {
    "memory_fault_ignored": "vmm_must_convert",
    **dict.fromkeys(("frozen_spte", "invalidation", "memslot_change", "left_loop"), "known_race"),
    "many_pages": "honest_run_of_pages",
    "pending_page": "pending_counts_as_missing",
    "block_churn": "blocked_for_nothing",
    "block_undone": "blocked_for_something",
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
_UNDONE: Final = (
    "the host blocked pages for something that failed, for the guest, or for a split or merge that "
    "it reverted, and restored them: it may have had a reason"
)
_CHURN: Final = (
    "the host blocked pages and unblocked them unchanged{}, with no call on them in between, which "
    "KVM never does; only {} of these vCPUs' entries ran guest code"
)
_WHO_BLOCKS: Final = (
    "record call stacks of tdh_mem_range_unblock (perf record -g) and which process makes them: "
    "an attack (TDXRay) and an odd host look alike in the calls"
)
_WHAT_FAILED: Final = (
    "why it failed: record call stacks of tdh_mem_range_block and of the call that failed "
    "(perf record -g), and for how long the host goes on"
)
_WHICH_TD: Final = (
    "the TD's attribute SEPT_VE_DISABLE (QEMU: sept-ve-disable), and the module's release (--dmesg "
    "of the host's boot, or --module): its defect needs a TD with #VE and one before 1.5.20"
)
_RIP: Final = "the guest's RIP, which no host trace has"


def on_zero_steps(
    steps: pl.DataFrame, causes: pl.DataFrame, trace: Trace, generation: str | None
) -> pl.DataFrame:
    """Give verdicts on zero-step episodes, per TD and cause.

    HOSTILE applies only to the host, and requires all of these to be recorded:

    * certain episodes (TDH.VP.ENTER refused with operand SEPT, or strong), most of whose faults
      hit ranges that the host had blocked;
    * the host unblocked these ranges unchanged, without another call on them in between
      (:func:`~tdxtrace.analysis.block_rounds.block_rounds` lists the innocent cases);
    * the host did so at least REPEATED times with the same range, and each time a vCPU faulted on
      it and was then refused.

    The verdict thus rests on the host's actions and on the guest being unable to run; the share of
    time that the guest lost is irrelevant.  With less evidence, the verdict is UNDECIDED.  Nearest
    innocent trace: a host that tries to merge pages, is interrupted and gives up, fifteen times in
    a row: ``block_undone``, UNDECIDED.  Limitation: calls of a leaf that was not probed are not
    recorded, so a host whose failed calls are missing from the recording looks like an attacker.

    Args:
        steps: The ``zero_steps`` table.
        causes: The ``zero_step_causes`` table for ``steps``.
        trace: The events that the findings are based on.
        generation: Lock generation of the module; None if unknown.
    """
    found = ZERO_STEP_CAUSES.conform(causes).select(*_KEY, "td_id", "cause", "advice")
    rows = ZERO_STEPS.conform(steps).drop("td_id").join(found, on=_KEY, maintain_order="left")
    if rows.is_empty():
        return VERDICTS.empty()
    rows = rows.with_columns(leaf=pl.lit(VP_ENTER, pl.UInt16), sure=pl.col("strength") != "weak")
    groups = group_findings(
        rows,
        ["cause", "sure"],
        "first_seq",
        tids=pl.col("tid").unique(),
        advice=pl.col("advice").drop_nulls().first(),
    )
    entries = entries_by_progress(trace)
    groups = _with_executed_share(groups, entries)
    churned = rows.filter(pl.col("sure"), pl.col("cause") == "block_churn")
    repeated = _rounds_per_range(churned, entries, trace)
    groups = groups.join(
        repeated, on=["source", "td_id"], how="left", nulls_equal=True, maintain_order="left"
    ).with_columns(pl.col("n_rounds").fill_null(0))
    return verdict_rows(groups, "zero_step", "zero_steps", _verdict_columns(generation))


def _with_executed_share(groups: pl.DataFrame, entries: pl.DataFrame) -> pl.DataFrame:
    """Add the share of the vCPUs' entries that ran guest code."""
    counts = entries.group_by(_VCPU).agg(n=pl.len(), n_nothing=pl.col("nothing").sum())
    summed = (
        groups.with_row_index("group")
        .explode("tids")
        .join(counts, left_on=["source", "tids"], right_on=_VCPU, how="left")
        .group_by("group", maintain_order=True)
        .agg(ran=1 - pl.col("n_nothing").sum() / pl.max_horizontal(pl.col("n").sum(), 1))
    )
    return pl.concat([groups, summed.drop("group")], how="horizontal")


def _rounds_per_range(episodes: pl.DataFrame, entries: pl.DataFrame, trace: Trace) -> pl.DataFrame:
    """Count the rounds in which one range was churned while a vCPU faulted on it and was refused.

    Args:
        episodes: Certain episodes caused by churning.
        entries: Entries of the vCPUs.
        trace: The events.

    Returns:
        Columns source, td_id and n_rounds: the largest number for any range of the TD.
    """
    if episodes.is_empty():
        return episodes.select("source", "td_id", n_rounds=pl.lit(0, pl.UInt32))
    faults = number_faults(trace.seamcalls, PAGE_FAULTS.conform(trace.page_faults))
    rounds = block_rounds(trace, faults)
    rounds = rounds.filter(pl.col("fate") == "churned").drop("tid").sort("start_ns")
    tds = episodes.select(*_VCPU, "td_id").unique()
    faults = faults.join(tds, on=_VCPU)
    first = pl.concat(
        _first_faults(part, faults.with_columns(key=entry_key(int(str(level)))))
        for (level,), part in rounds.group_by("level", maintain_order=True)
    )
    preceding = first.sort("ts_ns").join_asof(
        _refusals(episodes, entries),
        left_on="ts_ns",
        right_on="when",
        by=_VCPU,
        strategy="forward",
        check_sortedness=False,
    )
    per_range = (
        # The call that unblocks the range holds the tree, so the vCPU is refused once more.
        preceding.filter(pl.col("when") <= pl.col("done_ns"))
        .group_by(ENTRY)
        .agg(n_rounds=pl.col("seq").n_unique())
    )
    return per_range.group_by("source", "td_id").agg(pl.col("n_rounds").max())


def _first_faults(rounds: pl.DataFrame, faults: pl.DataFrame) -> pl.DataFrame:
    """Return the first fault of each vCPU on the range of a round, during that round."""
    matching = faults.select(*_VCPU, "td_id", "key", "ts_ns").sort("ts_ns")
    return (
        matching.join_asof(
            rounds,
            left_on="ts_ns",
            right_on="start_ns",
            by=["source", "td_id", "key"],
            check_sortedness=False,
        )
        .filter(pl.col("ts_ns") <= pl.col("end_ns"))
        .group_by(*_VCPU, *ENTRY[1:], "seq", "done_ns")
        .agg(pl.col("ts_ns").min())
    )


def _refusals(episodes: pl.DataFrame, entries: pl.DataFrame) -> pl.DataFrame:
    """Return the refused entries within the episodes, by time."""
    spans = episodes.select(*_VCPU, "start_ns", until="end_ns").sort("start_ns")
    refused = entries.filter("refused").select(*_VCPU, "when").sort("when")
    inside = refused.join_asof(
        spans, left_on="when", right_on="start_ns", by=_VCPU, check_sortedness=False
    )
    return inside.filter(pl.col("when") <= pl.col("until")).select(*_VCPU, "when")


def _verdict_columns(generation: str | None) -> dict[str, pl.Expr]:
    cause, is_certain = pl.col("cause").cast(pl.String), pl.col("sure")
    is_hostile = is_certain & (cause == "block_churn") & (pl.col("n_rounds") >= REPEATED)
    verdict = (
        pl.when(cause.is_in(list(_EXPECTED)))
        .then(pl.lit("EXPECTED"))
        .when(is_hostile)
        .then(pl.lit("HOSTILE"))
        .otherwise(pl.lit("UNDECIDED"))
    )
    n = pl.col("n_rows")
    kind = pl.when(is_certain).then(pl.lit(" ")).otherwise(pl.lit(" suspected "))
    plural = pl.when(n == 1).then(pl.lit("")).otherwise(pl.lit("s"))
    episodes = pl.concat_str(kind, pl.lit("zero-step episode"), plural)
    decided_by = (
        pl.when(cause == "block_churn")
        .then(pl.lit(_WHO_BLOCKS))
        .when(cause == "block_undone")
        .then(pl.lit(_WHAT_FAILED))
        .when(cause == "pending_page")
        .then(pl.lit(_WHICH_TD))
        .otherwise(pl.col("advice").fill_null(_RIP))
    )
    return {
        "verdict": verdict,
        "what": pl.when(is_certain).then(cause).otherwise(cause + ", weak signs"),
        "sentence": pl.concat_str(
            n.cast(pl.String), episodes, pl.lit(": "), _reason(generation), pl.lit(".")
        ),
        "rule": look_up("cause", _RULE_OF),
        "decided_by": decided_by,
    }


def _reason(generation: str | None) -> pl.Expr:
    cause = pl.col("cause").cast(pl.String)
    executed = (pl.col("ran") * 100).round(0).cast(pl.Int64).cast(pl.String) + " %"
    times = (
        pl.when(pl.col("n_rounds") > 1)
        .then(pl.format(", up to {} times of one range", "n_rounds"))
        .otherwise(pl.lit(""))
    )
    return (
        pl.when(cause == "block_churn")
        .then(pl.format(_CHURN, times, executed))
        .when(cause == "block_undone")
        .then(pl.lit(_UNDONE))
        .when(cause == "pending_page")
        .then(pl.lit(_PENDING_C if generation == "C" else _PENDING))
        .otherwise(look_up("cause", _EXPECTED).fill_null("the trace does not show the cause"))
    )
