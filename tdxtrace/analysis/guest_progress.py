"""Entries of vCPUs that executed no guest code."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.threads import VP_ENTER, unprobed_entries
from tdxtrace.analysis.zero_steps import (
    EMULATED_EXIT_NS,
    exit_reason_of_entry,
    exits_without_progress,
)
from tdxtrace.tables.trace import Trace
from tdxtrace.tdx.exit_reasons import NOT_ENTERED, exit_reason_number

_VCPU: Final = ("source", "tid")
_EPT_VIOLATION: Final = exit_reason_number("EPT_VIOLATION") or 0
_PAGE_BYTES: Final = 4096


def entries_by_progress(trace: Trace) -> pl.DataFrame:
    """Classify each entry of a vCPU by whether it executed guest code.

    An entry executed nothing if it was refused, or if it ended in an EPT violation at once or on
    the page of the previous fault, with only faults and interrupts as exits in between (so the
    guest did not pass that fault).  The nearest case that did execute is an entry that reaches its
    next new page: that fault is on another page, and occurs later.  An entry ended by an interrupt
    counts as executed, which may be wrong: 0.8 % of single steps execute nothing (TDXdown, CCS
    2024).

    Args:
        trace: The events; a fault without a recorded page counts as a fault on another page.

    Returns:
        Columns source, tid, when (ns, as in ``zero_steps``), refused and nothing (Boolean), ordered
        by thread and time.
    """
    entries = _entries(trace)
    faults = _pages_of_faults(entries, trace.page_faults)
    entries = entries.join(faults, on="id", how="left", maintain_order="left")
    at_once = pl.col("end_ns") - pl.col("start_ns") <= EMULATED_EXIT_NS
    in_fault = pl.col("fault") & (at_once.fill_null(False) | pl.col("is_same"))
    nothing = (pl.col("refused") | in_fault).fill_null(False)
    return entries.select(*_VCPU, "when", "refused", nothing=nothing)


def _entries(trace: Trace) -> pl.DataFrame:
    """Return entries by thread and time, with the number of exits so far that show progress."""
    start, end = pl.col("start_ns"), pl.col("end_ns")
    of_calls = trace.seamcalls.filter(pl.col("leaf") == VP_ENTER).select(
        *(*_VCPU, "start_ns", "end_ns"),
        when=pl.coalesce(start, end),
        reason=exit_reason_of_entry(),
        refused=pl.col("status").is_not_null() & exit_reason_of_entry().is_null(),
    )
    of_kvm = unprobed_entries(trace.vm_entries, trace.seamcalls).select(
        *(*_VCPU, "start_ns", "end_ns"),
        when=pl.coalesce(end, start),
        reason="exit_reason",
        refused=pl.col("exit_reason") == NOT_ENTERED,
    )
    passed = ~pl.col("refused") & ~pl.col("reason").is_in(exits_without_progress())
    return (
        pl.concat([of_calls, of_kvm])
        .drop_nulls(["tid", "when"])
        .sort(*_VCPU, "when")
        .with_row_index("id")
        .with_columns(
            pl.col("refused").fill_null(False),
            fault=(pl.col("reason") == _EPT_VIOLATION).fill_null(False),
            next_ns=pl.coalesce(start, end).shift(-1).over(_VCPU),
            n_passed=passed.fill_null(False).cum_sum().over(_VCPU),
        )
    )


def _pages_of_faults(entries: pl.DataFrame, page_faults: pl.DataFrame) -> pl.DataFrame:
    """Return for each entry that ended in a fault (id) whether the previous fault had its page."""
    pages = page_faults.select(*_VCPU, "ts_ns", page=pl.col("gpa") // _PAGE_BYTES).drop_nulls()
    found = (
        entries.filter("fault")
        .with_columns(at=pl.coalesce("end_ns", "start_ns"))
        .sort("at")
        .join_asof(
            pages.sort("ts_ns"),
            left_on="at",
            right_on="ts_ns",
            by=_VCPU,
            strategy="forward",
            check_sortedness=False,
        )
        .sort("id")
    )
    page = pl.when((pl.col("ts_ns") <= pl.col("next_ns")).fill_null(True)).then("page")
    same = [pl.col(name) == pl.col(name).shift().over(_VCPU) for name in ("page", "n_passed")]
    return found.with_columns(page=page).select("id", is_same=pl.all_horizontal(same))
