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
    ),
)

TRUTH_EPOCHS = Table(
    name="truth_epochs",
    grain="one row per TLB epoch started by a TDH.MEM.TRACK",
    key=("td_id", "epoch"),
    columns=(WHEN, TD, Column("epoch", U64, "Number of the epoch, from 0.")),
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
    TRUTH_ZERO_STEPS,
    TRUTH_EPOCHS,
    TRUTH_ACTIONS,
)
