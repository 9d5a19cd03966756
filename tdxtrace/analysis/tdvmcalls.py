"""The ``tdvmcalls`` table: exits by TDG.VP.VMCALL, by function and over time."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.slices import add_slice_width
from tdxtrace.analysis.threads import VP_ENTER, may_miss_events, td_of_events
from tdxtrace.tables.events import HOST_EVENTS, SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.lifecycle import TDVMCALL_BASES, TDVMCALLS
from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.word import bits

# VMX exit reason of TDCALL; the low half of the status of a TDH.VP.ENTER that ended with an exit
# is the reason: Linux 6.16 arch/x86/kvm/vmx/tdx.c tdx_to_vmx_exit_reason.
TDCALL: Final = 77
_REASON_BITS: Final = 0xFFFF_FFFF
_KERNEL: Final = "TDCALL answered by KVM"
_OTHER: Final = "TDCALL"
_NO_USERSPACE: Final = "record kvm:kvm_userspace_exit to distinguish MapGPA, GetQuote and others"
_NO_EXITS: Final = "record kvm:kvm_entry and kvm:kvm_exit to distinguish functions"
_CUT: Final = "the trace ends before the next entry of the vCPU"
_TORN: Final = "events were lost before the next entry of the vCPU"
_THREAD: Final = ("source", "tid")


def tdvmcalls(
    seamcalls: pl.DataFrame,
    vm_entries: pl.DataFrame,
    host_events: pl.DataFrame,
    losses: pl.DataFrame,
) -> pl.DataFrame:
    """Count the exits by TDG.VP.VMCALL, by function and over time.

    KVM reports a TDVMCALL that emulates an instruction with the exit reason of that instruction.
    No event contains the function of a TDCALL: it is determined from the exit to userspace before
    the vCPU's next entry; without such an exit, KVM answered it.  If the trace ends or events were
    lost before the next entry, the function is unnamed.  Exits of VMs that are not TDs, whose
    instruction pointer the host records, are excluded.  For threads without recorded exits,
    TDCALLs are counted by the statuses of TDH.VP.ENTER, without a function.

    Args:
        seamcalls: The ``seamcalls`` table.
        vm_entries: The ``vm_entries`` table.
        host_events: The ``host_events`` table.
        losses: The ``losses`` table.

    Returns:
        The ``tdvmcalls`` table, by source, TD, time and function.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Source:
        The rows of ``tdvmcalls.csv``.
    """
    calls = SEAMCALLS.conform(seamcalls)
    entries = VM_ENTRIES.conform(vm_entries)
    exits = pl.concat(
        [_of_exits(entries, HOST_EVENTS.conform(host_events), losses), _of(calls, entries)]
    )
    if exits.is_empty():
        return TDVMCALLS.empty()
    exits = td_of_events(exits, entries, calls)
    span = exits.group_by("source").agg(
        first_ns=pl.col("ts_ns").min(), last_ns=pl.col("ts_ns").max()
    )
    at = (pl.col("ts_ns") - pl.col("first_ns")) // pl.col("width_ns")
    exits = exits.join(add_slice_width(span), on="source").with_columns(
        start_ns=pl.col("first_ns") + at * pl.col("width_ns")
    )
    keys = ["source", "td_id", "tgid", "start_ns", "function", "basis", "withheld"]
    exits = exits.with_columns(pl.col("basis").cast(pl.Enum(TDVMCALL_BASES)))
    rows = exits.group_by(keys).agg(
        end_ns=pl.col("start_ns").first() + pl.col("width_ns").first(),
        n_exits=pl.len().cast(pl.UInt64),
        n_vcpus=pl.col("tid").n_unique().cast(pl.UInt32),
        handled_ns=pl.col("handled_ns").sum(),
        longest_ns=pl.col("handled_ns").max(),
    )
    return TDVMCALLS.conform(rows.sort("source", "td_id", "tgid", "start_ns", "function"))


def _of_exits(entries: pl.DataFrame, events: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """Return the TDVMCALLs among KVM's recorded exits, each with its function."""
    known = facts("tdvmcalls", exit_reason=pl.UInt32, userspace_exit=pl.Int32)
    exits = (
        entries.filter(pl.col("end_ns").is_not_null())
        .sort("source", "tid", "end_ns", "seq")
        .with_columns(next_ns=pl.col("start_ns").shift(-1).over(_THREAD))
        .filter(pl.col("exit_reason").is_in(known["exit_reason"].unique().implode()))
        .select("source", "tid", "tgid", "exit_reason", "next_ns", ts_ns="end_ns")
    )
    exits = exits.with_columns(handled_ns=pl.col("next_ns") - pl.col("ts_ns"))
    without_userspace = known.filter(pl.col("userspace_exit").is_null())
    simple = exits.join(without_userspace.select("exit_reason", "function"), on="exit_reason")
    simple = simple.with_columns(basis=pl.lit("exit_reason"), withheld=pl.lit(None, pl.String))
    tdcalls = exits.filter(pl.col("exit_reason") == TDCALL)
    columns = ["source", "tid", "tgid", "ts_ns", "handled_ns", "function", "basis", "withheld"]
    return pl.concat(
        [simple.select(columns), _named(tdcalls, events, known, losses).select(columns)]
    )


