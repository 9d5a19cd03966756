"""The tables about what came of busy answers, and whose fault it was: verdicts and their parts."""

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
SUBJECTS: Final = ("busy", "broken_rule", "zero_step", "abandoned", "loop", "message")

ABANDONED_REQUESTS = Table(
    name="abandoned_requests",
    grain="one row per request that its caller left busy, and each thing that came of it",
    meaning="A request is left busy if its caller went on to something else before it was done; "
    "what came of it is what the trace shows later.",
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
        Column("final_status", U64, "What that attempt was answered."),
        Column("consequence", pl.Enum(CONSEQUENCES), "What came of it."),
        Column("effect_source", SOURCE.dtype, "Input of the row that shows it.", nullable=True),
        Column(
            "effect_seq",
            U64,
            "That row: seamcalls.seq, or kernel_messages.seq of a kernel_message.",
            nullable=True,
        ),
        Column("effect_leaf", LEAF.dtype, "Leaf of the call that shows it.", nullable=True),
        Column("effect_status", U64, "Its status.", nullable=True),
        Column("after_ns", I64, "From the last attempt to then.", unit="ns", nullable=True),
    ),
    rules={
        "a consequence has a row": (pl.col("consequence") == "none_seen")
        == pl.col("effect_seq").is_null(),
        "a consequence comes later": pl.col("after_ns") >= 0,
    },
)

PROGRESS_LOOPS = Table(
    name="progress_loops",
    grain="one row per request, or fault, that was repeated though nothing held a lock",
    meaning="A loop is a request, or a fault, that was repeated though nothing held a lock: "
    "interrupted, short of entropy, the module busy, or KVM's own retrying.",
    key=("source", "first_seq", "loop"),
    columns=(
        SOURCE,
        Column(
            "first_seq",
            U64,
            "retry_chains.first_seq; of a local_retry page_faults.seq.",
        ),
        Column("loop", pl.Enum(LOOPS), "What was repeated, by its answer."),
        Column("leaf", LEAF.dtype, "SEAMCALL leaf; null: none was made.", nullable=True),
        CPU,
        TID,
        TGID,
        TD_OF_CALL,
        GPA,
        Column("start_ns", I64, "When it began.", unit="ns"),
        Column("took_ns", I64, "How long it went on, as far as is seen.", unit="ns"),
        Column("n_repeats", U32, "Answers of this kind; local_retry: not seen, 0."),
        Column(
            "progress",
            pl.Enum(PROGRESS),
            "seen: it ended well, or its output moved on; not_seen: it was still the same.",
        ),
        Column(
            "n_interrupts",
            U32,
            "Interrupts on that CPU in that time; null: none was recorded anywhere.",
            nullable=True,
        ),
    ),
    rules={"time runs forward": pl.col("took_ns") >= 0},
)

TD_CONFLICTS = Table(
    name="td_conflicts",
    grain="one row per leaf and resource: whether those who made it busy were of another TD",
    meaning="TDs share the module, the PAMT of a 2 MB range, keys and caches; they conflict if a "
    "call of one held what a call of another one found busy.",
    key=("source", "leaf", "resource"),
    columns=(
        SOURCE,
        LEAF,
        Column("resource", TEXT, "What was busy.", nullable=True),
        Column("n_busy", U64, "Attempts answered busy."),
        Column("n_same_td", U64, "Of these, held by the same TD's calls or guest."),
        Column("n_other_td", U64, "Held by a call of another TD."),
        Column("n_unknown", U64, "Holder, or one of the TDs, not known."),
        Column("n_tds", U32, "TDs whose attempts were answered so."),
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
    grain="one row per TD and phase of its life: where its threads' time in SEAMCALLs went",
    meaning="While a TD is built, runs and is torn down, its threads spend their time in calls "
    "that settle a request, in calls that do not, between attempts, in the guest, and elsewhere.",
    key=("source", "td_id", "phase"),
    columns=(
        SOURCE,
        TD_OF_CALL,
        Column("phase", pl.Enum(PHASES), "build: before the first entry; teardown: after all."),
        Column("start_ns", I64, "First call of the phase.", unit="ns"),
        Column("end_ns", I64, "End of its last call.", unit="ns"),
        Column("n_calls", U64, "SEAMCALLs but TDH.VP.ENTER."),
        Column("n_retries", U64, "Those that did not settle their request."),
        Column("done_ns", I64, "Thread time in calls that settled one.", unit="ns"),
        Column("retry_ns", I64, "Thread time in calls that did not.", unit="ns"),
        Column("wait_ns", I64, "Thread time between attempts at one request.", unit="ns"),
        Column("guest_ns", I64, "Thread time in TDH.VP.ENTER, where probed.", unit="ns"),
        Column(
            "rest_ns",
            I64,
            "What else the threads that made calls did from their first to their last.",
            unit="ns",
        ),
    ),
    rules={"time runs forward": pl.col("start_ns") <= pl.col("end_ns")},
)

VERDICTS = Table(
    name="verdicts",
    grain="one row per group of findings that have the same explanation",
    meaning="A verdict is EXPECTED where the module's rules explain what was seen, BUG where the "
    "kernel broke one, HOSTILE where the guest did, and UNDECIDED where the trace cannot tell.",
    key=("source", "subject", "td_id", "leaf", "what"),
    columns=(
        SOURCE,
        Column("verdict", pl.Enum(VERDICTS_GIVEN), "Whose fault it is."),
        Column("subject", pl.Enum(SUBJECTS), "What it is about."),
        TD_OF_CALL,
        Column("leaf", LEAF.dtype, "SEAMCALL leaf, where one is concerned.", nullable=True),
        Column("what", TEXT, "The explanation in a word or two: cause, consequence, rule."),
        Column("n_rows", U64, "Findings in the group."),
        Column("sentence", TEXT, "The verdict in one sentence."),
        Column("evidence_table", TEXT, "Table that the findings are rows of."),
        Column("evidence", TEXT, "Their seq (first_seq), at most five, separated by blanks."),
        Column("rule", TEXT, "Name of the rule that decided."),
        Column("rule_source", TEXT, "Where the rule comes from."),
        Column(
            "decided_by", TEXT, "What capture would decide; null: it is decided.", nullable=True
        ),
    ),
    rules={
        "what is not decided says what would decide it": (pl.col("verdict") == "UNDECIDED")
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
