"""What became of each private fault before its vCPU was entered again."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.td_of import with_td
from tdxtrace.tdx import leaves

# A fault on a shared page keeps the shared bit: Linux 6.16 tdx_handle_ept_violation traces it
# before the bit is taken out; bit 47 or 51 by GPAW (TDX module 1.5 base spec, GPA width).
_SHARED_BITS: Final = (1 << 47) | (1 << 51)
_EFAULT: Final = 14
# KVM_EXIT_MEMORY_FAULT: Linux include/uapi/linux/kvm.h.  It leaves the kernel as -EFAULT.
_MEMORY_FAULT: Final = 39
_EPT_VIOLATION: Final = 48
_VP_ENTER: Final = leaves.parse_leaf("TDH.VP.ENTER")[0]
_AUG, _SEPT_ADD, _BLOCK, _UNBLOCK, _REMOVE = leaves.numbers_of(
    f"TDH.MEM.{name}"
    for name in ("PAGE.AUG", "SEPT.ADD", "RANGE.BLOCK", "RANGE.UNBLOCK", "PAGE.REMOVE")
)
# What ends a block as it was meant to end: intel/tdx-module 1.5 tdh_mem_page_remove.c and the
# like, each of which wants the range blocked and tracked.
_TAKES_AWAY: Final = [
    _REMOVE,
    *leaves.numbers_of(
        f"TDH.MEM.{name}"
        for name in ("PAGE.DEMOTE", "PAGE.PROMOTE", "PAGE.RELOCATE", "SEPT.REMOVE")
    ),
]
_STATES: Final = [_AUG, _BLOCK, _UNBLOCK, *_TAKES_AWAY]
_VCPU: Final = ("source", "tid")
_PAGE: Final = ("source", "td_id", "page")
# 2 MB: what one invalidation of the mirror table freezes at once is a range, not a page.
_RANGE_BITS: Final = 21

WHYS: Final = (
    "memory_fault",
    "served",
    "left_loop",
    "churned",
    "invalidated",
    "pending",
    "raced",
    "unexplained",
)


def ordered_faults(calls: pl.DataFrame, faults: pl.DataFrame) -> pl.DataFrame:
    """Number the private faults of every vCPU, in the order of its time.

    Args:
        calls: The ``seamcalls`` table.
        faults: The ``page_faults`` table; of vCPUs that it lacks, the exits of TDH.VP.ENTER.

    Returns:
        Columns source, tid, tgid, seq, ts_ns, gpa, nth (from 0), next_ns (when the vCPU faults
        again; null: never).
    """
    private = (pl.col("gpa").cast(pl.UInt64) & pl.lit(_SHARED_BITS, pl.UInt64)) == 0
    seen = faults.filter(private, pl.col("tid").is_not_null())
    exits = calls.filter(
        pl.col("leaf") == _VP_ENTER, pl.col("status") == _EPT_VIOLATION, pl.col("tid").is_not_null()
    ).join(seen.select(_VCPU).unique(), on=_VCPU, how="anti")
    columns = ("source", "tid", "tgid", "seq", "ts_ns", "gpa")
    told = exits.with_columns(ts_ns=pl.col("end_ns")).select(columns)
    every = pl.concat([seen.select(columns), told]).sort(*_VCPU, "ts_ns", "seq")
    return every.with_columns(
        nth=pl.int_range(pl.len()).over(_VCPU), next_ns=pl.col("ts_ns").shift(-1).over(_VCPU)
    )


def handled_faults(
    asked: pl.DataFrame, calls: pl.DataFrame, entries: pl.DataFrame, events: pl.DataFrame
) -> pl.DataFrame:
    """Say of private faults why each was or was not settled when the vCPU was entered again.

    Args:
        asked: Rows of :func:`ordered_faults`.
        calls: The ``seamcalls`` table.
        entries: The ``vm_entries`` table.
        events: The ``host_events`` table.

    Returns:
        Columns source, tid, nth, ts_ns, gpa, why (one of WHYS, the first in their order that
        fits) and by_seq (the call or event that shows it).
    """
    named = asked.with_columns(
        id=pl.int_range(pl.len()), page=_page(12), td_id=pl.lit(None, pl.UInt64)
    )
    rows = _bounded(with_td(named, calls), calls, entries)
    rows = _with_installs(rows, calls)
    rows = _with_userspace(rows, events)
    rows = _with_state(rows, calls)
    watched = calls.filter(pl.col("leaf") == _BLOCK)["source"].unique()
    rows = rows.with_columns(watched=pl.col("source").is_in(watched.implode()))
    rows = _with_others(rows, calls)
    return rows.with_columns(_why()).select(
        *_VCPU, "nth", "ts_ns", "gpa", "why", by_seq=_evidence()
    )


def _near(found: pl.DataFrame, rows: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
    """Of what was found, what has to do with any of the rows."""
    return found.join(rows.select(keys).unique(), on=keys, how="semi", maintain_order="left")


def _page(bits: int) -> pl.Expr:
    return pl.col("gpa") // (1 << bits)


def _bounded(rows: pl.DataFrame, calls: pl.DataFrame, entries: pl.DataFrame) -> pl.DataFrame:
    """When the vCPU had been entered before each fault, and when it was entered again."""
    told = calls.filter(pl.col("leaf") == _VP_ENTER).select(*_VCPU, at="start_ns")
    stock = entries.select(*_VCPU, at="start_ns")
    starts = _near(pl.concat([told, stock]).drop_nulls(), rows, list(_VCPU)).sort("at")
    rows = rows.sort("ts_ns")
    before = rows.join_asof(
        starts.with_columns(entered_ns="at"),
        left_on="ts_ns",
        right_on="at",
        by=_VCPU,
        strategy="backward",
        check_sortedness=False,
    ).drop("at", strict=False)
    after = before.join_asof(
        starts.with_columns(until_ns="at"),
        left_on="ts_ns",
        right_on="at",
        by=_VCPU,
        strategy="forward",
        allow_exact_matches=False,
        check_sortedness=False,
    ).drop("at", strict=False)
    return after.with_columns(pl.col("until_ns").fill_null(pl.lit((1 << 63) - 1, pl.Int64)))


def _within(rows: pl.DataFrame, happened: pl.DataFrame) -> pl.DataFrame:
    """Give what a thread did (column ``at``) the fault that it was serving then."""
    windows = rows.select(*_VCPU, "id", "ts_ns", "until_ns", "next_ns").sort("ts_ns")
    return (
        _near(happened, rows, list(_VCPU))
        .sort("at")
        .join_asof(windows, left_on="at", right_on="ts_ns", by=_VCPU, check_sortedness=False)
        .filter(
            pl.col("at") < pl.col("until_ns"),
            # It served the last fault before it, which need not be one of those asked for.
            (pl.col("at") < pl.col("next_ns")).fill_null(True),
        )
    )


def _with_installs(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """What the vCPU's own thread tried to install."""
    tried = calls.filter(pl.col("leaf").is_in([_AUG, _SEPT_ADD]), pl.col("tid").is_not_null())
    tried = tried.with_columns(at=pl.coalesce("start_ns", "end_ns"))
    done = pl.col("status") == 0
    summed = (
        _within(rows, tried)
        .group_by("id")
        .agg(
            n_tried=pl.len(),
            served=(done & (pl.col("leaf") == _AUG)).any(),
            install_seq=pl.col("seq").last(),
        )
    )
    return rows.join(summed, on="id", how="left").with_columns(pl.col("served").fill_null(False))


