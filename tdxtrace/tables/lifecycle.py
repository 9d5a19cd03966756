"""The tables about a TD's life: accepted memory, boot phases, TDVMCALLs and module updates."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.causes import TD_OF_CALL
from tdxtrace.tables.events import I64, SOURCE, TEXT, TGID, TID, U32, U64
from tdxtrace.tables.schema import Column, Table

# The largest part of the vCPUs' time while they accepted memory.
ACCEPT_LIMITS: Final = ("guest", "host", "seamcalls", "lock_contention", "refused_entries")
BOOT_PHASE_NAMES: Final = (
    *("build", "measure", "finalize", "firmware", "accept", "running", "teardown"),
)
TDVMCALL_BASES: Final = ("exit_reason", "userspace_exit", "no_userspace_exit", "unnamed")
STOPS: Final = ("all", "not_all", "unknown")

_START = Column("start_ns", I64, "Start of the phase.", unit="ns")
_END = Column("end_ns", I64, "End of the phase.", unit="ns")
WITHHELD = Column(
    "withheld",
    TEXT,
    "Why a value is missing, and what to record; null: none is missing.",
    nullable=True,
)

ACCEPT_RATES = Table(
    name="accept_rates",
    grain="one row per TD and slice of time with faults on memory, and per vCPU of the TD",
    meaning="A vCPU accepts memory by faulting on it: the page is accepted when TDH.MEM.PAGE.AUG "
    "has installed it and the guest's TDG.MEM.PAGE.ACCEPT is repeated. The host sees the first.",
    key=("source", "td_id", "tgid", "tid", "start_ns"),
    columns=(
        SOURCE,
        TD_OF_CALL,
        TGID,
        Column("tid", TID.dtype, "Thread of the vCPU; null: all vCPUs of the TD.", nullable=True),
        Column("start_ns", I64, "Beginning of the slice.", unit="ns"),
        Column("end_ns", I64, "End of the slice, or of the last fault in the input.", unit="ns"),
        Column("n_pages", U64, "Pages of 4K that TDH.MEM.PAGE.AUG installed; one of 2M is 512."),
        Column("n_faults", U64, "Requests for TDH.MEM.PAGE.AUG that succeeded."),
        Column(
            "n_vcpus",
            U32,
            "vCPUs that asked for a page in the slice; unknown threads count as one.",
        ),
        Column("pages_per_s", pl.Float64(), "Pages of 4K per second.", unit="1/s"),
        Column(
            "page_ns",
            pl.Float64(),
            "Time of these vCPUs' threads per page of 4K; null: no page, or unknown threads.",
            unit="ns",
            nullable=True,
        ),
        Column("n_busy_tree", U64, "Busy answers to AUG and SEPT.ADD with operand SEPT."),
        Column(
            "n_busy_entry",
            U64,
            "Busy answers to AUG and SEPT.ADD with operand RCX: a TDCALL of the guest, or another "
            "call of the host, held the entry.",
        ),
        Column("n_busy_other", U64, "Other retryable answers to AUG and SEPT.ADD."),
        Column(
            "n_refused",
            U64,
            "Entries answered busy: a TRACK (kicks), or zero-step mitigation.",
        ),
        Column("call_ns", I64, "Time in AUG and SEPT.ADD that were not busy.", unit="ns"),
        Column("retry_ns", I64, "Time in their busy attempts and between attempts.", unit="ns"),
        Column("refused_ns", I64, "Time in refused entries.", unit="ns", nullable=True),
        Column("guest_ns", I64, "Time in the guest.", unit="ns", nullable=True),
        Column(
            "host_ns",
            I64,
            "The rest: KVM's fault path, its locks, kicks, userspace, not scheduled.",
            unit="ns",
            nullable=True,
        ),
        Column(
            "limited_by",
            pl.Enum(ACCEPT_LIMITS),
            "The largest of these parts; null: withheld.",
            nullable=True,
        ),
        WITHHELD,
    ),
    rules={
        "end is after start": pl.col("start_ns") < pl.col("end_ns"),
        "a slice without an answer has a reason": pl.col("limited_by").is_null()
        == pl.col("withheld").is_not_null(),
    },
)

BOOT_PHASES = Table(
    name="boot_phases",
    grain="one row per TD and phase of its life",
    meaning="build: from TDH.MNG.CREATE on; measure: from the first TDH.MEM.PAGE.ADD or "
    "TDH.MR.EXTEND; finalize: TDH.MR.FINALIZE; firmware: from then to the last mark that the "
    "firmware wrote to its port; accept: from the first page given to a vCPU after that until no "
    "page was asked for 10 ms; running; teardown: from the first reclaim on.",
    key=("source", "td_id", "phase"),
    columns=(
        SOURCE,
        TD_OF_CALL,
        Column("phase", pl.Enum(BOOT_PHASE_NAMES), "The phase."),
        _START,
        _END,
        Column("took_ns", I64, "Duration of the phase.", unit="ns"),
        Column("n_calls", U64, "SEAMCALLs without TDH.VP.ENTER."),
        Column("n_retries", U64, "Of these, attempts that did not complete their request."),
        Column("call_ns", I64, "Time in calls that completed, summed over threads.", unit="ns"),
        Column("retry_ns", I64, "Time in calls that did not, summed over threads.", unit="ns"),
        Column("wait_ns", I64, "Time between the attempts at a request.", unit="ns"),
        Column("guest_ns", I64, "Time in the guest, summed over vCPUs.", unit="ns"),
        Column("n_pages", U64, "Pages of 4K installed by TDH.MEM.PAGE.AUG."),
        Column("n_tdcalls", U64, "Exits by TDG.VP.VMCALL that KVM shows as TDCALL."),
        Column("n_marks", U64, "Writes to the firmware's port (kvm_pio).", nullable=True),
        Column(
            "converted_bytes",
            U64,
            "Memory made private or shared (kvm_vm_set_mem_attributes).",
            unit="bytes",
            nullable=True,
        ),
        Column("began_by", TEXT, "Call or event at which the phase begins."),
        WITHHELD,
    ),
    rules={"end is not before start": pl.col("start_ns") <= pl.col("end_ns")},
)

TDVMCALLS = Table(
    name="tdvmcalls",
    grain="one row per TD, function of TDG.VP.VMCALL and slice of time",
    meaning="TDG.VP.VMCALL (TDVMCALL) is how a TD's guest calls its host; KVM records those that "
    "emulate an instruction as the exit of that instruction, the others as TDCALL.",
    key=("source", "td_id", "tgid", "function", "start_ns"),
    columns=(
        SOURCE,
        TD_OF_CALL,
        TGID,
        Column("function", TEXT, "Function as named in the GHCI, or a description of it."),
        Column("basis", pl.Enum(TDVMCALL_BASES), "Source of the name; unnamed: see withheld."),
        Column("start_ns", I64, "Beginning of the slice.", unit="ns"),
        Column("end_ns", I64, "End of the slice.", unit="ns"),
        Column("n_exits", U64, "Exits of vCPUs by this function."),
        Column("n_vcpus", U32, "vCPUs with these exits."),
        Column(
            "handled_ns",
            I64,
            "Time from these exits to the next entries of the same vCPUs.",
            unit="ns",
        ),
        Column(
            "longest_ns",
            I64,
            "Longest of these times; null: no entry followed.",
            "ns",
            nullable=True,
        ),
        WITHHELD,
    ),
    rules={
        "what is not named has a reason": (pl.col("basis") == "unnamed")
        == pl.col("withheld").is_not_null()
    },
)

MODULE_UPDATES = Table(
    name="module_updates",
    grain="one row per update of the TDX module: calls of SEAMLDR.INSTALL, one on each CPU",
    meaning="The P-SEAMLDR replaces the TDX module when SEAMLDR.INSTALL was called on every CPU; "
    "Linux 7.2 makes these calls while it stops all CPUs (stop_machine).",
    key=("source", "update"),
    columns=(
        SOURCE,
        Column("update", U32, "Number of the update in its input, from 1."),
        Column("first_seq", U64, "loader_calls.seq of its first call."),
        Column("start_ns", I64, "Start of its first call.", unit="ns"),
        Column("end_ns", I64, "End of its last call.", unit="ns"),
        Column("n_calls", U32, "Calls of SEAMLDR.INSTALL."),
        Column("n_cpus", U32, "CPUs that made them."),
        Column("n_repeated", U32, "Answers after which the same call is made again."),
        Column("n_failed", U32, "Answers that are other errors."),
        Column("longest_ns", I64, "Longest call.", unit="ns", nullable=True),
        Column(
            "stopped",
            pl.Enum(STOPS),
            "all: no other event on any CPU meanwhile; not_all: there was one; unknown: see "
            "withheld.",
        ),
        Column("n_meanwhile", U64, "Other events between its start and its end."),
        Column(
            "stopped_ns",
            I64,
            "From the last event before to the first after it: upper bound of the time for which "
            "all CPUs were stopped.",
            unit="ns",
            nullable=True,
        ),
        Column("n_vcpus", U32, "vCPUs with events before and after it, and none meanwhile."),
        Column("n_requests", U32, "Requests begun before it and completed after it."),
        Column(
            "longest_wait_ns",
            I64,
            "Longest time that one of these vCPUs showed no event.",
            unit="ns",
            nullable=True,
        ),
        WITHHELD,
    ),
    rules={
        "end is not before start": pl.col("start_ns") <= pl.col("end_ns"),
        "unknown has a reason": (pl.col("stopped") == "unknown")
        == pl.col("withheld").is_not_null(),
    },
)

LIFECYCLE_TABLES: Final = (ACCEPT_RATES, BOOT_PHASES, TDVMCALLS, MODULE_UPDATES)
