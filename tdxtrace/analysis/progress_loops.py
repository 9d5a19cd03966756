"""The ``progress_loops`` table: calls repeated without a held lock, and their progress."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tables.events import HOST_EVENTS, PAGE_FAULTS, SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tables.trace import Trace
from tdxtrace.tables.verdicts import LOOPS, PROGRESS, PROGRESS_LOOPS
from tdxtrace.tdx import word

_LOOP_OF_STATUS: Final = {
    word.TDX_INTERRUPTED_RESUMABLE: "resumable",
    word.TDX_INTERRUPTED_RESTARTABLE: "restartable",
    word.TDX_INTERRUPTED_BUSY: "interrupted",
    word.TDX_INTERRUPTED_PAMT: "interrupted",
    word.TDX_INTERRUPTED_LIST_FULL: "interrupted",
    word.TDX_RND_NO_ENTROPY: "entropy",
    word.TDX_SYS_BUSY: "sys_busy",
}
_CODES: Final = [status & word.CODE_BITS for status in _LOOP_OF_STATUS]
# KVM handles a fault in 8 us on an idle host and in 153 us on the busiest measured host
# (Dstack pull request 1220, Granite Rapids, Linux 7.0).  After ten times as long without a SEAMCALL
# or an entry, the thread is retrying in KVM or is not running.
LOCAL_RETRY_NS: Final = 1_530_000
_VCPU: Final = ("source", "tid")
_INTERRUPTS: Final = r"irq|interrupt|local_timer|reschedule|ipi|nmi|vector"


def progress_loops(
    trace: Trace,
    chains: pl.DataFrame,
    busy_answers: pl.DataFrame,
    *,
    local_retry_ns: int = LOCAL_RETRY_NS,
) -> pl.DataFrame:
    """Find calls that were repeated without a held lock, and whether they made progress.

    Two kinds of loops are reported.  First, requests answered INTERRUPTED_*, RND_NO_ENTROPY or
    SYS_BUSY: progress is ``seen`` if the request finally settled, or if RCX of two resumable
    answers differs; ``not_seen`` if it was given up, or all its answers were the same;
    ``unknown`` if its end was not recorded.  Second, faults after which a vCPU's thread made
    neither a SEAMCALL nor an entry for ``local_retry_ns``, where both are recorded: KVM's local
    loop (RET_PF_RETRY), or a descheduled thread; the trace cannot distinguish the two.

    Args:
        trace: The events.
        chains: The ``retry_chains`` table of the trace.
        busy_answers: The ``busy_answers`` table of these chains, optionally of more chains.
        local_retry_ns: Minimum time in ns after a fault without activity of the thread.

    Returns:
        The ``progress_loops`` table, by source and start.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        Statuses: TDX module 1.5 base specification, interruptible flows; no maximum of restarts
        is guaranteed: DEMOTE series v3 (Yan Zhao, 2026-01).  The local loop: Linux 6.16
        arch/x86/kvm/vmx/tdx.c, tdx_handle_ept_violation.
    """
    calls = SEAMCALLS.conform(trace.seamcalls)
    loops = [
        _repeated_calls(calls, RETRY_CHAINS.conform(chains), BUSY_ANSWERS.conform(busy_answers))
    ]
    if trace.page_faults.height:
        loops.append(_local_retries(trace, calls, local_retry_ns))
    found = pl.concat([PROGRESS_LOOPS.empty(), *(loop for loop in loops if loop.height)])
    counted = _with_interrupts(found, trace)
    return PROGRESS_LOOPS.conform(counted.sort("source", "start_ns", "first_seq"))


def _loop_kind() -> pl.Expr:
    """Return the kind of loop for a status; null for other statuses."""
    code = pl.col("status") & pl.lit(word.CODE_BITS, pl.UInt64)
    return code.replace_strict(
        pl.Series(_CODES, dtype=pl.UInt64),
        pl.Series(list(_LOOP_OF_STATUS.values())),
        default=None,
        return_dtype=pl.String,
    )


def _repeated_calls(
    calls: pl.DataFrame, chains: pl.DataFrame, answers: pl.DataFrame
) -> pl.DataFrame:
    code = pl.col("status") & pl.lit(word.CODE_BITS, pl.UInt64)
    answered = answers.filter(code.is_in(_CODES)).select("source", "seq", chain="first_seq")
    if answered.is_empty():
        return PROGRESS_LOOPS.empty()
    when = pl.coalesce("start_ns", "end_ns")
    rows = calls.join(answered, on=["source", "seq"]).sort(when, "seq")
    rows = rows.with_columns(loop=_loop_kind())
    retried = chains.filter(pl.col("n_busy") > 0)
    repeats = rows.group_by("source", "chain", "loop").agg(
        cpu=pl.col("cpu").last(),
        first=when.min(),
        last=pl.coalesce("end_ns", "start_ns").max(),
        n_repeats=pl.len().cast(pl.UInt32),
        moved=(pl.col("ext_err1").drop_nulls().n_unique() > 1).fill_null(False),
    )
    complete = retried.join(repeats, left_on=["source", "first_seq"], right_on=["source", "chain"])
    ended = pl.col("outcome").is_in(["succeeded", "resolved_elsewhere"])
    progress = (
        pl.when(ended | (pl.col("moved") & (pl.col("loop") == "resumable")))
        .then(pl.lit("seen"))
        .when(pl.col("outcome") == "cut")
        .then(pl.lit("unknown"))
        .otherwise(pl.lit("not_seen"))
    )
    return PROGRESS_LOOPS.conform(
        complete.with_columns(
            loop=pl.col("loop").cast(pl.Enum(LOOPS)),
            progress=progress.cast(pl.Enum(PROGRESS)),
            start_ns="first",
            took_ns=pl.col("last") - pl.col("first"),
            n_interrupts=pl.lit(None, pl.UInt32),
        )
    )


def _local_retries(trace: Trace, calls: pl.DataFrame, local_retry_ns: int) -> pl.DataFrame:
    """Return faults after which a vCPU's thread had no activity for ``local_retry_ns``."""
    faults = PAGE_FAULTS.conform(trace.page_faults).filter(pl.col("tid").is_not_null())
    entries = VM_ENTRIES.conform(trace.vm_entries)
    events = HOST_EVENTS.conform(trace.host_events)
    # Without probes on SEAMCALLs, missing activity is not evidence.
    probed_sources = calls.filter(pl.col("leaf") != VP_ENTER).select("source").unique()
    faults = faults.join(probed_sources, on="source", how="semi")
    activity = pl.concat(
        [
            *(f.select(*_VCPU, at=pl.coalesce("start_ns", "end_ns")) for f in (calls, entries)),
            *(f.select(*_VCPU, at="ts_ns") for f in (events, faults)),
        ]
    ).drop_nulls()
    rows = faults.sort("ts_ns").join_asof(
        activity.with_columns(next_ns="at").sort("at"),
        left_on="ts_ns",
        right_on="at",
        by=_VCPU,
        strategy="forward",
        allow_exact_matches=False,
        check_sortedness=False,
    )
    ends_ns = enumerate(source.last_ns for source in trace.provenance.sources)
    last = {number: ns for number, ns in ends_ns if ns is not None}
    ends = pl.col("source").replace_strict(last, default=None, return_dtype=pl.Int64)
    took = pl.coalesce("next_ns", ends) - pl.col("ts_ns")
    long = rows.with_columns(took_ns=took).filter(pl.col("took_ns") >= local_retry_ns)
    progress = pl.when(pl.col("next_ns").is_not_null()).then(pl.lit("seen"))
    return PROGRESS_LOOPS.conform(
        long.with_columns(
            first_seq="seq",
            loop=pl.lit("local_retry", pl.Enum(LOOPS)),
            leaf=pl.lit(None, pl.UInt16),
            td_id=pl.lit(None, pl.UInt64),
            start_ns="ts_ns",
            n_repeats=pl.lit(0, pl.UInt32),
            n_interrupts=pl.lit(None, pl.UInt32),
            progress=progress.otherwise(pl.lit("unknown")).cast(pl.Enum(PROGRESS)),
        )
    )