def _with_userspace(rows: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Whether the fault went to userspace."""
    out = (pl.col("errno") == _EFAULT) | (pl.col("reason") == _MEMORY_FAULT)
    exits = events.filter(out.fill_null(False), pl.col("tid").is_not_null())
    exits = exits.with_columns(at=pl.col("ts_ns")).select(*_VCPU, "at", "seq")
    summed = _within(rows, exits).group_by("id").agg(event_seq=pl.col("seq").first())
    return rows.join(summed, on="id", how="left")


def _with_state(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """What was last done to the page, and what is done to it next."""
    done = calls.filter(pl.col("leaf").is_in(_STATES), pl.col("status") == 0)
    done = done.with_columns(at=pl.coalesce("start_ns", "end_ns"), page=_page(12))
    changes = (
        _near(done.drop_nulls([*_PAGE, "at"]), rows, list(_PAGE))
        .sort("at")
        .with_columns(next_leaf=pl.col("leaf").shift(-1).over(_PAGE))
        .select(
            *_PAGE,
            "at",
            "next_leaf",
            state="leaf",
            state_ns=pl.coalesce("end_ns", "start_ns"),
            state_seq="seq",
        )
    )
    return (
        rows.sort("ts_ns")
        .join_asof(changes, left_on="ts_ns", right_on="at", by=_PAGE, check_sortedness=False)
        .drop("at", strict=False)
    )


def _with_others(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Calls of other threads in flight while the fault was served: an install, a removal."""
    rows = rows.with_columns(until=pl.col("until_ns"), range=_page(_RANGE_BITS)).sort("until")
    for name, wanted, key, bits in (
        ("race", [_AUG], "page", 12),
        ("zap", [_BLOCK, _REMOVE], "range", _RANGE_BITS),
    ):
        keys = ["source", "td_id", key]
        found = calls.filter(pl.col("leaf").is_in(wanted)).with_columns(_page(bits).alias(key))
        others = (
            _near(found.drop_nulls(["start_ns", "end_ns", "td_id", key, "tid"]), rows, keys)
            .sort("start_ns")
            .select(
                "source",
                "td_id",
                key,
                at="start_ns",
                **{f"{name}_end": "end_ns", f"{name}_tid": "tid", f"{name}_seq": "seq"},
            )
        )
        rows = rows.join_asof(
            others,
            left_on="until",
            right_on="at",
            by=keys,
            check_sortedness=False,
        ).drop("at", strict=False)
        met = (pl.col(f"{name}_end") >= pl.col("ts_ns")) & (pl.col(f"{name}_tid") != pl.col("tid"))
        rows = rows.with_columns(met.fill_null(False).alias(name))
    return rows


def _why() -> pl.Expr:
    blocked = pl.col("state") == _BLOCK
    settled = (pl.col("state") == _AUG) & (pl.col("state_ns") <= pl.col("entered_ns"))
    return (
        pl.when(pl.col("event_seq").is_not_null())
        .then(pl.lit("memory_fault"))
        .when("served")
        .then(pl.lit("served"))
        .when(pl.col("n_tried") > 0)
        .then(pl.lit("left_loop"))
        .when(blocked & (pl.col("next_leaf") == _UNBLOCK))
        .then(pl.lit("churned"))
        .when(blocked & pl.col("next_leaf").is_in(_TAKES_AWAY))
        .then(pl.lit("invalidated"))
        # Where BLOCK is not probed a page may have been blocked since.
        .when(settled & pl.col("watched"))
        .then(pl.lit("pending"))
        .when("race")
        .then(pl.lit("raced"))
        .when("zap")
        .then(pl.lit("invalidated"))
        .otherwise(pl.lit("unexplained"))
        .alias("why")
    )


def _evidence() -> pl.Expr:
    why = pl.col("why")
    return (
        pl.when(why == "memory_fault")
        .then("event_seq")
        .when(why.is_in(["served", "left_loop"]))
        .then("install_seq")
        .when(why == "raced")
        .then("race_seq")
        .when((why == "invalidated") & (pl.col("state") != _BLOCK).fill_null(True))
        .then("zap_seq")
        .when(why != "unexplained")
        .then("state_seq")
    )
