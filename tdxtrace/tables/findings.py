"""The finding tables, which hold results of analyses: columns, types, units, grain and rules."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.builds import BUILD_TABLES
from tdxtrace.tables.causes import CAUSE_TABLES, TD_OF_CALL
from tdxtrace.tables.enums import Outcome, names
from tdxtrace.tables.events import (
    GPA,
    I64,
    LEAF,
    LEVEL,
    SOURCE,
    TD,
    TEXT,
    TGID,
    TID,
    U32,
    U64,
    VCPU,
)
from tdxtrace.tables.lifecycle import LIFECYCLE_TABLES
from tdxtrace.tables.limits import (
    ATTEMPTS,
    BUSY_ANSWERS,
    LATENCIES,
    LIMIT_STATEMENTS,
    LIMITS,
    POLICIES,
)
from tdxtrace.tables.schema import Column, Table
from tdxtrace.tables.verdicts import VERDICT_TABLES

OUTCOMES: Final = names(Outcome)
IDENTITIES: Final = ("request", "gpa", "td", "thread")
CUTS: Final = ("trace_start", "trace_end", "lost_events")
FORMS: Final = ("busy_sept", "failed_vmentry", "emulated_ept_violation")
STRENGTHS: Final = ("proof", "strong", "weak")
ENDS: Final = ("entered", "left", "cut")

COUNTED: Final = ("retried_seamcalls", "zero_steps")

RETRY_CHAINS = Table(
    name="retry_chains",
    grain="one row per request, with all its attempts",
    meaning="A retry chain is the sequence of all attempts at one request, from the first to the "
    "one that completes it; a request that succeeds at once is a chain of one.",
    key=("source", "first_seq"),
    columns=(
        SOURCE,
        Column("first_seq", U64, "seamcalls.seq of the first attempt."),
        Column("last_seq", U64, "seamcalls.seq of the last attempt."),
        LEAF,
        TID,
        TGID,
        Column(
            "td_id",
            U64,
            "The TD: as recorded, else the only one used by the thread or process.",
            nullable=True,
        ),
        Column("vp_id", U64, "The vCPU, where recorded.", nullable=True),
        GPA,
        LEVEL,
        Column(
            "start_ns",
            I64,
            "Start of the first attempt (its end, if no entry was recorded).",
            unit="ns",
        ),
        Column(
            "end_ns",
            I64,
            "End of the last attempt (its start, if no return was recorded).",
            unit="ns",
        ),
        Column(
            "took_ns",
            I64,
            "Start of the first attempt to the end of the last (for VP.ENTER to its start, when "
            "the guest runs); null: one of them was not recorded.",
            unit="ns",
            nullable=True,
        ),
        Column("n_attempts", U32, "SEAMCALLs in the chain, including the last."),
        Column("n_busy", U32, "Attempts answered with a retryable status."),
        Column(
            "n_segments",
            U32,
            "Parts of the chain, separated by re-entries of the vCPU with the same fault.",
        ),
        Column("outcome", pl.Enum(OUTCOMES), "How the request ended."),
        Column(
            "final_status",
            U64,
            "Status of the last attempt; null: no return was recorded.",
            nullable=True,
        ),
        Column(
            "identity",
            pl.Enum(IDENTITIES),
            "What the attempts were joined by; the first value is the most reliable.",
        ),
        Column(
            "cut_by", pl.Enum(CUTS), "Why the chain is censored; null unless cut.", nullable=True
        ),
        Column(
            "settled_seq",
            U64,
            "seamcalls.seq of the call by another thread that completed the request.",
            nullable=True,
        ),
        Column(
            "begin_lost",
            pl.Boolean(),
            "Whether attempts before the first may be missing: events were lost, or the trace "
            "began, after the previous call of the thread (or vCPU).",
        ),
    ),
    rules={
        "end is not before start": pl.col("start_ns") <= pl.col("end_ns"),
        "a chain has an attempt": pl.col("n_attempts") >= 1,
        "all but the last are busy": pl.col("n_busy").is_between(
            pl.col("n_attempts") - 1, pl.col("n_attempts")
        ),
        "a cut has a reason": (pl.col("outcome") == "cut") == pl.col("cut_by").is_not_null(),
    },
)

ZERO_STEPS = Table(
    name="zero_steps",
    grain="one row per zero-step episode: entries of a vCPU refused by zero-step mitigation",
    meaning="A zero-step episode is a run of consecutive entries of one vCPU that the TDX module's "
    "zero-step mitigation refused.",
    key=("source", "first_seq", "form"),
    columns=(
        SOURCE,
        Column("first_seq", U64, "First row of the episode: seamcalls.seq or vm_entries.seq."),
        Column("last_seq", U64, "Last row of the episode."),
        TID,
        TGID,
        TD,
        Column("vp_id", U64, "The vCPU, where recorded.", nullable=True),
        VCPU,
        Column("start_ns", I64, "First refused entry.", unit="ns"),
        Column("end_ns", I64, "Last refused entry.", unit="ns"),
        Column("form", pl.Enum(FORMS), "How the trace shows the episode."),
        Column("strength", pl.Enum(STRENGTHS), "Strength of the evidence."),
        Column("n_refused", U32, "Entries refused with a busy status (or failed entries)."),
        Column(
            "n_emulated",
            U32,
            "EPT-violation exits within the episode that the module emulated (weak).",
        ),
        Column("n_faults_before", U32, "Consecutive EPT violations that led to the episode."),
        Column(
            "gpa", U64, "Last faulting guest physical address before the episode.", nullable=True
        ),
        Column(
            "ended",
            pl.Enum(ENDS),
            "End: the vCPU entered, stopped trying (left), or the trace ended (cut).",
        ),
    ),
    rules={"end is not before start": pl.col("start_ns") <= pl.col("end_ns")},
)

STEP_CAUSES: Final = (
    "memory_fault_ignored",
    "frozen_spte",
    "invalidation",
    "memslot_change",
    "left_loop",
    "many_pages",
    "pending_page",
    "block_churn",
    "block_undone",
    "unknown",
)

ZERO_STEP_CAUSES = Table(
    name="zero_step_causes",
    grain="one row per zero-step episode: cause of the repeated faults at one instruction",
    meaning="The cause of a zero-step episode is the reason why more than half of the faults that "
    "led to it were not resolved.",
    key=("source", "first_seq", "form"),
    columns=(
        SOURCE,
        Column("first_seq", U64, "zero_steps.first_seq of the episode."),
        Column("form", pl.Enum(FORMS), "How the trace shows the episode."),
        TID,
        TGID,
        TD_OF_CALL,
        Column("start_ns", I64, "First refused entry.", unit="ns"),
        Column(
            "fault_ns", I64, "First fault of the run that led to the episode.", "ns", nullable=True
        ),
        Column("cause", pl.Enum(STEP_CAUSES), "Why most of these faults were not resolved."),
        Column(
            "share",
            pl.Float64(),
            "Share of the faults explained by the cause, 0 to 1; unknown: 0.",
        ),
        Column("n_faults", U32, "Faults of the run in the trace."),
        Column("n_pages", U32, "Distinct pages among them."),
        Column("n_memory_fault", U32, "Faults passed to userspace as KVM_EXIT_MEMORY_FAULT."),
        Column(
            "n_left_loop",
            U32,
            "Faults answered busy, after which the vCPU was entered with the page missing.",
        ),
        Column(
            "n_served", U32, "Faults whose page was installed before the vCPU was entered again."
        ),
        Column("n_pending", U32, "Faults on a page installed before the entry that faulted."),
        Column("n_raced", U32, "Faults on a page that another thread was installing."),
        Column("n_invalidated", U32, "Faults on a page that was blocked, then removed or split."),
        Column(
            "n_churned",
            U32,
            "Faults on a page that was blocked, then unblocked without any other operation on it.",
        ),
        Column(
            "n_undone",
            U32,
            "Faults on a page that was blocked for an operation that failed (or may have), then "
            "unblocked.",
        ),
        Column("n_unexplained", U32, "Faults with none of these explanations."),
        Column(
            "evidence_seq",
            U64,
            "Row that shows the cause: seamcalls.seq of the block or install, else "
            "host_events.seq.",
            nullable=True,
        ),
        Column("advice", TEXT, "What to record to explain it.", nullable=True),
    ),
    rules={
        "every fault has one explanation": pl.sum_horizontal(
            "n_memory_fault",
            "n_left_loop",
            "n_served",
            "n_pending",
            "n_raced",
            "n_invalidated",
            "n_churned",
            "n_undone",
            "n_unexplained",
        )
        == pl.col("n_faults"),
        "advice is set for unknown only": (pl.col("cause") == "unknown")
        == pl.col("advice").is_not_null(),
    },
)

STEP_THRESHOLDS = Table(
    name="step_thresholds",
    grain="one row per threshold: zero-step episodes that this threshold would have caused",
    meaning="The mitigation allows a number of faults at one instruction; each run of faults that "
    "exceeds this threshold would start an episode.",
    key=("source", "threshold"),
    columns=(
        SOURCE,
        Column("threshold", U32, "Faults allowed at one instruction (TDX module: 6)."),
        Column("n_runs", U64, "Runs of faults without progress that exceed it."),
        Column("n_faults", U64, "Faults in excess of it, over all runs."),
        Column("n_vcpus", U32, "vCPUs with such a run."),
        Column("max_run", U32, "Most faults in one run; an upper bound, as RIP is not recorded."),
    ),
)

LEAF_STATS = Table(
    name="leaf_stats",
    grain="one row per SEAMCALL leaf: attempts and time that its requests took",
    meaning="A request is one operation that a caller asks for; it is retried if an attempt was "
    "answered with a retryable status.",
    key=("source", "leaf"),
    columns=(
        SOURCE,
        LEAF,
        Column("n_requests", U64, "Retry chains."),
        Column("n_seamcalls", U64, "SEAMCALL attempts."),
        Column("retried_seamcalls", U64, "Requests with at least one retryable status."),
        Column("n_busy", U64, "Attempts answered with a retryable status."),
        Column("p50_attempts", U32, "Median attempts per request.", nullable=True),
        Column("p99_attempts", U32, "99th percentile of attempts per request.", nullable=True),
        Column("max_attempts", U32, "Maximum attempts of a request, cut ones included."),
        Column("p99_ns", I64, "99th percentile of time per request.", "ns", nullable=True),
        Column("max_ns", I64, "Longest request, cut ones included.", "ns", nullable=True),
        *(Column(name, U64, f"Requests whose outcome is {name}.") for name in OUTCOMES),
    ),
)

VM_STATS = Table(
    name="vm_stats",
    grain="one row per TD: the counters that kvm->stat would hold",
    meaning="Counters that KVM's statistics would hold for each TD if KVM counted retries.",
    key=("source", "td_id", "tgid"),
    columns=(
        SOURCE,
        TD,
        TGID,
        Column("n_seamcalls", U64, "SEAMCALL attempts."),
        Column("n_requests", U64, "Retry chains."),
        Column("retried_seamcalls", U64, "Requests answered busy at least once."),
        Column("n_busy", U64, "Attempts answered busy."),
        Column("max_attempts", U32, "Maximum attempts of a request."),
        Column("n_vcpus", U32, "vCPUs with a recorded entry."),
        Column("zero_steps", U64, "Zero-step episodes, without weak ones."),
    ),
)

COUNTERS = Table(
    name="counters",
    grain="one row per increment of a counter of a TD",
    meaning="A counter is one of those that P. Bonzini proposed for kvm->stat: retried SEAMCALLs "
    "of a TD, and zero-step episodes of its vCPUs.",
    key=("source", "counter", "seq"),
    columns=(
        SOURCE,
        TD,
        TGID,
        Column("ts_ns", I64, "Time of the increment.", unit="ns"),
        Column("counter", pl.Enum(COUNTED), "Which counter: a column of vm_stats."),
        Column("total", U64, "Value of the counter after the increment; it starts at 0."),
        Column("seq", U64, "Row that was counted: seamcalls.seq, or zero_steps.first_seq."),
    ),
)

VCPU_STATS = Table(
    name="vcpu_stats",
    grain="one row per vCPU: entries, refusals and zero-step episodes",
    meaning="An entry is refused if the module answers TDH.VP.ENTER with busy, for any operand.",
    key=("source", "tid", "vp_id", "vcpu_id"),
    columns=(
        SOURCE,
        TID,
        TGID,
        TD,
        Column("vp_id", U64, "The vCPU, where recorded.", nullable=True),
        VCPU,
        Column("n_entries", U64, "Attempts to enter the vCPU."),
        Column("n_refused", U64, "Entries answered busy, with any operand."),
        Column("zero_steps", U64, "Zero-step episodes, without weak ones."),
        Column("zero_steps_weak", U64, "Possible episodes with weak evidence only."),
    ),
)

FINDING_TABLES: Final = (
    *(RETRY_CHAINS, LEAF_STATS, ZERO_STEPS, VM_STATS, VCPU_STATS, COUNTERS),
    *CAUSE_TABLES,
    *(ZERO_STEP_CAUSES, STEP_THRESHOLDS),
    *VERDICT_TABLES,
    *(BUSY_ANSWERS, ATTEMPTS, LATENCIES, POLICIES, LIMITS, LIMIT_STATEMENTS),
    *BUILD_TABLES,
    *LIFECYCLE_TABLES,
)