def _with_interrupts(found: pl.DataFrame, trace: Trace) -> pl.DataFrame:
    """Add the number of interrupts on the loop's CPU while it lasted, where recorded."""
    events = trace.host_events.filter(pl.col("event").str.contains(_INTERRUPTS))
    in_irq = trace.seamcalls.filter(pl.col("in_irq").fill_null(False))
    interrupts = pl.concat(
        [
            events.select("source", "cpu", at="ts_ns"),
            in_irq.select("source", "cpu", at=pl.coalesce("start_ns", "end_ns")),
        ]
    ).drop_nulls()
    if events.is_empty() or found.is_empty():
        return found
    sums = interrupts.sort("at").with_columns(n=pl.int_range(1, pl.len() + 1).over("source", "cpu"))
    rows = found.with_columns(end=pl.col("start_ns") + pl.col("took_ns"))
    for at, name in (("start_ns", "before"), ("end", "until")):
        keyed = sums.select("source", "cpu", "at", pl.col("n").alias(name))
        rows = (
            rows.sort(at)
            .join_asof(
                keyed,
                left_on=at,
                right_on="at",
                by=["source", "cpu"],
                check_sortedness=False,
                allow_exact_matches=name == "until",
            )
            .drop("at", strict=False)
        )
    n = pl.col("until").fill_null(0) - pl.col("before").fill_null(0)
    known = pl.col("cpu").is_not_null()
    return rows.with_columns(n_interrupts=pl.when(known).then(n.cast(pl.UInt32)))
