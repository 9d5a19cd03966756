"""The ``module_updates`` table: updates of the TDX module, and what waited for them."""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from tdxtrace.tables.events import HOST_EVENTS, LOADER_CALLS, PAGE_FAULTS, SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.lifecycle import MODULE_UPDATES
from tdxtrace.tables.trace import Trace
from tdxtrace.tdx.leaves import numbers_of
from tdxtrace.tdx.loader import loader_status_table, parse_loader_leaf

_INSTALL: Final = parse_loader_leaf("SEAMLDR.INSTALL")
# SEAMCALLs that the update itself makes before and after the install, while all CPUs are stopped:
# Linux 7.2 arch/x86/virt/vmx/tdx/seamldr.c do_seamldr_install_module.
_OF_UPDATE: Final = ("TDH.SYS.SHUTDOWN", "TDH.SYS.INIT", "TDH.SYS.LP.INIT", "TDH.SYS.UPDATE")
# Minimum total of other events within one update's length before and after the update.  With this
# many, their absence during the update is not chance (a Poisson count with mean 10 is 0 once in
# 22,000).
_MIN_NEARBY: Final = 10
_FEW: Final = (
    "{n} other events were recorded in equally long intervals before and after it, too few to show "
    "that all CPUs stopped; record KVM's entries and SEAMCALLs while TDs run"
)
_LOST: Final = (
    "events were lost during it, so an absence of events shows nothing; use a larger buffer"
)
_NO_TIME: Final = "the start or end of its calls was not recorded: probe their entry and return"


def module_updates(trace: Trace, chains: pl.DataFrame) -> pl.DataFrame:
    """Determine whether each update of the TDX module stopped all CPUs, and count what waited.

    An update consists of consecutive SEAMLDR.INSTALL calls; the next update begins with the first
    call on a CPU whose call was already answered.  A status after which the same call is repeated
    is not an answer.  All CPUs stopped if no other event was recorded between the start of the
    first call and the end of the last call, although events were recorded before and after.
    Absence: if few events were recorded around the update, or events were lost, the result is
    unknown.

    Args:
        trace: The trace.
        chains: Its ``retry_chains`` table.

    Returns:
        The ``module_updates`` table, sorted by source and update number.

    Raises:
        TableError: If a table lacks a column or has one of another type.
    """
    calls = LOADER_CALLS.conform(trace.loader_calls).filter(pl.col("loader_leaf") == _INSTALL)
    if calls.is_empty():
        return MODULE_UPDATES.empty()
    calls = _numbered(calls.sort("source", pl.coalesce("start_ns", "end_ns"), "seq"))
    requests = RETRY_CHAINS.conform(chains)
    rows = []
    for of_source in calls.partition_by("source", maintain_order=True):
        events = _events(trace, of_source["source"][0])
        rows += [
            _row(part, events, requests, trace.losses)
            for part in of_source.partition_by("update", maintain_order=True)
        ]
    return MODULE_UPDATES.conform(pl.DataFrame(rows, schema=MODULE_UPDATES.schema))


def _numbered(calls: pl.DataFrame) -> pl.DataFrame:
    """Number the updates of each source; a call on an answered CPU begins the next update."""
    again = _repeated()
    numbers: list[int] = []
    source, number, answered = -1, 0, set[int | None]()
    for row in calls.select("source", "cpu", "status").iter_rows():
        if row[0] != source:
            source, number, answered = row[0], 1, set()
        elif row[1] in answered:
            number, answered = number + 1, set()
        numbers.append(number)
        if row[2] not in again:
            answered.add(row[1])
    return calls.with_columns(update=pl.Series(numbers, dtype=pl.UInt32))


def _repeated() -> set[int]:
    """Return the P-SEAMLDR statuses after which the host repeats the same call."""
    table = loader_status_table().filter(pl.col("host_retry") == "same")
    return set(table["status"])


