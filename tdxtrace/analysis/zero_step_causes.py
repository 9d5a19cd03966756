"""The ``zero_step_causes`` table: causes of the faults that led to zero-step episodes."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.block_rounds import block_rounds, entry_bytes
from tdxtrace.analysis.fault_handling import explain_faults, number_faults
from tdxtrace.analysis.threads import infer_td
from tdxtrace.tables.events import HOST_EVENTS, PAGE_FAULTS, SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import STEP_CAUSES, ZERO_STEP_CAUSES, ZERO_STEPS
from tdxtrace.tables.trace import Trace
from tdxtrace.tdx import leaves
from tdxtrace.tdx.exit_reasons import STEPPING_EPF_THRESHOLD

# An invalidation of more pages than this counts as the deletion of a memory slot: half a 2 MB
# page, an arbitrary choice (no trace event contains the slot).
MEMSLOT_PAGES: Final = 256
_PAGE_BYTES: Final = 4096
_COUNTS: Final = {
    "n_memory_fault": "memory_fault",
    "n_left_loop": "left_loop",
    "n_served": "served",
    "n_pending": "pending",
    "n_raced": "raced",
    "n_invalidated": "invalidated",
    "n_churned": "churned",
    "n_undone": "undone",
    "n_unexplained": "unexplained",
}
_CAUSE_OF: Final = {
    "memory_fault": "memory_fault_ignored",
    "left_loop": "left_loop",
    "pending": "pending_page",
    "raced": "frozen_spte",
    "invalidated": "invalidation",
    "churned": "block_churn",
    "undone": "block_undone",
}
_EPISODE: Final = ("source", "first_seq", "form")
_VCPU: Final = ("source", "tid")
_BLOCK, _UNBLOCK, _REMOVE, _AUG = leaves.numbers_of(
    f"TDH.MEM.{name}" for name in ("RANGE.BLOCK", "RANGE.UNBLOCK", "PAGE.REMOVE", "PAGE.AUG")
)
_RIP: Final = (
    "the guest's RIP is in no host trace: of a debug TD, read TDVPS field possibly_epf_stepping "
    "(0xA02000000000000E) by TDH.VP.RD"
)


def zero_step_causes(
    steps: pl.DataFrame, trace: Trace, *, memslot_pages: int = MEMSLOT_PAGES
) -> pl.DataFrame:
    """Determine for each zero-step episode why the faults that led to it were not resolved.

    Each fault of the run gets one explanation (``fault_handling``).  The cause is the explanation
    of more than half of the faults; ``many_pages`` if the faults are on more pages than the
    module tolerates and most were served; else ``unknown``.  A cause requires a row as evidence;
    the absence of a leaf is not evidence.

    Args:
        steps: The ``zero_steps`` table.
        trace: The events from which ``steps`` was computed.
        memslot_pages: An invalidation in which one thread removed more consecutive pages than
            this counts as that of a memory slot.

    Returns:
        The ``zero_step_causes`` table, in the order of ``steps``.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        The list of causes: discussion of 2024-09 to 2025-02 on the kvm list (S. Christopherson,
        Yan Zhao, R. Edgecombe, Binbin Wu); KVM's side: Linux 6.16 arch/x86/kvm/vmx/tdx.c,
        tdx_handle_ept_violation; pending pages: TDX module 1.5.16 and 1.5.20 is_epf_expected.
    """
    given = ZERO_STEPS.conform(steps)
    if given.is_empty():
        return ZERO_STEP_CAUSES.empty()
    calls = SEAMCALLS.conform(trace.seamcalls)
    entries = VM_ENTRIES.conform(trace.vm_entries)
    page_faults = PAGE_FAULTS.conform(trace.page_faults)
    events = HOST_EVENTS.conform(trace.host_events)
    episodes = infer_td(given, calls)
    faults = number_faults(calls, page_faults)
    ranges = _fault_ranges(episodes, faults)
    fault_rows = faults.join(ranges, on=[*_VCPU, "nth"], how="semi", maintain_order="left")
    rounds = block_rounds(trace, faults)
    handled = explain_faults(fault_rows, calls, entries, events, rounds)
    counted = _count_explanations(ranges, handled)
    found = episodes.join(counted, on=_EPISODE, how="left", maintain_order="left").with_columns(
        pl.col(*_COUNTS, "n_faults", "n_pages").fill_null(0)
    )
    found = _majority_cause(found)
    found = _memslot_changes(found, calls, memslot_pages)
    found = found.join(_advice(calls, page_faults, events), on="source", how="left")
    advice = pl.when(pl.col("cause") == "unknown").then(pl.col("advice").fill_null(_RIP))
    return ZERO_STEP_CAUSES.conform(
        found.with_columns(advice=advice, cause=pl.col("cause").cast(pl.Enum(STEP_CAUSES)))
    )


def _fault_ranges(episodes: pl.DataFrame, faults: pl.DataFrame) -> pl.DataFrame:
    """Return the faults (tid, nth) of the run that led to each episode."""
    last = (
        episodes.filter(pl.col("tid").is_not_null())
        .sort("start_ns")
        .join_asof(
            faults.sort("ts_ns").select(*_VCPU, "ts_ns", last="nth"),
            left_on="start_ns",
            right_on="ts_ns",
            by=_VCPU,
            check_sortedness=False,
        )
        .filter(pl.col("last").is_not_null())
    )
    # An entry refused with operand SEPT was preceded by seven faults at one RIP, even where the
    # pages changed in between.
    armed = pl.when(pl.col("form") == "busy_sept").then(STEPPING_EPF_THRESHOLD + 1).otherwise(0)
    n = pl.max_horizontal(pl.col("n_faults_before").cast(pl.Int64), armed)
    first = (pl.col("last") - n + 1).clip(0)
    return last.select(*_EPISODE, "tid", nth=pl.int_ranges(first, pl.col("last") + 1)).explode(
        "nth"
    )


def _count_explanations(ranges: pl.DataFrame, faults: pl.DataFrame) -> pl.DataFrame:
    """Count the explanations of each episode's faults."""
    in_range = ranges.join(faults, on=[*_VCPU, "nth"], how="inner")
    return in_range.group_by(_EPISODE).agg(
        fault_ns=pl.col("ts_ns").min(),
        n_faults=pl.len().cast(pl.UInt32),
        n_pages=pl.col("gpa").drop_nulls().n_unique().cast(pl.UInt32),
        shown=pl.struct("explanation", "by_seq", "nth").sort_by("nth"),
        **{
            name: (pl.col("explanation") == explanation).sum().cast(pl.UInt32)
            for name, explanation in _COUNTS.items()
        },
    )


