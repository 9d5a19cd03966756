"""The truth tables: ground truth of a simulated run."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.events import BOOL, I32, I64, LEAF, TEXT, U16, U32, U64
from tdxtrace.tables.findings import OUTCOMES
from tdxtrace.tables.schema import Column, Table

CHAIN = Column("chain", U32, "Number of the request, in order of start.")
TD = Column("td_id", U64, "The TD: address of its struct tdx_td, as probes print it.")
VCPU = Column("vcpu_id", U32, "vCPU number.", nullable=True)
TID = Column("tid", I32, "Host thread; in interrupt context the interrupted one.")
WHEN = Column("ts_ns", I64, "Time on the trace's clock.", unit="ns")
TRUE_FORMS: Final = ("busy_sept", "emulated_ept_violation", "armed_only")
CONDUCTS: Final = ("honest", "buggy", "hostile")
TRUE_STEP_CAUSES: Final = (
    "memory_fault",
    "refused",
    "churned",
    "invalidated",
    "raced",
    "left_loop",
    "pending",
    "served",
    "other",
)
_ATTEMPT = Column("attempt", U32, "Number within its chain, from 1.")


def _other(name: str, meaning: str) -> tuple[Column, Column]:
    """Chain and attempt of another call; null if it belongs to no chain."""
    return (
        Column(f"{name}_chain", U32, f"Chain of {meaning}.", nullable=True),
        Column(f"{name}_attempt", U32, "Its number within that chain.", nullable=True),
    )


TRUTH_CHAINS = Table(
    name="truth_chains",
    grain="one row per request made by the simulated host",
    key=("chain",),
    columns=(
        CHAIN,
        LEAF,
        TID,
        Column("tgid", I32, "Process of the thread."),
        TD,
        VCPU,
        Column("gpa", U64, "Guest page.", nullable=True),
        Column("level", U32, "Level as the module counts: 0 is 4K.", nullable=True),
        Column("start_ns", I64, "Start of the first attempt.", unit="ns"),
        Column("end_ns", I64, "End of the last attempt.", unit="ns"),
        Column("n_attempts", U32, "SEAMCALLs made."),
        Column(
            "n_calls",
            U32,
            "Calls of the kernel's wrapper; fewer than attempts where the wrapper retries.",
        ),
        Column("n_busy", U32, "Attempts that did not complete the request."),
        Column(
            "n_segments",
            U32,
            "Parts of the chain, separated by re-entries of the vCPU with the same fault.",
        ),
        Column("outcome", pl.Enum(OUTCOMES), "Outcome; cut: the run ended first."),
        Column("final_status", U64, "Status of the last attempt."),
        Column("in_irq", BOOL, "Whether it was made in hard interrupt context."),
    ),
    rules={"end is not before start": pl.col("start_ns") <= pl.col("end_ns")},
)

TRUTH_ATTEMPTS = Table(
    name="truth_attempts",
    grain="one row per SEAMCALL made by the simulated host",
    key=("chain", "attempt"),
    columns=(
        CHAIN,
        Column("attempt", U32, "Number within its chain, from 1."),
        Column("call", U32, "Number of the wrapper's call, over the whole run."),
        Column("cpu", U16, "Host CPU."),
        Column("start_ns", I64, "Start, on the trace's clock.", unit="ns"),
        Column("end_ns", I64, "End, on the trace's clock.", unit="ns"),
        Column("status", U64, "Completion status (RAX)."),
        Column(
            "executed",
            BOOL,
            "Of TDH.VP.ENTER: whether the guest completed an instruction; null: another leaf.",
            nullable=True,
        ),
    ),
)

TRUTH_BUSY = Table(
    name="truth_busy",
    grain="one row per answer that did not complete a request, with its true cause",
    key=("chain", "attempt"),
    columns=(
        CHAIN,
        Column("attempt", U32, "Number within its chain, from 1."),
        WHEN,
        Column(
            "resource",
            TEXT,
            "What was unavailable: a lock (TDR, TDVPR, OP_STATE, EPOCH, TREE, ENTRY, PAMT_*…), "
            "PREVIOUS_EPOCH, ENTROPY, INTERRUPT or TREE_PRIORITY.",
        ),
        Column("operand", U16, "Operand ID in the status; 0: none."),
        Column("n_holders", U32, "Number of holders at that time."),
        Column("holder", TEXT, "Leaf of the longest-standing holder.", nullable=True),
        Column("holder_tid", I32, "Host thread of the holder.", nullable=True),
        Column("holder_vcpu", U32, "vCPU of the holder, for a guest or an entry.", nullable=True),
        Column("held_since_ns", I64, "Start of the holder's call.", unit="ns", nullable=True),
        Column("is_guest", BOOL, "Whether the holder is a TDCALL of a guest.", nullable=True),
        Column("is_armed", BOOL, "Whether the holder is an armed TDH.VP.ENTER.", nullable=True),
    ),
)

TRUTH_HOLDERS = Table(
    name="truth_holders",
    grain="one row per holder of the lock that made an attempt busy",
    meaning="A holder is the call that had the lock at the moment the attempt tried it; "
    "truth_busy names the longest-standing one of them.",
    key=("chain", "attempt", "holder"),
    columns=(
        CHAIN,
        _ATTEMPT,
        Column("holder", U32, "Number of the holder, from 1, the longest-standing first."),
        Column("resource", TEXT, "Lock held, as in truth_busy."),
        *_other("holder", "the holder; null for a TDCALL, and for a call that had not returned"),
        Column("leaf", TEXT, "Leaf of the holder."),
        Column("tid", I32, "Host thread of the holder.", nullable=True),
        VCPU,
        Column("start_ns", I64, "Start of the holder's call.", unit="ns"),
        Column("is_guest", BOOL, "Whether it is a TDCALL of a guest."),
        Column("is_armed", BOOL, "Whether it is an armed TDH.VP.ENTER."),
    ),
)

TRUTH_BROKEN_RULES = Table(
    name="truth_broken_rules",
    grain="one row per rule of a correct kernel, call that breaks it, and call that proves it",
    meaning="tdr_busy, tdvpr_busy: a call was busy on that lock. busy_before_finalize: on a lock "
    "of a TD that was being built. aug_busy_on_entry: a call of the host held the entry of an AUG. "
    "track_without_kick: TRACK found a vCPU in the previous epoch. busy_after_kick: the second "
    "call of BLOCK, TRACK or REMOVE was busy, by any holder, although no vCPU could enter. "
    "mmu_lock_excludes: BLOCK, TRACK or REMOVE overlapped one of these, an AUG or a SEPT.ADD of "
    "the same TD; the call is the one that started later, and each pair is one row. "
    "dropped_block: a call on a page whose BLOCK, the evidence, was busy and not repeated. "
    "host_priority_timeout: TDH.VP.ENTER ended since the host had left an entry reserved for "
    "itself; the evidence is the attempt that reserved it last.",
    key=("rule", "chain", "attempt", "evidence_chain", "evidence_attempt"),
    columns=(
        Column("rule", TEXT, "The rule."),
        CHAIN,
        _ATTEMPT,
        WHEN,
        LEAF,
        TID,
        TD,
        *_other("evidence", "the call that proves it; null: none, a TDCALL, or not returned"),
        Column("evidence_leaf", TEXT, "Leaf of that call.", nullable=True),
        Column("evidence_tid", I32, "Host thread of that call.", nullable=True),
    ),
)

TRUTH_ACTORS = Table(
    name="truth_actors",
    grain="one row per actor: a thread of the host on one TD, or the guest on one vCPU",
    meaning="An accusation is right if the actor it names behaved so, and did it (n_acts, "
    "n_busy_caused); what a host did when, and to which page, is in the chains of its thread.",
    key=("tid", "td_id", "side"),
    columns=(
        TID,
        TD,
        VCPU,
        Column("side", pl.Enum(("host", "guest")), "The host, or a guest."),
        Column("kind", TEXT, "vcpu, main, or the kind of a worker; of a guest, its program."),
        Column(
            "conduct",
            pl.Enum(CONDUCTS),
            "buggy: a kernel or VMM with a mistake; hostile: a host that attacks its guest, or a "
            "guest that keeps locking entries without a reason.",
        ),
        Column(
            "n_acts",
            U32,
            "Turns of a worker; faults that the thread of a vCPU left unserved on purpose, or its "
            "single steps; TDCALLs of a guest that locked an entry.",
        ),
        Column("first_ns", I64, "Time of the first of them.", unit="ns", nullable=True),
        Column("last_ns", I64, "Time of the last of them.", unit="ns", nullable=True),
        Column(
            "n_busy_caused",
            U32,
            "Busy answers to others whose longest-standing holder this actor was.",
        ),
    ),
)

TRUTH_ZERO_STEPS = Table(
    name="truth_zero_steps",
    grain="one row per time that zero-step mitigation was armed for a vCPU",
    key=("tid", "armed_ns"),
    columns=(
        TID,
        TD,
        VCPU,
        Column("gpa", U64, "Guest page whose fault armed it."),
        Column("rip", U64, "Guest instruction pointer in the model."),
        Column("armed_ns", I64, "Time of the seventh fault at one RIP.", unit="ns"),
        Column("first_refused_ns", I64, "First refused entry.", unit="ns", nullable=True),
        Column("last_refused_ns", I64, "Last refused entry.", unit="ns", nullable=True),
        Column(
            "cleared_ns",
            I64,
            "Time at which RIP advanced; null: not in this run.",
            "ns",
            nullable=True,
        ),
        Column("n_faults", U32, "Counted faults at that RIP, including the one that armed it."),
        Column("n_busy", U32, "Entries answered OPERAND_BUSY, operand SEPT."),
        Column("n_emulated", U32, "EPT violations emulated by the module without entering."),
        Column("form", pl.Enum(TRUE_FORMS), "Effect on the vCPU."),
        Column(
            "cause",
            pl.Enum((*TRUE_STEP_CAUSES, "mixed")),
            "What more than half of the faults up to the arming have in common; mixed: nothing.",
        ),
        Column("n_pages", U32, "Distinct pages among the faults up to the arming."),
        Column("n_memory_fault", U32, "Of these, passed to userspace: KVM_EXIT_MEMORY_FAULT."),
        Column("n_refused", U32, "Left unserved by the host on purpose, the page not blocked."),
        Column("n_churned", U32, "On a page that was blocked to be made accessible again."),
        Column(
            "n_invalidated",
            U32,
            "On a page blocked, or about to be, to be removed, split or merged.",
        ),
        Column("n_raced", U32, "On a page or table that another thread was installing."),
        Column("n_left_loop", U32, "The call that serves it was busy, and the host entered again."),
        Column("n_pending", U32, "On a page that waits for the guest's ACCEPT."),
        Column("n_served", U32, "Served: the next fault was another page's, or a new one's."),
        Column("n_other", U32, "None of these, or not handled when the run ended."),
        Column("blocker_tid", I32, "Thread that blocked the page of most of them.", nullable=True),
        Column("is_attack", BOOL, "Whether a hostile actor caused more than half of these faults."),
    ),
)

TRUTH_EPOCHS = Table(
    name="truth_epochs",
    grain="one row per TLB epoch started by a TDH.MEM.TRACK",
    key=("td_id", "epoch"),
    columns=(WHEN, TD, Column("epoch", U64, "Number of the epoch, from 0.")),
)

TRUTH_STALE_RETURNS = Table(
    name="truth_stale_returns",
    grain="one row per return of tdx_vcpu_run that made no TDH.VP.ENTER",
    meaning="While a zap holds vCPUs off, tdx_vcpu_run returns at once: a probe on its return "
    "shows the status of the entry before, and there is no kvm_entry and no attempt.",
    key=("ts_ns", "tid"),
    columns=(
        WHEN,
        TID,
        TD,
        VCPU,
        Column("status", U64, "Status of the last TDH.VP.ENTER of this vCPU, shown again."),
    ),
)

TRUTH_ACTIONS = Table(
    name="truth_actions",
    grain="one row per action of the host's policy after a busy answer",
    key=("ts_ns", "tid", "action"),
    columns=(
        WHEN,
        TID,
        TD,
        Column("action", TEXT, "kick, warn, bug, give_up, leave_loop or stop."),
        LEAF,
        Column("detail", U64, "A status, a number of attempts, or a number of vCPUs kicked."),
    ),
)

TRUTH_TABLES: Final = (
    TRUTH_CHAINS,
    TRUTH_ATTEMPTS,
    TRUTH_BUSY,
    TRUTH_HOLDERS,
    TRUTH_BROKEN_RULES,
    TRUTH_ACTORS,
    TRUTH_ZERO_STEPS,
    TRUTH_EPOCHS,
    TRUTH_STALE_RETURNS,
    TRUTH_ACTIONS,
)
