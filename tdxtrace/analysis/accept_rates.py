"""The ``accept_rates`` table: rate at which memory is added to TDs, and what limits it."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.slices import add_slice_width, cut_to_slices
from tdxtrace.analysis.threads import infer_td
from tdxtrace.analysis.time_shares import timed_attempts, vcpu_times
from tdxtrace.tables.events import SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.lifecycle import ACCEPT_LIMITS, ACCEPT_RATES
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tdx import status, word
from tdxtrace.tdx.leaves import parse_leaf
from tdxtrace.tdx.operands import n_small_pages

AUG: Final = parse_leaf("TDH.MEM.PAGE.AUG")[0]
SEPT_ADD: Final = parse_leaf("TDH.MEM.SEPT.ADD")[0]
_NO_ENTRIES: Final = (
    "entries of the vCPUs were not recorded: record kvm:kvm_entry and kvm:kvm_exit, or probe "
    "tdx_vcpu_run, to distinguish the guest's time from the host's"
)
_NO_TIMES: Final = (
    "starts of the calls were not recorded: probe entry and return of the wrappers "
    "(tdxtrace capture plan --level full)"
)
_NO_THREADS: Final = (
    "the threads of some calls were not recorded, so the number of vCPUs that shared the time is "
    "unknown: record thread IDs (perf script -F +tid)"
)
_SLICE: Final = ("source", "td_id", "tgid", "slice")
_TIMES: Final = ("call_ns", "retry_ns", "refused_ns", "guest_ns")
_COUNTS: Final = ("n_busy_tree", "n_busy_entry", "n_busy_other", "n_refused")


def accept_rates(
    seamcalls: pl.DataFrame,
    vm_entries: pl.DataFrame,
    chains: pl.DataFrame,
    busy_answers: pl.DataFrame,
) -> pl.DataFrame:
    """Count the pages added to TDs over time, and break down the time of their vCPUs.

    Where entries were recorded, only requests of threads that entered a vCPU are used: a page
    installed by another thread (prefault) was not requested by a fault.  Intervals are cut at
    slice boundaries; an attempt belongs to the slice in which it ended.  Calls of unknown threads
    are counted only in the rows of their TD, where ``limited_by`` is then withheld.

    Args:
        seamcalls: The ``seamcalls`` table.
        vm_entries: The ``vm_entries`` table.
        chains: The ``retry_chains`` table of these calls.
        busy_answers: The ``busy_answers`` table of these chains.

    Returns:
        The ``accept_rates`` table, by source, TD, time and vCPU (null first: sum of all vCPUs).

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    calls, requests = SEAMCALLS.conform(seamcalls), RETRY_CHAINS.conform(chains)
    attempts = timed_attempts(calls, requests, BUSY_ANSWERS.conform(busy_answers))
    entered = vcpu_times(attempts, VM_ENTRIES.conform(vm_entries), calls)
    accept_calls = attempts.filter(pl.col("leaf").is_in([AUG, SEPT_ADD]))
    accept_calls = infer_td(accept_calls, requests)
    threads = entered.select("source", "tid").unique()
    has_entries = threads.select("source").unique()
    others = accept_calls.join(has_entries, on="source", how="anti")
    accept_calls = pl.concat(
        [accept_calls.join(threads, on=["source", "tid"], how="semi", nulls_equal=True), others]
    )
    accept_calls = _with_pages(accept_calls, requests)
    spans = _spans(accept_calls)
    if spans.is_empty():
        return ACCEPT_RATES.empty()
    parts = _parts(accept_calls, entered, spans)
    pages_by_slice = _in_slices(accept_calls, spans)
    return _rows(pages_by_slice, parts, spans, has_entries)


def _with_pages(accept_calls: pl.DataFrame, requests: pl.DataFrame) -> pl.DataFrame:
    """Add the number of 4K pages that each attempt installed; 0 unless a successful AUG."""
    is_done = (pl.col("leaf") == AUG) & word.is_success(pl.col("status")).fill_null(False)
    levels = requests.select("source", "level", chain="first_seq")
    return accept_calls.join(levels, on=["source", "chain"], how="left").with_columns(
        n=pl.when(is_done).then(n_small_pages(pl.col("level"))).otherwise(0)
    )


