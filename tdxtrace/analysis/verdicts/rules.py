"""The rules that decide verdicts, each with its source."""

from __future__ import annotations

from functools import cache
from typing import Final

import polars as pl

from tdxtrace.tables.verdicts import SUBJECTS, VERDICTS, VERDICTS_GIVEN
from tdxtrace.tdx.locks import bug_rule_table

_MODULE: Final = "intel/tdx-module 1.5.01 to 1.5.25"
RULES: Final = {
    "locks_never_wait": f"{_MODULE} src/common/helpers/tdx_locks.h: no acquire waits",
    "armed_entry_holds_tree": f"{_MODULE} td_transitions/tdh_vp_enter.c, handle_stepping_filter",
    "host_priority": f"{_MODULE} src/common/helpers/tdx_locks.h, sept_lock_acquire_host",
    "no_cause_without_holder": "a cause needs a holder that overlaps: tdx-module lock table",
    "vmm_must_convert": (
        "Linux Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT; Yan Zhao, 2024-09-25: the "
        "selftest that ignores it; S. Christopherson, 2024-10-08: working as intended"
    ),
    "known_race": (
        "Yan Zhao, 2024-10-10; R. Edgecombe, 2024-10-10; Linux 6.16 tdx_handle_ept_violation"
    ),
    "honest_run_of_pages": f"{_MODULE} td_exit_stepping.c: only a new RIP clears the counter",
    "pending_counts_as_missing": "TDX module 1.5.16 and 1.5.20 td_exit_stepping.c, is_epf_expected",
    "blocked_for_nothing": (
        "Linux has no caller of TDH.MEM.RANGE.UNBLOCK since the series of 2024-09; TDXRay "
        "(S&P 2026), SEPTrace: BLOCK and UNBLOCK to watch pages; three times is our choice"
    ),
    "blocked_for_something": (
        f"{_MODULE} tdh_mem_page_promote.c and the like need a blocked range; Yan Zhao, DEMOTE "
        "series v3, 2026-01: no maximum of restarts is guaranteed, so a host may give up"
    ),
    "no_majority": "no cause explains half of the faults",
    "dropped_block": "canonical/tdx issue 213: BLOCK's busy answer ignored, DEMOTE fails",
    "entry_left_busy": f"{_MODULE} tdx_locks.h: host priority stays until a host takes the lock",
    "vm_killed": "Linux 6.16 to 7.2 arch/x86/kvm/vmx/tdx.c, KVM_BUG_ON after the second failure",
    "settled_by_another": "the request's next success clears host priority: tdx_locks.h",
    "end_not_seen": "nothing later in the trace shows the consequence",
    "interruptible_flow": "TDX module 1.5 base specification, interruptible host-side flows",
    "no_maximum_of_restarts": "Yan Zhao, DEMOTE series v3, 2026-01: no maximum is guaranteed",
    "local_loop_or_off_cpu": "Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_handle_ept_violation",
    "tdr_or_tdvpr_busy": (
        "Yan Zhao, 2025-09-02 (lore aLa34QCJCXGLk/fl): SEAMCALL TDH_VP_INIT failed: "
        "0x8000020000000080, two vCPUs initialised at once"
    ),
    "block_track_then_operate": f"{_MODULE} src/common/helpers/helpers.h, is_tlb_tracked",
    "message_alone": "a message has the status of one call, not who held the lock",
}
"""Source of each rule by name; ``bug_rule_table`` has the rules of a correct kernel."""


@cache
def rule_sources() -> dict[str, str]:
    """Return the source of every rule by name."""
    table = bug_rule_table()
    return RULES | dict(zip(table["rule"], table["source"], strict=True))


@cache
def rule_statements() -> dict[str, str]:
    """Return the statement of each rule of a correct kernel by name."""
    table = bug_rule_table()
    return dict(zip(table["rule"], table["statement"], strict=True))


# Maximum number of rows listed as evidence for a group.
_N_EVIDENCE: Final = 5
_GROUP_KEY: Final = ("source", "td_id", "leaf")


def group_findings(rows: pl.DataFrame, by: list[str], seq: str, **more: pl.Expr) -> pl.DataFrame:
    """Group findings, and list the first rows of each group as evidence.

    Args:
        rows: Findings with source, td_id, leaf.
        by: Further columns to group by.
        seq: Column that identifies a row.
        more: Further aggregates by name.

    Returns:
        One row per group, in order of appearance: its keys, n_rows, evidence and ``more``.
    """
    evidence_seqs = pl.col(seq).drop_nulls().unique(maintain_order=True).head(_N_EVIDENCE)
    return rows.group_by([*_GROUP_KEY, *by], maintain_order=True).agg(
        n_rows=pl.len().cast(pl.UInt64),
        evidence=evidence_seqs.cast(pl.String).implode().list.join(" "),
        **more,
    )


def verdict_rows(
    groups: pl.DataFrame, subject: str, table: str, columns: dict[str, pl.Expr]
) -> pl.DataFrame:
    """Build rows of ``verdicts`` from groups.

    Args:
        groups: Rows of :func:`group_findings`.
        subject: Subject of the verdicts.
        table: Name of the table with the evidence.
        columns: Expressions for verdict, what, sentence, rule and decided_by.
    """
    rows = groups.with_columns(**columns)
    decided_by = pl.when(pl.col("verdict") == "UNDECIDED").then("decided_by")
    return VERDICTS.conform(
        rows.with_columns(
            verdict=pl.col("verdict").cast(pl.Enum(VERDICTS_GIVEN)),
            subject=pl.lit(subject, pl.Enum(SUBJECTS)),
            evidence_table=pl.lit(table),
            rule_source=pl.col("rule").replace_strict(rule_sources(), return_dtype=pl.String),
            decided_by=decided_by.cast(pl.String),
            evidence=pl.col("evidence").fill_null(""),
        )
    )


def look_up(column: str, words: dict[str, str]) -> pl.Expr:
    """Map the values of a column by ``words``; null for values without an entry."""
    return (
        pl.col(column).cast(pl.String).replace_strict(words, default=None, return_dtype=pl.String)
    )