def _named(
    tdcalls: pl.DataFrame, events: pl.DataFrame, known: pl.DataFrame, losses: pl.DataFrame
) -> pl.DataFrame:
    """Name TDCALLs by the thread's first exit to userspace before its next entry."""
    out = events.filter(pl.col("event") == "kvm_userspace_exit", pl.col("reason").is_not_null())
    recorded = out.select("source").unique().with_columns(is_recorded=True)
    out = out.sort("ts_ns").select(*_THREAD, "reason", out_ns="ts_ns")
    names = (
        known.drop_nulls("userspace_exit")
        .group_by("userspace_exit", maintain_order=True)
        .agg(name=pl.col("function").str.join(" or "))
    )
    rows = tdcalls.sort("ts_ns").join_asof(
        out,
        left_on="ts_ns",
        right_on="out_ns",
        by=list(_THREAD),
        strategy="forward",
        check_sortedness=False,
    )
    is_own = (pl.col("out_ns") <= pl.col("next_ns").fill_null(pl.col("out_ns"))).fill_null(False)
    rows = rows.with_columns(reason=pl.when(is_own).then("reason")).join(
        names, left_on="reason", right_on="userspace_exit", how="left"
    )
    rows = rows.join(recorded, on="source", how="left")
    until = pl.coalesce("next_ns", pl.when(pl.col("name").is_not_null()).then("out_ns"), "ts_ns")
    rows = rows.with_columns(until_ns=until)
    rows = rows.with_columns(is_torn=may_miss_events(rows, losses, "ts_ns", "until_ns"))
    return rows.with_columns(**_names())


def _names() -> dict[str, pl.Expr]:
    """Expressions for a TDCALL's function, its basis, and the reason if it is withheld."""
    basis_text = (
        pl.when(pl.col("is_torn"))
        .then(pl.lit(_TORN))
        .when(pl.col("reason").is_not_null())
        .then(pl.lit(None, pl.String))
        .when(pl.col("is_recorded").is_null())
        .then(pl.lit(_NO_USERSPACE))
        .when(pl.col("next_ns").is_null())
        .then(pl.lit(_CUT))
    )
    other = pl.format("TDCALL, then userspace exit {}", "reason")
    is_named, by_kernel = basis_text.is_null(), pl.col("reason").is_null()
    label = pl.when(by_kernel).then(pl.lit(_KERNEL)).otherwise(pl.coalesce("name", other))
    basis = pl.when(by_kernel).then(pl.lit("no_userspace_exit"))
    return {
        "function": pl.when(is_named).then(label).otherwise(pl.lit(_OTHER)),
        "basis": pl.when(is_named)
        .then(basis.otherwise(pl.lit("userspace_exit")))
        .otherwise(pl.lit("unnamed")),
        "withheld": basis_text,
    }


def _of(calls: pl.DataFrame, entries: pl.DataFrame) -> pl.DataFrame:
    """Return TDCALLs by the status of TDH.VP.ENTER, for threads without recorded exits."""
    entered_threads = entries.filter(pl.col("end_ns").is_not_null()).select(*_THREAD).unique()
    unobserved = calls.filter(pl.col("leaf") == VP_ENTER).join(
        entered_threads, on=list(_THREAD), how="anti", nulls_equal=True
    )
    unobserved = unobserved.sort("source", "tid", "end_ns", "seq").with_columns(
        handled_ns=pl.col("start_ns").shift(-1).over(_THREAD) - pl.col("end_ns")
    )
    is_tdcall = bits(pl.col("status"), _REASON_BITS) == TDCALL
    return unobserved.filter(is_tdcall & pl.col("end_ns").is_not_null()).select(
        *("source", "tid", "tgid"),
        ts_ns="end_ns",
        handled_ns="handled_ns",
        function=pl.lit(_OTHER),
        basis=pl.lit("unnamed"),
        withheld=pl.lit(_NO_EXITS),
    )