def _majority_cause(found: pl.DataFrame) -> pl.DataFrame:
    """Add the majority cause, its share, and the last row that is evidence for it."""
    cause, n, explanation = pl.lit("unknown"), pl.lit(0, pl.UInt32), pl.lit("unexplained")
    for name, explained in _COUNTS.items():
        if explained in _CAUSE_OF:
            is_majority = pl.col(name) * 2 > pl.col("n_faults")
            cause = pl.when(is_majority).then(pl.lit(_CAUSE_OF[explained])).otherwise(cause)
            n = pl.when(is_majority).then(pl.col(name)).otherwise(n)
            explanation = pl.when(is_majority).then(pl.lit(explained)).otherwise(explanation)
    many = (pl.col("n_pages") > STEPPING_EPF_THRESHOLD) & (
        pl.col("n_served") * 2 > pl.col("n_faults")
    )
    cause = pl.when(many).then(pl.lit("many_pages")).otherwise(cause)
    n = pl.when(many).then(pl.col("n_served")).otherwise(n)
    explanation = pl.when(many).then(pl.lit("served")).otherwise(explanation)
    share = pl.when(pl.col("n_faults") > 0).then(n / pl.col("n_faults")).otherwise(0.0)
    decided = found.with_columns(cause=cause, share=share.cast(pl.Float64), explanation=explanation)
    rows = decided.explode("shown").unnest("shown", separator=":")
    explanations = (
        rows.filter(
            pl.col("shown:explanation") == pl.col("explanation"), pl.col("cause") != "unknown"
        )
        .group_by(_EPISODE, maintain_order=True)
        .agg(evidence_seq=pl.col("shown:by_seq").drop_nulls().last())
    )
    return decided.join(explanations, on=_EPISODE, how="left", maintain_order="left")


def _memslot_changes(found: pl.DataFrame, calls: pl.DataFrame, memslot_pages: int) -> pl.DataFrame:
    """Set the cause of long invalidations to ``memslot_change``."""
    taken = calls.filter(pl.col("leaf").is_in([_BLOCK, _REMOVE]), pl.col("status") == 0)
    size = entry_bytes(pl.col("level").fill_null(0))
    by = taken.select("source", "tid", evidence_seq="seq", by_tid="tid").drop("tid")
    removed = (
        taken.filter(pl.col("leaf") == _REMOVE)
        .sort("source", "tid", "seq")
        .with_columns(
            breaks=(pl.col("gpa") != (pl.col("gpa") + size).shift())
            .fill_null(True)
            .cum_sum()
            .over("source", "tid")
        )
        .group_by("source", "tid", "breaks")
        .agg(n=size.sum() // _PAGE_BYTES, n_calls=pl.len())
        # The removal of one large page is not the deletion of a slot.
        .filter(pl.col("n") > memslot_pages, pl.col("n_calls") > 1)
        .select("source", by_tid="tid")
        .unique()
        .with_columns(is_slot=pl.lit(True))
    )
    joined = (
        found.join(by, on=["source", "evidence_seq"], how="left", maintain_order="left")
        .join(removed, on=["source", "by_tid"], how="left", nulls_equal=True, maintain_order="left")
        .with_columns(is_slot=pl.col("is_slot").fill_null(False))
    )
    is_slot = (pl.col("cause") == "invalidation") & pl.col("is_slot")
    return joined.with_columns(
        cause=pl.when(is_slot).then(pl.lit("memslot_change")).otherwise("cause")
    )


def _advice(
    calls: pl.DataFrame, page_faults: pl.DataFrame, host_events: pl.DataFrame
) -> pl.DataFrame:
    """Return for each input what else to record to explain unresolved faults."""
    fault_rows = []
    for source in sorted({*calls["source"].unique(), *page_faults["source"].unique()}):
        here = calls.filter(pl.col("source") == source)["leaf"].unique()
        missing = [
            text
            for text, there in (
                ("kvm:kvm_page_fault", (page_faults["source"] == source).any()),
                ("kvm:kvm_userspace_exit", (host_events["source"] == source).any()),
                ("probes on tdh_mem_page_aug and tdh_mem_sept_add", _AUG in here),
                ("probes on tdh_mem_range_block and tdh_mem_range_unblock", _BLOCK in here),
            )
            if not there
        ]
        fault_rows.append((source, "record also " + ", ".join(missing) if missing else _RIP))
    schema = {"source": pl.UInt16, "advice": pl.String}
    return pl.DataFrame(fault_rows, schema=schema, orient="row")
