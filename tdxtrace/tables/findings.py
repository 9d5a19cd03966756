"""The finding tables, what it means: declared once, with units and grain."""

from __future__ import annotations

from typing import Final

import polars as pl

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
from tdxtrace.tables.limits import ATTEMPTS, BUSY_ANSWERS, LATENCIES, LIMITS, POLICIES
from tdxtrace.tables.schema import Column, Table
from tdxtrace.tables.verdicts import VERDICT_TABLES

OUTCOMES: Final = names(Outcome)
IDENTITIES: Final = ("request", "gpa", "td", "thread")
CUTS: Final = ("trace_start", "trace_end", "lost_events")
FORMS: Final = ("busy_sept", "failed_vmentry", "emulated_ept_violation")
STRENGTHS: Final = ("proof", "strong", "weak")
ENDS: Final = ("entered", "left", "cut")

RETRY_CHAINS = Table(
    name="retry_chains",
    grain="one row per request, however many SEAMCALLs it took",
    meaning="A retry chain is all attempts at one request, from the first to the one that settles "
    "it; one that succeeds at once is a chain of one.",
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
            "The TD: as the capture says, else the only one its thread or process used.",
            nullable=True,
        ),
        Column("vp_id", U64, "The vCPU, where the capture says.", nullable=True),
        GPA,
        LEVEL,
        Column("start_ns", I64, "Start of the first attempt (its return, if no entry).", unit="ns"),
        Column("end_ns", I64, "End of the last attempt (its entry, if no return).", unit="ns"),
        Column(
            "took_ns",
            I64,
            "First attempt's start to the last one's end (of VP.ENTER: to its start, for then "
            "the guest runs); null where either was not seen.",
            unit="ns",
            nullable=True,
        ),
        Column("n_attempts", U32, "SEAMCALLs in the chain, the last included."),
        Column("n_busy", U32, "Attempts that were answered with a retryable status."),
        Column("n_segments", U32, "Stretches between re-entries of the vCPU on the same fault."),
        Column("outcome", pl.Enum(OUTCOMES), "How the request ended."),
        Column("final_status", U64, "Status of the last attempt; null: none seen.", nullable=True),
        Column("identity", pl.Enum(IDENTITIES), "What joined the attempts, least to trust last."),
        Column("cut_by", pl.Enum(CUTS), "Why it is censored; null unless cut.", nullable=True),
        Column(
            "settled_seq",
            U64,
            "seamcalls.seq of the call that settled it elsewhere.",
            nullable=True,
        ),
    ),
    rules={
        "time runs forward": pl.col("start_ns") <= pl.col("end_ns"),
        "a chain has an attempt": pl.col("n_attempts") >= 1,
        "all but the last are busy": pl.col("n_busy").is_between(
            pl.col("n_attempts") - 1, pl.col("n_attempts")
        ),
        "a cut has a reason": (pl.col("outcome") == "cut") == pl.col("cut_by").is_not_null(),
    },
)

ZERO_STEPS = Table(
    name="zero_steps",
    grain="one row per episode in which zero-step mitigation kept a vCPU from entering",
    meaning="A zero-step episode is a run of entries of one vCPU that the TDX module's zero-step "
    "mitigation refused.",
    key=("source", "first_seq", "form"),
    columns=(
        SOURCE,
        Column("first_seq", U64, "Row that opens it: seamcalls.seq or vm_entries.seq."),
        Column("last_seq", U64, "Last row in which the vCPU was kept out."),
        TID,
        TGID,
        TD,
        Column("vp_id", U64, "The vCPU, where the capture says.", nullable=True),
        VCPU,
        Column("start_ns", I64, "First entry that was refused.", unit="ns"),
        Column("end_ns", I64, "Last entry that was refused.", unit="ns"),
        Column("form", pl.Enum(FORMS), "How it shows."),
        Column("strength", pl.Enum(STRENGTHS), "How sure the form is."),
        Column("n_refused", U32, "Entries refused with a busy answer (or a failed entry)."),
        Column("n_emulated", U32, "EPT-violation exits inside it that entered nothing (weak)."),
        Column("n_faults_before", U32, "EPT violations in a row that led to it."),
        Column("gpa", U64, "Last page that faulted before it.", nullable=True),
        Column("ended", pl.Enum(ENDS), "Whether the vCPU entered again, left, or the trace ends."),
    ),
    rules={"time runs forward": pl.col("start_ns") <= pl.col("end_ns")},
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
    "unknown",
)

