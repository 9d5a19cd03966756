"""The tables about consequences of busy answers, and the verdicts."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.causes import TD_OF_CALL
from tdxtrace.tables.events import CPU, GPA, I64, LEAF, LEVEL, SOURCE, TEXT, TGID, TID, U32, U64
from tdxtrace.tables.schema import Column, Table

CONSEQUENCES: Final = (
    "host_priority_timeout",
    "later_call_failed",
    "kernel_message",
    "settled_later",
    "none_seen",
)
LOOPS: Final = ("resumable", "restartable", "interrupted", "entropy", "sys_busy", "local_retry")
PROGRESS: Final = ("seen", "not_seen", "unknown")
PHASES: Final = ("build", "run", "teardown")
VERDICTS_GIVEN: Final = ("BUG", "EXPECTED", "HOSTILE", "UNDECIDED")
PROBLEMS: Final = ("BUG", "HOSTILE")
"""Verdicts that accuse a kernel or host; those of one rule are shown as one problem."""
SUBJECTS: Final = ("busy", "broken_rule", "zero_step", "abandoned", "loop", "message")

ABANDONED_REQUESTS = Table(
    name="abandoned_requests",
    grain="one row per request abandoned busy and consequence",
    meaning="A request is abandoned if its caller stopped retrying before it succeeded; the "
    "consequences are what the trace shows later.",
    key=("source", "first_seq", "consequence"),
    columns=(
        SOURCE,
        Column("first_seq", U64, "retry_chains.first_seq of the request."),
        LEAF,
        TID,
        TGID,
        TD_OF_CALL,
        GPA,
        LEVEL,
        Column("left_ns", I64, "End of its last attempt.", unit="ns"),
        Column("final_status", U64, "Status of its last attempt."),
        Column("consequence", pl.Enum(CONSEQUENCES), "The consequence."),
        Column(
            "effect_source",
            SOURCE.dtype,
            "Input of the row that shows the consequence.",
            nullable=True,
        ),
        Column(
            "effect_seq",
            U64,
            "The row: seamcalls.seq, or kernel_messages.seq of a kernel_message.",
            nullable=True,
        ),
        Column(
            "effect_leaf", LEAF.dtype, "Leaf of the call that shows the consequence.", nullable=True
        ),
        Column("effect_status", U64, "Status of that call.", nullable=True),
        Column(
            "after_ns",
            I64,
            "Time from the last attempt to the consequence.",
            unit="ns",
            nullable=True,
        ),
    ),
    rules={
        "a consequence has a row": (pl.col("consequence") == "none_seen")
        == pl.col("effect_seq").is_null(),
        "a consequence is not before its request": pl.col("after_ns") >= 0,
    },
)

PROGRESS_LOOPS = Table(
    name="progress_loops",
    grain="one row per request or page fault repeated without a lock conflict",
    meaning="A loop is a request or page fault that was repeated without a lock conflict: "
    "the call was interrupted, lacked entropy or got SYS_BUSY, or KVM retried the fault itself.",
    key=("source", "first_seq", "loop"),
    columns=(
        SOURCE,
        Column(
            "first_seq",
            U64,
            "retry_chains.first_seq; for local_retry: page_faults.seq.",
        ),
        Column("loop", pl.Enum(LOOPS), "Kind of loop, by the status that caused it."),
        Column("leaf", LEAF.dtype, "SEAMCALL leaf; null: no SEAMCALL was made.", nullable=True),
        CPU,
        TID,
        TGID,
        TD_OF_CALL,
        GPA,
        Column("start_ns", I64, "Start of the loop.", unit="ns"),
        Column("took_ns", I64, "Observed duration of the loop.", unit="ns"),
        Column("n_repeats", U32, "Answers of this kind; local_retry: 0, not observable."),
        Column(
            "progress",
            pl.Enum(PROGRESS),
            "seen: it succeeded, or its output advanced; not_seen: its output did not change.",
        ),
        Column(
            "n_interrupts",
            U32,
            "Interrupts on that CPU during the loop; null: the trace has no interrupts.",
            nullable=True,
        ),
    ),
    rules={"end is not before start": pl.col("took_ns") >= 0},
)

TD_CONFLICTS = Table(
    name="td_conflicts",
    grain="one row per leaf and resource: busy answers whose holder belongs to another TD, or not",
    meaning="TDs share the module, the PAMT of a 2 MB range, keys and caches; two TDs conflict if "
    "a call of one held a resource that a call of the other found busy.",
    key=("source", "leaf", "resource"),
    columns=(
        SOURCE,
        LEAF,
        Column("resource", TEXT, "Busy resource.", nullable=True),
        Column("n_busy", U64, "Attempts answered busy."),
        Column("n_same_td", U64, "Of these, held by a call or the guest of the same TD."),
        Column("n_other_td", U64, "Of these, held by a call of another TD."),
        Column("n_unknown", U64, "Of these, holder or a TD unknown."),
        Column("n_tds", U32, "TDs whose attempts were answered busy."),
    ),
    rules={
        "every busy attempt is counted once": pl.col("n_same_td")
        + pl.col("n_other_td")
        + pl.col("n_unknown")
        == pl.col("n_busy")
    },
)

TIME_SHARES = Table(
    name="time_shares",
    grain="one row per TD and phase of its life: time of its threads by activity",
    meaning="The time of a TD's threads while it is built, runs and is torn down, split into calls "
    "that complete a request, retries, pauses between attempts, the guest, and the rest.",
    key=("source", "td_id", "phase"),
    columns=(
        SOURCE,
        TD_OF_CALL,
        Column(
            "phase",
            pl.Enum(PHASES),
            "build: before the first vCPU entry; teardown: after the last.",
        ),
        Column("start_ns", I64, "Start of the first call of the phase.", unit="ns"),
        Column("end_ns", I64, "End of its last call.", unit="ns"),
        Column("n_calls", U64, "SEAMCALLs other than TDH.VP.ENTER."),
        Column("n_retries", U64, "Calls that did not complete their request."),
        Column("done_ns", I64, "Thread time in calls that completed a request.", unit="ns"),
        Column(
            "retry_ns", I64, "Thread time in calls that did not complete their request.", unit="ns"
        ),
        Column("wait_ns", I64, "Thread time between attempts at the same request.", unit="ns"),
        Column("guest_ns", I64, "Thread time in TDH.VP.ENTER, where probed.", unit="ns"),
        Column(
            "rest_ns",
            I64,
            "Remaining time of these threads, from their first call to their last.",
            unit="ns",
        ),
    ),
    rules={"end is not before start": pl.col("start_ns") <= pl.col("end_ns")},
)

VERDICTS = Table(
    name="verdicts",
    grain="one row per group of findings with the same explanation",
    meaning="A verdict is EXPECTED where the module's rules explain the findings, BUG where the "
    "kernel broke a rule, HOSTILE where the host repeatedly kept a vCPU from entering without a "
    "reason, and UNDECIDED where evidence is missing.  A guest is never called HOSTILE: a host "
    "trace does not record its TDCALLs.",
    key=("source", "subject", "td_id", "leaf", "what"),
    columns=(
        SOURCE,
        Column("verdict", pl.Enum(VERDICTS_GIVEN), "The verdict."),
        Column("subject", pl.Enum(SUBJECTS), "Kind of finding."),
        TD_OF_CALL,
        Column("leaf", LEAF.dtype, "SEAMCALL leaf, if any.", nullable=True),
        Column("what", TEXT, "Short explanation: the cause, consequence or rule."),
        Column("n_rows", U64, "Findings in the group."),
        Column("sentence", TEXT, "The verdict in one sentence."),
        Column("evidence_table", TEXT, "Table of the findings."),
        Column(
            "evidence", TEXT, "seq (or first_seq) of at most five findings, separated by spaces."
        ),
        Column("rule", TEXT, "Name of the rule that decided."),
        Column("rule_source", TEXT, "Source of the rule."),
        Column("decided_by", TEXT, "What to record to decide it; null: decided.", nullable=True),
    ),
    rules={
        "decided_by is set for UNDECIDED only": (pl.col("verdict") == "UNDECIDED")
        == pl.col("decided_by").is_not_null(),
        "a verdict has evidence": pl.col("n_rows") >= 1,
    },
)

VERDICT_TABLES: Final = (
    ABANDONED_REQUESTS,
    PROGRESS_LOOPS,
    TD_CONFLICTS,
    TIME_SHARES,
    VERDICTS,
)
