"""The ``step_thresholds`` table: zero-step episodes that each threshold would have caused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import polars as pl

from tdxtrace.analysis.threads import VP_ENTER, unprobed_entries
from tdxtrace.analysis.zero_steps import (
    exits_without_progress,
    no_progress_run,
    steps_from_kvm_events,
    steps_from_seamcalls,
)
from tdxtrace.tables.events import PAGE_FAULTS, SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import STEP_THRESHOLDS

# The module's threshold is 6 (STEPPING_EPF_THRESHOLD, TDX module 1.0.00 to 1.5.25,
# td_exit_stepping.h); 6, 10 and more were discussed on the mailing list (S. Christopherson,
# 2024-10-10).
THRESHOLDS: Final = range(4, 17)
_VCPU: Final = ("source", "tid")
# Columns of steps that ``no_progress_run`` needs.
_STEP_COLUMNS: Final = (*_VCPU, "when", "seq", "reason", "installs", "installed", "gpa")


def step_thresholds(
    seamcalls: pl.DataFrame,
    vm_entries: pl.DataFrame,
    page_faults: pl.DataFrame,
    *,
    thresholds: Iterable[int] = THRESHOLDS,
) -> pl.DataFrame:
    """Count the runs of faults without progress that exceed each threshold.

    A run consists of the EPT violations of one vCPU between two signs of progress, as in
    :func:`~tdxtrace.analysis.zero_steps.zero_steps`.  A threshold of n tolerates n faults; the
    next fault arms the mitigation.  The guest's RIP is not traced, so a run may span several
    instructions: each count is an upper bound.  A run also includes faults that the module emulated
    because it was already armed, so the counts show which runs would have armed the mitigation,
    not how long they would have been.

    Args:
        seamcalls: The ``seamcalls`` table.
        vm_entries: The ``vm_entries`` table.
        page_faults: The ``page_faults`` table.
        thresholds: Thresholds to evaluate.

    Returns:
        The ``step_thresholds`` table: every threshold, in ascending order, for each source with
        vCPU entries.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    calls = SEAMCALLS.conform(seamcalls)
    entries = VM_ENTRIES.conform(vm_entries)
    runs = pl.concat(
        [
            _runs_from_seamcalls(calls),
            _runs_from_kvm_events(entries, calls, PAGE_FAULTS.conform(page_faults)),
        ]
    )
    if runs.is_empty():
        return STEP_THRESHOLDS.empty()
    tried = pl.DataFrame({"threshold": list(thresholds)}, schema={"threshold": pl.UInt32})
    exceeds = pl.col("n") > pl.col("threshold")
    found = (
        runs.group_by("source", "tid", "n")
        .agg(times=pl.len().cast(pl.UInt64))
        .join(tried, how="cross")
        .group_by("source", "threshold")
        .agg(
            n_runs=pl.col("times").filter(exceeds).sum(),
            n_faults=((pl.col("n") - pl.col("threshold")) * pl.col("times"))
            .filter(exceeds)
            .sum()
            .cast(pl.UInt64),
            n_vcpus=pl.col("tid").filter(exceeds).n_unique().cast(pl.UInt32),
            max_run=pl.col("n").max().cast(pl.UInt32),
        )
        .sort("source", "threshold")
    )
    return STEP_THRESHOLDS.conform(found)


def _runs_from_seamcalls(calls: pl.DataFrame) -> pl.DataFrame:
    """Return the runs of vCPUs whose TDH.VP.ENTER was probed."""
    vcpus = calls.filter(pl.col("leaf") == VP_ENTER).select(_VCPU).unique()
    steps = (
        steps_from_seamcalls(calls)
        .select(_STEP_COLUMNS)
        .join(vcpus, on=_VCPU, how="semi", nulls_equal=True)
    )
    return _runs(steps.sort(*_VCPU, "when", "seq"))


def _runs_from_kvm_events(
    entries: pl.DataFrame, calls: pl.DataFrame, faults: pl.DataFrame
) -> pl.DataFrame:
    """Return the runs of the other vCPUs, which have only KVM's own events."""
    return _runs(steps_from_kvm_events(unprobed_entries(entries, calls), calls, faults))


def _runs(steps: pl.DataFrame) -> pl.DataFrame:
    rows = no_progress_run(steps, exits_without_progress())
    # Runs without a fault exceed no threshold, but count for max_run.
    counted = rows.group_by("run").agg(pl.col(*_VCPU).first(), n=pl.col("is_fault").sum())
    return counted.select(*_VCPU, pl.col("n").cast(pl.Int64))
