"""What every thread did and for how long: SEAMCALLs, and entries that only KVM shows."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.conflicts import VP_ENTER

_COLUMNS: Final = (
    *("seq", "leaf", "tid", "tgid", "td_id", "vp_id", "gpa", "level", "page", "status"),
    *("start_ns", "end_ns", "cpu"),
)


def activity(seamcalls: pl.DataFrame, vm_entries: pl.DataFrame) -> pl.DataFrame:
    """Put what the threads of one source did into one table.

    A call whose entry was not seen began after whatever its thread did before; one whose
    return was not seen ended before what it did next.  Entries of vCPUs whose
    TDH.VP.ENTER was not probed are taken from KVM's own events.

    Args:
        seamcalls: The ``seamcalls`` rows of one source.
        vm_entries: Its ``vm_entries`` rows.

    Returns:
        One row per call or entry, in the order of ``seamcalls``, entries last: columns of
        ``seamcalls`` with td_id completed, and begins and ends (Int64, ns: bounds where
        start_ns or end_ns is null), certain (Boolean: both were seen).  The status of an
        entry that KVM shows as failed is null.
    """
    calls = seamcalls.select(*_COLUMNS, returned=pl.col("status").is_not_null())
    told = calls.filter(pl.col("leaf") == VP_ENTER).select("tid").unique()
    entries = vm_entries.join(told, on="tid", how="anti").select(
        "seq",
        pl.lit(VP_ENTER, pl.UInt16).alias("leaf"),
        "tid",
        "tgid",
        *(pl.lit(None, calls.schema[c]).alias(c) for c in ("td_id", "vp_id", "gpa")),
        *(pl.lit(None, calls.schema[c]).alias(c) for c in ("level", "page")),
        pl.col("exit_reason").cast(pl.UInt64).replace(0xFFFF_FFFF, None).alias("status"),
        "start_ns",
        "end_ns",
        "cpu",
        returned=pl.col("end_ns").is_not_null(),
    )
    done = calls if entries.is_empty() else pl.concat([calls, entries])
    return _bounded(_with_td(done))


def _bounded(done: pl.DataFrame) -> pl.DataFrame:
    """Begins and ends of every row, bounded by the thread's neighbours where not seen."""
    certain = pl.col("start_ns").is_not_null() & pl.col("end_ns").is_not_null()
    if not (done["start_ns"].null_count() or done["end_ns"].null_count()):
        return done.with_columns(begins="start_ns", ends="end_ns", certain=certain)
    at, latest = pl.coalesce("start_ns", "end_ns"), pl.max_horizontal("start_ns", "end_ns")
    first, last = done.select(first=at.min(), last=latest.max()).row(0)
    order = done.select(pl.arg_sort_by("tid", at, "seq")).to_series()
    before = pl.coalesce("end_ns", "start_ns").shift().over("tid").fill_null(first)
    after = pl.coalesce("start_ns", "end_ns").shift(-1).over("tid").fill_null(last)
    # Few calls lack an end: only they are looked at more closely.
    open_ended = (
        done.select("tid", "start_ns", "end_ns")[order]
        .with_columns(row=order, before=before, after=after)
        .filter(~certain)
        .select(
            "row",
            begins=pl.coalesce("start_ns", pl.min_horizontal("before", "end_ns")),
            ends=pl.coalesce("end_ns", pl.max_horizontal("after", "start_ns")),
        )
    )
    return done.with_columns(
        begins=done["start_ns"].clone().scatter(open_ended["row"], open_ended["begins"]),
        ends=done["end_ns"].clone().scatter(open_ended["row"], open_ended["ends"]),
        certain=certain,
    )


def _with_td(done: pl.DataFrame) -> pl.DataFrame:
    """The TD of calls that do not name it: the only one of the thread, process or source."""
    if not done["td_id"].null_count():
        return done
    named = done.filter(pl.col("td_id").is_not_null())
    everywhere = named["td_id"].unique()
    for owner in ("tid", "tgid"):
        only = (
            named.filter(pl.col(owner).is_not_null())
            .group_by(owner)
            .agg(pl.col("td_id").n_unique().alias("n"), pl.col("td_id").first().alias("only"))
            .filter(pl.col("n") == 1)
            .select(owner, "only")
        )
        done = (
            done.join(only, on=owner, how="left", maintain_order="left")
            .with_columns(pl.coalesce("td_id", "only").alias("td_id"))
            .drop("only")
        )
    if len(everywhere) == 1:
        done = done.with_columns(pl.col("td_id").fill_null(everywhere[0]))
    return done
