"""Calls of every thread with their time bounds: SEAMCALLs, and vCPU entries seen by KVM only."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.threads import VP_ENTER, infer_td
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tdx.wrappers import PAGES

_COLUMNS: Final = (
    *("source", "seq", "leaf", "tid", "tgid", "td_id", "vp_id", "gpa", "level", *PAGES),
    *("status", "start_ns", "end_ns", "cpu"),
)


def activity(seamcalls: pl.DataFrame, vm_entries: pl.DataFrame) -> pl.DataFrame:
    """Merge the SEAMCALLs and vCPU entries of one source into one table with time bounds.

    A call without a recorded entry is bounded by the thread's previous call, one without a
    recorded return by its next call.  vCPUs whose TDH.VP.ENTER was not probed are represented
    by the ``vm_entries`` of KVM's own events.

    Args:
        seamcalls: The ``seamcalls`` rows of one source.
        vm_entries: Its ``vm_entries`` rows.

    Returns:
        One row per call or entry, in the order of ``seamcalls``, entries last: columns of
        ``seamcalls`` with td_id inferred where null, and begins and ends (Int64, ns: bounds
        where start_ns or end_ns is null), certain (Boolean: both were recorded).  The status
        of an entry that KVM reports as failed is null.
    """
    calls = SEAMCALLS.with_optional(seamcalls).select(
        *_COLUMNS, returned=pl.col("status").is_not_null()
    )
    probed = calls.filter(pl.col("leaf") == VP_ENTER).select("tid").unique()
    entries = vm_entries.join(probed, on="tid", how="anti").select(
        "source",
        "seq",
        pl.lit(VP_ENTER, pl.UInt16).alias("leaf"),
        "tid",
        "tgid",
        *(pl.lit(None, calls.schema[c]).alias(c) for c in ("td_id", "vp_id", "gpa")),
        *(pl.lit(None, calls.schema[c]).alias(c) for c in ("level", *PAGES)),
        pl.col("exit_reason").cast(pl.UInt64).replace(0xFFFF_FFFF, None).alias("status"),
        "start_ns",
        "end_ns",
        "cpu",
        returned=pl.col("end_ns").is_not_null(),
    )
    merged = calls if entries.is_empty() else pl.concat([calls, entries])
    return _bounded(infer_td(merged, merged))


def _bounded(calls: pl.DataFrame) -> pl.DataFrame:
    """Add begins, ends (ns) and certain, bounded by the neighbouring calls of the thread."""
    certain = pl.col("start_ns").is_not_null() & pl.col("end_ns").is_not_null()
    if not (calls["start_ns"].null_count() or calls["end_ns"].null_count()):
        return calls.with_columns(begins="start_ns", ends="end_ns", certain=certain)
    at, latest = pl.coalesce("start_ns", "end_ns"), pl.max_horizontal("start_ns", "end_ns")
    first, last = calls.select(first=at.min(), last=latest.max()).row(0)
    order = calls.select(pl.arg_sort_by("tid", at, "seq")).to_series()
    before = pl.coalesce("end_ns", "start_ns").shift().over("tid").fill_null(first)
    after = pl.coalesce("start_ns", "end_ns").shift(-1).over("tid").fill_null(last)
    # Few calls lack a bound: only those are computed.
    open_ended = (
        calls.select("tid", "start_ns", "end_ns")[order]
        .with_columns(row=order, before=before, after=after)
        .filter(~certain)
        .select(
            "row",
            begins=pl.coalesce("start_ns", pl.min_horizontal("before", "end_ns")),
            ends=pl.coalesce("end_ns", pl.max_horizontal("after", "start_ns")),
        )
    )
    return calls.with_columns(
        begins=calls["start_ns"].clone().scatter(open_ended["row"], open_ended["begins"]),
        ends=calls["end_ns"].clone().scatter(open_ended["row"], open_ended["ends"]),
        certain=certain,
    )
