"""The event tables, which hold what was recorded: columns, types, units, grain and rules."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.schema import Column, Table
from tdxtrace.tdx.wrappers import PAGES

U8, U16, U32, U64 = pl.UInt8(), pl.UInt16(), pl.UInt32(), pl.UInt64()
I32, I64, BOOL, TEXT = pl.Int32(), pl.Int64(), pl.Boolean(), pl.String()

PROBES: Final = ("wrapper", "seamcall", "vcpu_run", "tracepoint", "function_graph")
SEVERITIES: Final = ("info", "data_loss", "error")
LOSS_KINDS: Final = (
    "noise",
    "callchain",
    "lost_events",
    "overwritten",
    "buffer_full",
    "started_midway",
    "truncated",
    "changed_while_read",
    "damaged",
    "unread",
    "sampled",
    "excluded",
    "throttled",
    "unknown_record",
    "unparsed",
    "undecoded",
    "overlong",
    "unmapped",
    "no_payload",
    "no_time",
    "no_abstime",
    "unpaired_entry",
    "unpaired_return",
    "merged",
    "suppressed",
    "no_thread",
    "no_event",
    "joined",
    "wrapped",
)
# Kinds of messages; other: about TDX, with unrecognised text.  Formats: Linux 6.16 to 7.2
# arch/x86/kvm/vmx/tdx.c and arch/x86/virt/vmx/tdx/tdx.c, older trees as found in public logs;
# crashing and exceeded_retries: P. Bonzini, 2024-09-10.
MESSAGES: Final = (
    "seamcall_failed",
    "vp_enter_ret",
    "exceeded_retries",
    "crashing",
    "warning",
    "kernel_bug",
    "suppressed",
    "hkid_leaked",
    "guest_access",
    "module_version",
    "module_state",
    "other",
)

SOURCE = Column("source", U16, "Input: index into provenance.sources.")
CPU = Column("cpu", U16, "Host CPU of the line or record named by seq.", nullable=True)
TID = Column("tid", I32, "Host thread ID; null if the tool did not print it.", nullable=True)
TGID = Column(
    "tgid",
    I32,
    "Process ID of the thread (one QEMU process is one VM), where recorded.",
    nullable=True,
)
N_LINES = Column("n_lines", U8, "Input lines or records that this row was made from.")
TD = Column(
    "td_id",
    U64,
    "The TD as recorded: address of its struct tdx_td, or its TDR page.",
    nullable=True,
)
GPA = Column("gpa", U64, "Guest physical address passed to the call.", nullable=True)
LEVEL = Column(
    "level", U8, "Page level as the TDX module counts: 0 is 4K, 1 is 2M, 2 is 1G.", nullable=True
)
LEAF = Column("leaf", U16, "SEAMCALL leaf number (RAX bits 15:0 at entry).")
VCPU = Column("vcpu_id", U32, "vCPU number printed by KVM.", nullable=True)

SEAMCALLS = Table(
    name="seamcalls",
    grain="one row per SEAMCALL attempt whose entry or return was recorded",
    key=("source", "seq"),
    columns=(
        SOURCE,
        Column("seq", U64, "Line or record of the return; of the entry if no return was recorded."),
        Column(
            "start_ns",
            I64,
            "When the entry was recorded; for a TDH.VP.ENTER probed on its return only, when the "
            "kvm_entry before it was recorded.",
            unit="ns",
            nullable=True,
        ),
        Column("end_ns", I64, "When the return was recorded.", unit="ns", nullable=True),
        Column("start_cpu", U16, "CPU of the entry.", nullable=True),
        CPU,
        TID,
        TGID,
        LEAF,
        Column("version", U8, "Leaf version (RAX bits 23:16), where recorded.", nullable=True),
        TD,
        Column("vp_id", U64, "The vCPU: address of its struct tdx_vp, or TDVPR.", nullable=True),
        GPA,
        LEVEL,
        Column("page", U64, "Page argument as passed: struct page, pfn or HPA.", nullable=True),
        Column("status", U64, "Raw completion status (RAX); null: never returned.", nullable=True),
        Column("ext_err1", U64, "RCX out: the SEPT entry on MEM leaves.", nullable=True),
        Column("ext_err2", U64, "RDX out: level and state on MEM leaves.", nullable=True),
        Column(
            "in_irq",
            BOOL,
            "Whether it was issued in hard interrupt context (trace flags).",
            nullable=True,
        ),
        Column("probe", pl.Enum(PROBES), "Kind of probe that recorded the call."),
        N_LINES,
        *(
            Column(
                name,
                U64,
                f"{which} page argument; the column is missing where no call has one.",
                nullable=True,
                optional=True,
            )
            for name, which in zip(PAGES[1:], ("Second", "Third"), strict=True)
        ),
    ),
    rules={
        "an entry or a return was recorded": pl.col("start_ns").is_not_null()
        | pl.col("end_ns").is_not_null(),
        "end is not before start": pl.col("start_ns") <= pl.col("end_ns"),
    },
)

LOADER_CALLS = Table(
    name="loader_calls",
    grain="one row per SEAMCALL to the P-SEAMLDR, which loads and updates the TDX module",
    key=("source", "seq"),
    columns=(
        SOURCE,
        Column("seq", U64, "Line or record of the return; of the entry if no return was recorded."),
        Column("start_ns", I64, "When the entry was recorded.", unit="ns", nullable=True),
        Column("end_ns", I64, "When the return was recorded.", unit="ns", nullable=True),
        Column("start_cpu", U16, "CPU of the entry.", nullable=True),
        CPU,
        TID,
        TGID,
        Column("loader_leaf", U16, "Leaf of the P-SEAMLDR: RAX bits 15:0 at entry; bit 63 is set."),
        Column(
            "status",
            U64,
            "Raw completion status (RAX), one of the P-SEAMLDR's own; null: never returned.",
            nullable=True,
        ),
        Column("probe", pl.Enum(PROBES), "Kind of probe that recorded the call."),
        N_LINES,
    ),
    rules={
        "an entry or a return was recorded": pl.col("start_ns").is_not_null()
        | pl.col("end_ns").is_not_null(),
        "end is not before start": pl.col("start_ns") <= pl.col("end_ns"),
    },
)

VM_ENTRIES = Table(
    name="vm_entries",
    grain="one row per attempt to enter a vCPU, paired with its exit",
    key=("source", "seq"),
    columns=(
        SOURCE,
        Column("seq", U64, "Line or record of the exit; of the entry if no exit was recorded."),
        Column("start_ns", I64, "When kvm_entry was recorded.", unit="ns", nullable=True),
        Column("end_ns", I64, "When kvm_exit was recorded.", unit="ns", nullable=True),
        CPU,
        TID,
        TGID,
        VCPU,
        Column("exit_reason", U32, "VMX exit reason; 0xffffffff: the entry failed.", nullable=True),
        Column("info1", U64, "Exit qualification (RCX of TDH.VP.ENTER).", nullable=True),
        Column("info2", U64, "Extended exit qualification (RDX).", nullable=True),
        Column("intr_info", U32, "Interruption information.", nullable=True),
        Column("error_code", U32, "Interruption error code.", nullable=True),
        Column("rip", U64, "Guest RIP at the exit; 0 for a TD.", nullable=True),
        Column("requests", U64, "vcpu->requests at the exit (6.14 and later).", nullable=True),
        Column(
            "immediate_exit", BOOL, "Entered to exit immediately (6.9 and later).", nullable=True
        ),
        N_LINES,
    ),
)

PAGE_FAULTS = Table(
    name="page_faults",
    grain="one row per EPT violation handled by KVM",
    key=("source", "seq"),
    columns=(
        SOURCE,
        Column("seq", U64, "Line or record of the event."),
        Column("ts_ns", I64, "When it was recorded.", unit="ns"),
        CPU,
        TID,
        TGID,
        VCPU,
        Column("gpa", U64, "Faulting guest physical address."),
        Column("error_code", U64, "Exit qualification, as KVM passes it.", nullable=True),
        Column("rip", U64, "Guest RIP; 0 for a TD.", nullable=True),
        N_LINES,
    ),
)

HOST_EVENTS = Table(
    name="host_events",
    grain="one row per other KVM event that helps to explain an attempt or a gap",
    key=("source", "seq"),
    columns=(
        SOURCE,
        Column("seq", U64, "Line or record of the event."),
        Column("ts_ns", I64, "When it was recorded.", unit="ns"),
        CPU,
        TID,
        TGID,
        Column("event", TEXT, "Name of the event in the kernel."),
        VCPU,
        Column("reason", I32, "KVM_EXIT_* number of a userspace exit.", nullable=True),
        Column("errno", I32, "errno of a userspace exit that failed.", nullable=True),
        Column(
            "gpa",
            U64,
            "Guest physical address, if the event has one; for a change of attributes the first.",
            nullable=True,
        ),
        Column(
            "n_bytes",
            U64,
            "Bytes of a transfer by a port (kvm_pio), or of the guest's memory whose attributes "
            "change (kvm_vm_set_mem_attributes).",
            unit="bytes",
            nullable=True,
        ),
        Column("port", U16, "I/O port of a transfer (kvm_pio).", nullable=True),
        Column("is_write", BOOL, "Whether the guest wrote to the port.", nullable=True),
        Column(
            "value",
            U64,
            "Value transferred, the first of several (from Linux 3.15); for a change of "
            "attributes the new ones: KVM_MEMORY_ATTRIBUTE_PRIVATE is 8, 0 is shared.",
            nullable=True,
        ),
        N_LINES,
    ),
)

THREADS = Table(
    name="threads",
    grain="one row per thread and thread name (comm) in the event tables",
    key=("source", "tid", "comm"),
    columns=(
        SOURCE,
        Column("tid", I32, "Host thread ID."),
        TGID,
        Column("comm", TEXT, "Thread name as recorded: untrusted text, escape it before display."),
    ),
)

KERNEL_MESSAGES = Table(
    name="kernel_messages",
    grain="one row per message about TDX in the kernel log",
    key=("source", "seq"),
    columns=(
        SOURCE,
        Column("seq", U64, "First line of the message in the log."),
        Column(
            "ts_ns",
            I64,
            "When it was printed, on the log's clock; null: no timestamp, or another clock.",
            unit="ns",
            nullable=True,
        ),
        CPU,
        TID,
        Column("message", pl.Enum(MESSAGES), "Kind of message."),
        Column("leaf", U16, "SEAMCALL leaf named in the message.", nullable=True),
        Column(
            "status",
            U64,
            "Status word in the message; for a warning RAX, if its function calls one leaf only.",
            nullable=True,
        ),
        Column("rcx", U64, "RCX out; on MEM leaves the SEPT entry.", nullable=True),
        Column("rdx", U64, "RDX out; on MEM leaves level and state.", nullable=True),
        VCPU,
        Column("gpa", U64, "Guest physical address in the message.", nullable=True),
        Column(
            "n_events",
            U64,
            "suppressed: messages not printed (lower bound); exceeded_retries: attempts made.",
            nullable=True,
        ),
        Column("function", TEXT, "Function that warned or was rate limited.", nullable=True),
        Column(
            "rax", U64, "RAX in the register dump of a warning: often the status.", nullable=True
        ),
        Column(
            "module_version",
            TEXT,
            'Release of the TDX module; "1.5 build 700" if the release of that build is unknown.',
            nullable=True,
        ),
        Column("text", TEXT, "The message as printed: untrusted text, escape it before display."),
        N_LINES,
    ),
)

LOSSES = Table(
    name="losses",
    grain="one row per loss: events or input lost, skipped, truncated or not understood",
    key=("source", "kind", "line_no", "cpu", "detail"),
    columns=(
        SOURCE,
        Column("line_no", U64, "Line or record where the loss begins.", nullable=True),
        Column("kind", pl.Enum(LOSS_KINDS), "Kind of loss."),
        Column("severity", pl.Enum(SEVERITIES), "Effect on the results: none (info) or possible."),
        Column("cpu", U16, "CPU affected; null: may be any.", nullable=True),
        Column("start_ns", I64, "Last event before the gap.", unit="ns", nullable=True),
        Column("end_ns", I64, "First event after the gap.", unit="ns", nullable=True),
        Column("n_events", U64, "Events lost or skipped; null: unknown.", nullable=True),
        Column("n_lines", U64, "Input lines or records this row accounts for."),
        Column("detail", TEXT, "Event name or a sample of the text: untrusted text."),
        Column("advice", TEXT, "How to avoid it in the next capture."),
    ),
)

EVENT_TABLES: Final = (
    SEAMCALLS,
    VM_ENTRIES,
    PAGE_FAULTS,
    HOST_EVENTS,
    LOADER_CALLS,
    KERNEL_MESSAGES,
    THREADS,
    LOSSES,
)