ZERO_STEP_CAUSES = Table(
    name="zero_step_causes",
    grain="one row per zero-step episode: what made the vCPU fault so often at one instruction",
    meaning="The cause of a zero-step episode is what kept more than half of the faults that led "
    "to it from being settled.",
    key=("source", "first_seq", "form"),
    columns=(
        SOURCE,
        Column("first_seq", U64, "zero_steps.first_seq of the episode."),
        Column("form", pl.Enum(FORMS), "How it shows."),
        TID,
        TGID,
        TD_OF_CALL,
        Column("start_ns", I64, "First entry that was refused.", unit="ns"),
        Column("fault_ns", I64, "First fault of the run that led to it.", "ns", nullable=True),
        Column("cause", pl.Enum(STEP_CAUSES), "Why most of these faults were not settled."),
        Column(
            "share",
            pl.Float64(),
            "Share of the faults that it explains, 0 to 1; unknown: 0.",
        ),
        Column("n_faults", U32, "Faults of the run that the trace shows."),
        Column("n_pages", U32, "Different pages among them."),
        Column("n_memory_fault", U32, "Went to userspace as KVM_EXIT_MEMORY_FAULT."),
        Column("n_left_loop", U32, "Met busy, and the vCPU was entered again with it unsettled."),
        Column("n_served", U32, "The page was installed before the vCPU was entered again."),
        Column("n_pending", U32, "The page had been installed before the entry that faulted."),
        Column("n_raced", U32, "Another thread was installing the page."),
        Column("n_invalidated", U32, "The page was blocked, and then taken away or split."),
        Column("n_churned", U32, "The page was blocked, and then unblocked as it was."),
        Column("n_unexplained", U32, "None of these."),
        Column(
            "evidence_seq",
            U64,
            "Row that shows the cause: seamcalls.seq of the block or install, else "
            "host_events.seq.",
            nullable=True,
        ),
        Column("advice", TEXT, "What capture would have told.", nullable=True),
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
            "n_unexplained",
        )
        == pl.col("n_faults"),
        "what is unknown has advice": (pl.col("cause") == "unknown")
        == pl.col("advice").is_not_null(),
    },
)

STEP_THRESHOLDS = Table(
    name="step_thresholds",
    grain="one row per threshold: the episodes that zero-step mitigation would have made with it",
    meaning="The mitigation lets so many faults at one instruction pass; each run of faults that "
    "goes beyond is an episode in the making.",
    key=("source", "threshold"),
    columns=(
        SOURCE,
        Column("threshold", U32, "Faults at one instruction that are let pass (the module: 6)."),
        Column("n_runs", U64, "Runs of faults without progress that go beyond it."),
        Column("n_faults", U64, "Faults beyond it, over all runs."),
        Column("n_vcpus", U32, "vCPUs with such a run."),
        Column("max_run", U32, "Most faults in one run; upper bound, for RIP is not seen."),
    ),
)

LEAF_STATS = Table(
    name="leaf_stats",
    grain="one row per SEAMCALL leaf: how many attempts and how much time requests took",
    meaning="A request is what one caller wants done once; it is retried if an attempt at it was "
    "answered with a retryable status.",
    key=("source", "leaf"),
    columns=(
        SOURCE,
        LEAF,
        Column("n_requests", U64, "Retry chains."),
        Column("n_seamcalls", U64, "SEAMCALL attempts."),
        Column("retried_seamcalls", U64, "Requests that met a retryable status at least once."),
        Column("n_busy", U64, "Attempts answered with a retryable status."),
        Column("p50_attempts", U32, "Half of the requests took at most so many.", nullable=True),
        Column("p99_attempts", U32, "99 % of the requests took at most so many.", nullable=True),
        Column("max_attempts", U32, "Most attempts that one request took, cut ones included."),
        Column("p99_ns", I64, "99 % of the requests took at most so long.", "ns", nullable=True),
        Column("max_ns", I64, "Longest request, cut ones included.", "ns", nullable=True),
        *(Column(name, U64, f"Requests whose outcome is {name}.") for name in OUTCOMES),
    ),
)

VM_STATS = Table(
    name="vm_stats",
    grain="one row per TD: the counters that kvm->stat would hold",
    meaning="What KVM's statistics would count for each TD if it counted retries.",
    key=("source", "td_id", "tgid"),
    columns=(
        SOURCE,
        TD,
        TGID,
        Column("n_seamcalls", U64, "SEAMCALL attempts."),
        Column("n_requests", U64, "Retry chains."),
        Column("retried_seamcalls", U64, "Requests that met busy at least once (the seed's stat)."),
        Column("n_busy", U64, "Attempts answered busy."),
        Column("max_attempts", U32, "Most attempts one request took."),
        Column("n_vcpus", U32, "vCPUs seen to enter."),
        Column("zero_steps", U64, "Zero-step episodes, weak ones left out."),
    ),
)

VCPU_STATS = Table(
    name="vcpu_stats",
    grain="one row per vCPU: entries, refusals and zero-step episodes",
    meaning="An entry is refused if the module answers TDH.VP.ENTER with busy, whatever was busy.",
    key=("source", "tid", "vp_id", "vcpu_id"),
    columns=(
        SOURCE,
        TID,
        TGID,
        TD,
        Column("vp_id", U64, "The vCPU, where the capture says.", nullable=True),
        VCPU,
        Column("n_entries", U64, "Attempts to enter it."),
        Column("n_refused", U64, "Entries answered busy, any operand."),
        Column("zero_steps", U64, "Zero-step episodes, weak ones left out."),
        Column("zero_steps_weak", U64, "Possible episodes that only a weak sign shows."),
    ),
)

FINDING_TABLES: Final = (
    *(RETRY_CHAINS, LEAF_STATS, ZERO_STEPS, VM_STATS, VCPU_STATS),
    *CAUSE_TABLES,
    *(ZERO_STEP_CAUSES, STEP_THRESHOLDS),
    *VERDICT_TABLES,
    *(BUSY_ANSWERS, ATTEMPTS, LATENCIES, POLICIES, LIMITS),
)
