"""The tables about causes: who made a SEAMCALL busy, which rules were broken, what a lock buys."""

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
)
LOCKS: Final = ("seamcall_lock", "mmu_lock")
STATUS = Column("status", U64, "Completion status (RAX) that is to be explained.")
VP = Column("vp_id", U64, "The vCPU, where the capture says.", nullable=True)
TD_OF_CALL = Column(
    "td_id",
    U64,
    "The TD: as the capture says, else the only one its thread or process used.",
    nullable=True,
)

BUSY_CAUSES = Table(
    name="busy_causes",
    grain="one row per candidate cause of an attempt that was answered busy; rank 1 is the answer",
    meaning="The cause of a busy answer is who held the lock: a host call that overlaps and whose "
    "lock excludes it, an armed entry, the guest, or a rule that the kernel broke.",
    key=("source", "seq", "rank"),
    columns=(
        SOURCE,
        Column("seq", U64, "seamcalls.seq of the busy attempt."),
        Column("rank", U32, "1: the answer; then what else fits, best first."),
        Column("start_ns", I64, "Start of the attempt.", unit="ns", nullable=True),
        Column("end_ns", I64, "Its return.", unit="ns"),
        LEAF,
        TID,
        TGID,
        TD_OF_CALL,
        VP,
        GPA,
        STATUS,
        Column("resource", TEXT, "What was busy: operand id, read by leaf.", nullable=True),
        Column("cause", pl.Enum(CAUSES), "Who made it busy."),
        Column("confidence", pl.Enum(CONFIDENCES), "How sure; none: unexplained."),
        Column("n_tied", U32, "Candidates that fit as well as this one, itself included."),
        Column(
            "holder_seq",
            U64,
            "Row of the holder: seamcalls.seq, or vm_entries.seq of an entry that only KVM's own "
            "events show; null: no host call, or not known which.",
            nullable=True,
        ),
        Column("holder_leaf", U16, "Its leaf.", nullable=True),
        Column("holder_tid", I32, "Its host thread.", nullable=True),
        Column("holder_td_id", U64, "Its TD.", nullable=True),
        Column("holder_vp_id", U64, "Its vCPU, where the capture says.", nullable=True),
        Column(
            "overlap_ns",
            I64,
            "How long the attempt and the holder's grip on the lock overlap; below 0: they only "
            "meet within the clock's resolution.",
            unit="ns",
            nullable=True,
        ),
        Column("lock", TEXT, "The module's name of the lock.", nullable=True),
        Column("mode", TEXT, "How the attempt wanted it: SH or EX.", nullable=True),
        Column("holder_mode", TEXT, "How the holder had it: SH or EX.", nullable=True),
        Column(
            "generations",
            TEXT,
            "Lock generations of the module (of those that the trace and the user leave) under "
            "which this row holds, such as BC.",
        ),
        Column("rule", pl.Enum(BUG_RULES), "The rule that a kernel_bug broke.", nullable=True),
        Column("lacks", pl.Enum(LACKS), "Why it is unexplained.", nullable=True),
        Column("advice", TEXT, "What capture would have told.", nullable=True),
    ),
    rules={
        "only the unexplained lacks something": (pl.col("cause") == "unexplained")
        == pl.col("lacks").is_not_null(),
        "only the unexplained has no confidence": (pl.col("cause") == "unexplained")
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
    grain="one row per call that shows that a rule was broken which a correct kernel keeps",
    key=("source", "seq", "rule"),
    columns=(
        SOURCE,
        Column("seq", U64, "seamcalls.seq of the call that shows it."),
        Column("rule", pl.Enum(BUG_RULES), "Which rule; its text and source: bug_rule_table()."),
        Column("end_ns", I64, "When the call returned.", unit="ns"),
        LEAF,
        TID,
        TGID,
        TD_OF_CALL,
        GPA,
        STATUS,
        Column(
            "evidence_seq",
            U64,
            "The other row that it follows from: the holder, the dropped BLOCK, the TRACK before.",
            nullable=True,
        ),
        Column("confidence", pl.Enum(CONFIDENCES), "How sure."),
    ),
)

CAUSE_SHARES = Table(
    name="cause_shares",
    grain="one row per leaf, resource and cause: how many busy attempts it explains",
    key=("source", "leaf", "resource", "cause"),
    columns=(
        SOURCE,
        LEAF,
        Column("resource", TEXT, "What was busy: operand id, read by leaf.", nullable=True),
        Column("cause", pl.Enum(CAUSES), "Who made it busy."),
        Column("n_busy", U64, "Busy attempts of that cause."),
        Column("n_all", U64, "Busy attempts of the source: what n_busy sums to."),
        Column(
            "share_ppm",
            U32,
            "n_busy in n_all in millionths, rounded so that those of a source sum to 1,000,000.",
            unit="ppm",
        ),
        Column("n_sure", U64, "Of n_busy, those with proof or strong confidence."),
    ),
    rules={"a part is no more than the whole": pl.col("n_busy") <= pl.col("n_all")},
)

LOCK_VALUES = Table(
    name="lock_values",
    grain="one row per lock that a kernel could take around SEAMCALLs, per TD and leaf",
    key=("source", "lock", "td_id", "leaf"),
    columns=(
        SOURCE,
        Column("lock", pl.Enum(LOCKS), "The seed's, or mainline's use of mmu_lock."),
        TD,
        LEAF,
        Column("n_calls", U64, "Attempts of the leaf: the lock would be taken for each request."),
        Column("n_busy", U64, "Attempts answered busy."),
        Column("n_removed", U64, "Busy attempts that could not have met their holder."),
        Column("n_kept", U64, "Busy attempts that the lock does not touch: guests, entries."),
        Column("n_unknown", U64, "Busy attempts that are unexplained: it may, or may not."),
        Column("busy_ns", I64, "Time that the removed attempts took.", unit="ns"),
        Column("waited_ns", I64, "Time threads would have waited for the lock.", unit="ns"),
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
    grain="one row per run of entries of one vCPU that were refused because of the SEPT tree",
    key=("source", "first_seq"),
    columns=(
        SOURCE,
        Column("first_seq", U64, "seamcalls.seq of the first refused entry."),
        TID,
        TGID,
        TD_OF_CALL,
        VP,
        Column("start_ns", I64, "When the first of them began.", unit="ns"),
        Column("n_refused", U32, "Entries refused: what was spent instead of one wait."),
        Column("n_holders", U32, "Calls that could hold the tree at the first of them."),
        Column("last_end_ns", I64, "When the last of those ended.", unit="ns", nullable=True),
        Column(
            "wait_ns",
            I64,
            "How long the vCPU would have waited for mmu_lock; null if no holder is known.",
            unit="ns",
            nullable=True,
        ),
        Column("n_after", U32, "Entries that were refused again after that."),
        Column(
            "waits_for_all",
            BOOL,
            "Whether all of those holders work under mmu_lock.",
            nullable=True,
        ),
        Column(
            "sufficed",
            BOOL,
            "Whether one wait would have let it in; null if no holder is known.",
            nullable=True,
        ),
        Column("entered_ns", I64, "When it was let in.", unit="ns", nullable=True),
    ),
    rules={"a run has an entry": pl.col("n_refused") >= 1},
)

CAUSE_TABLES: Final = (BUSY_CAUSES, CAUSE_SHARES, BROKEN_RULES, LOCK_VALUES, ENTRY_WAITS)
