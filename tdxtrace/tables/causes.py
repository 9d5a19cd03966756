"""The tables about causes: lock holders, broken kernel rules, effect of kernel locks, waits."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.enums import Cause, names
from tdxtrace.tables.events import (
    BOOL,
    GPA,
    I32,
    I64,
    LEAF,
    SOURCE,
    TD,
    TEXT,
    TGID,
    TID,
    U16,
    U32,
    U64,
)
from tdxtrace.tables.schema import Column, Table

CAUSES: Final = names(Cause)
CONFIDENCES: Final = ("proof", "strong", "weak", "none")
LACKS: Final = (
    "entry_probes",
    "holder_probes",
    "arguments",
    "lost_events",
    "trace_edge",
    "generation",
    "clock",
    "holder",
)
BUG_RULES: Final = (
    "tdr_busy",
    "tdvpr_busy",
    "busy_before_finalize",
    "busy_after_kick",
    "track_without_kick",
    "aug_busy_on_entry",
    "dropped_block",
    "mmu_lock_excludes",
)
LOCKS: Final = ("seamcall_lock", "mmu_lock")
STATUS = Column("status", U64, "Completion status (RAX) of the attempt.")
VP = Column("vp_id", U64, "The vCPU, where recorded.", nullable=True)
TD_OF_CALL = Column(
    "td_id",
    U64,
    "The TD: as recorded, else the only one used by the thread or process.",
    nullable=True,
)

BUSY_CAUSES = Table(
    name="busy_causes",
    grain="one row per candidate cause of a busy attempt; rank 1 is the most likely",
    meaning="The cause of a busy answer is the holder of the lock: an overlapping host call whose "
    "lock conflicts, an entry that zero-step mitigation armed, the guest, or a kernel bug.",
    key=("source", "seq", "rank"),
    columns=(
        SOURCE,
        Column("seq", U64, "seamcalls.seq of the busy attempt."),
        Column("rank", U32, "1: most likely; then the other candidates, best first."),
        Column("start_ns", I64, "Start of the attempt.", unit="ns", nullable=True),
        Column("end_ns", I64, "End of the attempt.", unit="ns"),
        LEAF,
        TID,
        TGID,
        TD_OF_CALL,
        VP,
        GPA,
        STATUS,
        Column("resource", TEXT, "Busy resource, from the operand ID and the leaf.", nullable=True),
        Column("cause", pl.Enum(CAUSES), "What made it busy."),
        Column("confidence", pl.Enum(CONFIDENCES), "Confidence; none: unexplained."),
        Column("n_tied", U32, "Candidates that fit as well as this one, itself included."),
        Column(
            "holder_seq",
            U64,
            "Row of the holder: seamcalls.seq, or vm_entries.seq of an entry recorded by KVM's "
            "events only; null: no host call, or unknown.",
            nullable=True,
        ),
        Column("holder_leaf", U16, "Leaf of the holder.", nullable=True),
        Column("holder_tid", I32, "Host thread of the holder.", nullable=True),
        Column("holder_td_id", U64, "TD of the holder.", nullable=True),
        Column("holder_vp_id", U64, "vCPU of the holder, where recorded.", nullable=True),
        Column(
            "overlap_ns",
            I64,
            "Overlap of the attempt with the time the holder had the lock; negative: they overlap "
            "only within the clock resolution.",
            unit="ns",
            nullable=True,
        ),
        Column("lock", TEXT, "Name of the lock in the TDX module.", nullable=True),
        Column("mode", TEXT, "Mode requested: SH (shared) or EX (exclusive).", nullable=True),
        Column("holder_mode", TEXT, "Mode held: SH or EX.", nullable=True),
        Column(
            "generations",
            TEXT,
            "Lock generations of the TDX module, of those possible for this trace, for which "
            "this row holds, such as BC.",
        ),
        Column("rule", pl.Enum(BUG_RULES), "The broken rule, for kernel_bug.", nullable=True),
        Column("lacks", pl.Enum(LACKS), "Missing evidence, for unexplained.", nullable=True),
        Column("advice", TEXT, "What to record to explain it.", nullable=True),
    ),
    rules={
        "lacks is set for unexplained only": (pl.col("cause") == "unexplained")
        == pl.col("lacks").is_not_null(),
        "confidence is none for unexplained only": (pl.col("cause") == "unexplained")
        == (pl.col("confidence") == "none"),
        "a kernel_bug names its rule": (pl.col("cause") == "kernel_bug")
        == pl.col("rule").is_not_null(),
        "a host_conflict names its holder": (pl.col("cause") != "host_conflict")
        | pl.col("holder_seq").is_not_null(),
        "ranks begin at 1": pl.col("rank") >= 1,
    },
)

BROKEN_RULES = Table(
    name="broken_rules",
    grain="one row per call that shows that the kernel broke a rule",
    key=("source", "seq", "rule"),
    columns=(
        SOURCE,
        Column("seq", U64, "seamcalls.seq of the call that shows it."),
        Column("rule", pl.Enum(BUG_RULES), "The rule; its text and source: bug_rule_table()."),
        Column("end_ns", I64, "End of the call.", unit="ns"),
        LEAF,
        TID,
        TGID,
        TD_OF_CALL,
        GPA,
        STATUS,
        Column(
            "evidence_seq",
            U64,
            "The other row of the evidence: the holder, the dropped BLOCK, the vCPU that was "
            "not kicked, the call that it overlaps.",
            nullable=True,
        ),
        Column("confidence", pl.Enum(CONFIDENCES), "Confidence."),
    ),
)

CAUSE_SHARES = Table(
    name="cause_shares",
    grain="one row per leaf, resource and cause: number of busy attempts",
    key=("source", "leaf", "resource", "cause"),
    columns=(
        SOURCE,
        LEAF,
        Column("resource", TEXT, "Busy resource, from the operand ID and the leaf.", nullable=True),
        Column("cause", pl.Enum(CAUSES), "What made it busy."),
        Column("n_busy", U64, "Busy attempts with this cause."),
        Column("n_all", U64, "All busy attempts of the source: the sum of n_busy."),
        Column(
            "share_ppm",
            U32,
            "n_busy / n_all in parts per million, rounded so that a source sums to 1,000,000.",
            unit="ppm",
        ),
        Column("n_sure", U64, "Of n_busy, those with confidence proof or strong."),
    ),
    rules={"n_busy is at most n_all": pl.col("n_busy") <= pl.col("n_all")},
)

LOCK_VALUES = Table(
    name="lock_values",
    grain="one row per TD, leaf and lock that a kernel could take around SEAMCALLs: its effect",
    key=("source", "lock", "td_id", "leaf"),
    columns=(
        SOURCE,
        Column(
            "lock",
            pl.Enum(LOCKS),
            "seamcall_lock: one per TD around S-EPT calls; mmu_lock: as mainline uses it.",
        ),
        TD,
        LEAF,
        Column(
            "n_calls", U64, "Attempts of the leaf; the lock would be taken once for each request."
        ),
        Column("n_busy", U64, "Attempts answered busy."),
        Column("n_removed", U64, "Busy attempts that the lock would have prevented."),
        Column(
            "n_kept",
            U64,
            "Busy attempts that it would not have prevented: held by guests or entries.",
        ),
        Column("n_unknown", U64, "Unexplained busy attempts: effect unknown."),
        Column("busy_ns", I64, "Time spent in the prevented attempts.", unit="ns"),
        Column("waited_ns", I64, "Time that threads would have waited for the lock.", unit="ns"),
        Column("max_wait_ns", I64, "Longest single wait.", unit="ns"),
        Column("n_waits", U64, "Calls that would have waited."),
    ),
    rules={
        "every busy attempt is counted once": pl.col("n_removed")
        + pl.col("n_kept")
        + pl.col("n_unknown")
        == pl.col("n_busy")
    },
)

ENTRY_WAITS = Table(
    name="entry_waits",
    grain="one row per run of consecutive entries of one vCPU refused as the SEPT tree was busy",
    key=("source", "first_seq"),
    columns=(
        SOURCE,
        Column("first_seq", U64, "seamcalls.seq of the first refused entry."),
        TID,
        TGID,
        TD_OF_CALL,
        VP,
        Column("start_ns", I64, "Start of the first refused entry.", unit="ns"),
        Column("n_refused", U32, "Entries refused in the run."),
        Column("n_holders", U32, "Calls that could have held the tree at the first refusal."),
        Column("last_end_ns", I64, "End of the last of these calls.", unit="ns", nullable=True),
        Column(
            "wait_ns",
            I64,
            "Time that the vCPU would have waited for mmu_lock; null: no holder is known.",
            unit="ns",
            nullable=True,
        ),
        Column("n_after", U32, "Entries refused after that wait would have ended."),
        Column(
            "waits_for_all",
            BOOL,
            "Whether KVM holds mmu_lock in all of these calls.",
            nullable=True,
        ),
        Column(
            "sufficed",
            BOOL,
            "Whether one wait would have been enough; null: no holder is known.",
            nullable=True,
        ),
        Column("entered_ns", I64, "Start of the entry that succeeded.", unit="ns", nullable=True),
    ),
    rules={"a run has a refused entry": pl.col("n_refused") >= 1},
)

CAUSE_TABLES: Final = (BUSY_CAUSES, CAUSE_SHARES, BROKEN_RULES, LOCK_VALUES, ENTRY_WAITS)