def _spans(accept_calls: pl.DataFrame) -> pl.DataFrame:
    """Return first attempt, last page and slice width of each input with installed pages."""
    spans = accept_calls.group_by("source").agg(
        first_ns=pl.col("when").min(),
        last_ns=pl.col("when_end").filter(pl.col("n") > 0).max() + 1,
    )
    return add_slice_width(spans.drop_nulls("last_ns"))


def _in_slices(accept_calls: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """Return pages, faults and whether calls have durations, per vCPU and slice."""
    at = (pl.col("when_end") - pl.col("first_ns")) // pl.col("width_ns")
    rows = accept_calls.join(spans, on="source").with_columns(slice=at)
    rows = rows.filter(pl.col("when_end") < pl.col("last_ns"))
    return rows.group_by(*_SLICE, "tid").agg(
        n_pages=pl.col("n").sum(),
        n_faults=(pl.col("n") > 0).sum().cast(pl.UInt64),
        is_timed=(pl.col("took") > 0).any(),
    )


def _parts(accept_calls: pl.DataFrame, entered: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """Return the breakdown of each thread's time, and its busy answers, per slice."""
    state = pl.col("status")
    retried = status.is_retryable(state).fill_null(False)
    busy = word.is_busy_on(state, word.TDX_OPERAND_ID_SEPT).fill_null(False)
    entry = word.is_busy_on(state, word.TDX_OPERAND_ID_RCX).fill_null(False)
    calls = accept_calls.select(
        *("source", "tid", "when", "when_end"),
        kind=pl.when(retried).then(pl.lit("retry_ns")).otherwise(pl.lit("call_ns")),
        answer=pl.when(busy)
        .then(pl.lit("n_busy_tree"))
        .when(entry)
        .then(pl.lit("n_busy_entry"))
        .when(retried)
        .then(pl.lit("n_busy_other")),
    )
    waits = _waits(accept_calls, entered)
    inside = entered.select(
        *("source", "tid", "when", "when_end"),
        kind=pl.when("is_refused").then(pl.lit("refused_ns")).otherwise(pl.lit("guest_ns")),
        answer=pl.when("is_refused").then(pl.lit("n_refused")),
    )
    rows = pl.concat([calls, waits, inside]).join(spans, on="source")
    rows = rows.filter(
        pl.col("when") < pl.col("last_ns"), pl.col("when_end") >= pl.col("first_ns")
    ).with_columns(
        when=pl.max_horizontal("when", "first_ns"),
        when_end=pl.min_horizontal("when_end", "last_ns"),
        # An attempt that ends after the last page belongs to no slice.
        answer=pl.when(pl.col("when_end") < pl.col("last_ns")).then("answer"),
    )
    cut = cut_to_slices(rows, "when", "when_end")
    ends = (pl.col("when_end") - pl.col("first_ns")) // pl.col("width_ns") == pl.col("slice")
    return cut.group_by("source", "tid", "slice").agg(
        *(pl.col("part_ns").filter(pl.col("kind") == name).sum().alias(name) for name in _TIMES),
        *(
            (ends & (pl.col("answer") == name)).sum().cast(pl.UInt64).alias(name)
            for name in _COUNTS
        ),
    )


def _waits(accept_calls: pl.DataFrame, entered: pl.DataFrame) -> pl.DataFrame:
    """Return the times between attempts at a request, except those with an entry of the vCPU."""
    waits = (
        accept_calls.filter(~pl.col("single"))
        .sort("source", "chain", "when")
        .with_columns(before=pl.col("when_end").shift(1).over("source", "chain"))
        .filter(pl.col("before") < pl.col("when"))
        .sort("before")
    )
    entries = entered.select("source", "tid", entry_ns="when").sort("entry_ns")
    waits = waits.join_asof(
        entries,
        left_on="before",
        right_on="entry_ns",
        by=["source", "tid"],
        strategy="forward",
        check_sortedness=False,
    )
    return waits.filter((pl.col("entry_ns") >= pl.col("when")).fill_null(True)).select(
        *("source", "tid"),
        when="before",
        when_end="when",
        kind=pl.lit("retry_ns"),
        answer=pl.lit(None, pl.String),
    )


def _rows(
    pages_by_slice: pl.DataFrame,
    parts: pl.DataFrame,
    spans: pl.DataFrame,
    has_entries: pl.DataFrame,
) -> pl.DataFrame:
    """Return one row per vCPU and slice, and one per TD and slice."""
    by_thread = pages_by_slice.join(
        parts, on=["source", "tid", "slice"], how="left", nulls_equal=True
    )
    by_thread = by_thread.with_columns(
        pl.col(*_TIMES, *_COUNTS).fill_null(0),
        n_vcpus=pl.lit(1, pl.UInt32),
        is_known=pl.col("tid").is_not_null(),
    )
    sums = ("n_pages", "n_faults", "n_vcpus", *_TIMES, *_COUNTS)
    by_td = by_thread.group_by(_SLICE).agg(
        pl.col(*sums).sum(), pl.col("is_timed").any(), pl.col("is_known").all()
    )
    by_td = by_td.with_columns(
        tid=pl.lit(None, pl.Int32), n_vcpus=pl.col("n_vcpus").cast(pl.UInt32)
    )
    known = by_thread.filter("is_known")
    rows = pl.concat([by_td.select(by_thread.columns), known]).join(spans, on="source")
    rows = rows.join(has_entries.with_columns(is_entered=True), on="source", how="left")
    start = pl.col("first_ns") + pl.col("slice") * pl.col("width_ns")
    rows = rows.with_columns(
        start_ns=start, end_ns=pl.min_horizontal(start + pl.col("width_ns"), "last_ns")
    )
    length = pl.col("end_ns") - pl.col("start_ns")
    threads_ns = length * pl.col("n_vcpus")
    is_entered = pl.col("is_entered").is_not_null()
    rows = rows.with_columns(
        pages_per_s=pl.col("n_pages") * 1e9 / length,
        page_ns=pl.when("is_known", pl.col("n_pages") > 0).then(threads_ns / pl.col("n_pages")),
        host_ns=(threads_ns - pl.sum_horizontal(_TIMES)).clip(0),
    ).with_columns(
        pl.when(is_entered).then(pl.col("refused_ns", "guest_ns")),
        pl.when(is_entered, "is_known").then("host_ns"),
    )
    order = ("source", "td_id", "tgid", "start_ns", "tid")
    return ACCEPT_RATES.conform(_with_limit(rows).sort(order, nulls_last=False))


def _with_limit(rows: pl.DataFrame) -> pl.DataFrame:
    """Add the largest part of the time, or the reason why it is withheld."""
    largest = pl.max_horizontal(*_TIMES, "host_ns")
    by_name = {
        "guest": "guest_ns",
        "host": "host_ns",
        "seamcalls": "call_ns",
        "lock_contention": "retry_ns",
        "refused_entries": "refused_ns",
    }
    limit = pl.coalesce(
        pl.when(pl.col(by_name[name]) == largest).then(pl.lit(name, pl.Enum(ACCEPT_LIMITS)))
        for name in ACCEPT_LIMITS
    )
    withheld = (
        pl.when(pl.col("is_entered").is_null())
        .then(pl.lit(_NO_ENTRIES))
        .when(~pl.col("is_timed"))
        .then(pl.lit(_NO_TIMES))
        .when(~pl.col("is_known"))
        .then(pl.lit(_NO_THREADS))
    )
    rows = rows.with_columns(withheld=withheld)
    return rows.with_columns(limited_by=pl.when(pl.col("withheld").is_null()).then(limit))