def _events(trace: Trace, source: int) -> pl.DataFrame:
    """Return the times of all other events of one source, and whether the thread runs a vCPU."""
    of_update = pl.col("leaf").is_in(numbers_of(list(_OF_UPDATE)))
    entries = VM_ENTRIES.conform(trace.vm_entries)
    calls = SEAMCALLS.conform(trace.seamcalls)
    vcpus = pl.concat(
        [entries.select("source", "tid"), calls.filter(pl.col("leaf") == 0).select("source", "tid")]
    ).unique()
    parts = [
        *(entries.select("source", "tid", ts_ns=name) for name in ("start_ns", "end_ns")),
        *(
            calls.filter(~of_update).select("source", "tid", ts_ns=name)
            for name in ("start_ns", "end_ns")
        ),
        PAGE_FAULTS.conform(trace.page_faults).select("source", "tid", "ts_ns"),
        HOST_EVENTS.conform(trace.host_events).select("source", "tid", "ts_ns"),
    ]
    rows = pl.concat(parts).filter(pl.col("source") == source).drop_nulls("ts_ns")
    return rows.join(
        vcpus.with_columns(is_vcpu=True), on=["source", "tid"], how="left", nulls_equal=True
    ).sort("ts_ns")


def _row(
    calls: pl.DataFrame, events: pl.DataFrame, requests: pl.DataFrame, losses: pl.DataFrame
) -> dict[str, Any]:
    source = calls["source"][0]
    start = int(calls.select(pl.coalesce("start_ns", "end_ns").min()).item())
    end = int(calls.select(pl.coalesce("end_ns", "start_ns").max()).item())
    at = pl.col("ts_ns")
    before, after = events.filter(at <= start), events.filter(at >= end)
    meanwhile = events.filter(at > start, at < end)
    length = end - start
    n_near = before.filter(at >= start - length).height + after.filter(at <= end + length).height
    withheld = _why_unknown(calls, losses, (start, end), n_near)
    waits = _waits(before, meanwhile, after)
    again = pl.col("status").is_in(list(_repeated()))
    failed = (pl.col("status") != 0) & ~again
    of_source = requests.filter(pl.col("source") == source)
    known = bool(before.height and after.height)
    stopped = "not_all" if meanwhile.height else "unknown" if withheld else "all"
    return {
        "source": source,
        "update": calls["update"][0],
        "first_seq": calls["seq"].min(),
        "start_ns": start,
        "end_ns": end,
        "n_calls": calls.height,
        "n_cpus": calls["cpu"].n_unique(),
        "n_repeated": calls.filter(again).height,
        "n_failed": calls.filter(failed).height,
        "longest_ns": calls.select((pl.col("end_ns") - pl.col("start_ns")).max()).item(),
        "stopped": stopped,
        "n_meanwhile": meanwhile.height,
        "stopped_ns": int(after["ts_ns"][0]) - int(before["ts_ns"][-1])
        if known and stopped == "all"
        else None,
        "n_vcpus": waits.height,
        "n_requests": of_source.filter(
            pl.col("start_ns") < start, pl.col("end_ns") > end, pl.col("outcome") != "cut"
        ).height,
        "longest_wait_ns": waits["wait_ns"].max(),
        "withheld": withheld if stopped == "unknown" else None,
    }


def _why_unknown(
    calls: pl.DataFrame, losses: pl.DataFrame, span: tuple[int, int], n_near: int
) -> str | None:
    """Return why the absence of other events in ``span`` is not evidence; None if it is."""
    if calls.select(pl.col("start_ns", "end_ns").null_count()).sum_horizontal().item():
        return _NO_TIME
    lost = losses.filter(
        pl.col("source") == calls["source"][0],
        pl.col("severity") == "data_loss",
        pl.col("start_ns").fill_null(span[0]) <= span[1],
        pl.col("end_ns").fill_null(span[1]) >= span[0],
    )
    if lost.height:
        return _LOST
    return None if n_near >= _MIN_NEARBY else _FEW.format(n=n_near)


def _waits(before: pl.DataFrame, meanwhile: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """Return the time without events of each vCPU that has events before and after, none during."""
    last = before.filter("is_vcpu").group_by("tid").agg(last_ns=pl.col("ts_ns").max())
    first = after.filter("is_vcpu").group_by("tid").agg(first_ns=pl.col("ts_ns").min())
    both = last.join(first, on="tid").join(meanwhile.select("tid"), on="tid", how="anti")
    return both.with_columns(wait_ns=pl.col("first_ns") - pl.col("last_ns"))
