"""Handling of each private fault before its vCPU was entered again."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.threads import VP_ENTER, infer_td
from tdxtrace.tdx import leaves

# A fault on a shared page keeps the shared bit: Linux 6.16 tdx_handle_ept_violation traces it
# before the bit is taken out; bit 47 or 51 by GPAW (TDX module 1.5 base spec, GPA width).
_SHARED_BITS: Final = (1 << 47) | (1 << 51)
_EFAULT: Final = 14
# KVM_EXIT_MEMORY_FAULT: Linux include/uapi/linux/kvm.h.  It leaves the kernel as -EFAULT.
_MEMORY_FAULT: Final = 39
_EPT_VIOLATION: Final = 48
_AUG, _SEPT_ADD, _BLOCK, _UNBLOCK, _REMOVE = leaves.numbers_of(
    f"TDH.MEM.{name}"
    for name in ("PAGE.AUG", "SEPT.ADD", "RANGE.BLOCK", "RANGE.UNBLOCK", "PAGE.REMOVE")
)
# Leaves that a BLOCK prepares: intel/tdx-module 1.5 tdh_mem_page_remove.c and the like, each of
# which requires the range to be blocked and tracked.
_REMOVALS: Final = [
    _REMOVE,
    *leaves.numbers_of(
        f"TDH.MEM.{name}"
        for name in ("PAGE.DEMOTE", "PAGE.PROMOTE", "PAGE.RELOCATE", "SEPT.REMOVE")
    ),
]
_STATE_CHANGES: Final = [_AUG, _BLOCK, _UNBLOCK, *_REMOVALS]
_VCPU: Final = ("source", "tid")
_PAGE: Final = ("source", "td_id", "page")
# 2 MB: one invalidation of the mirror table freezes a range, not a page.
_RANGE_BITS: Final = 21

EXPLANATIONS: Final = (
    "memory_fault",
    "served",
    "left_loop",
    "churned",
    "invalidated",
    "pending",
    "raced",
    "unexplained",
)


def number_faults(calls: pl.DataFrame, faults: pl.DataFrame) -> pl.DataFrame:
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
        pl.col("leaf") == VP_ENTER, pl.col("status") == _EPT_VIOLATION, pl.col("tid").is_not_null()
    ).join(seen.select(_VCPU).unique(), on=_VCPU, how="anti")
    columns = ("source", "tid", "tgid", "seq", "ts_ns", "gpa")
    probed = exits.with_columns(ts_ns=pl.col("end_ns")).select(columns)
    every = pl.concat([seen.select(columns), probed]).sort(*_VCPU, "ts_ns", "seq")
    return every.with_columns(
        nth=pl.int_range(pl.len()).over(_VCPU), next_ns=pl.col("ts_ns").shift(-1).over(_VCPU)
    )


def explain_faults(
    wanted: pl.DataFrame, calls: pl.DataFrame, entries: pl.DataFrame, events: pl.DataFrame
) -> pl.DataFrame:
    """Explain why each private fault was or was not resolved when the vCPU was entered again.

    Args:
        wanted: Rows of :func:`number_faults`.
        calls: The ``seamcalls`` table.
        entries: The ``vm_entries`` table.
        events: The ``host_events`` table.

    Returns:
        Columns source, tid, nth, ts_ns, gpa, explanation (one of EXPLANATIONS, the first in
        their order that fits) and by_seq (the call or event that shows it).
    """
    named = wanted.with_columns(
        id=pl.int_range(pl.len()), page=_page(12), td_id=pl.lit(None, pl.UInt64)
    )
    rows = _with_entries(infer_td(named, calls), calls, entries)
    rows = _with_installs(rows, calls)
    rows = _with_userspace(rows, events)
    rows = _with_state(rows, calls)
    block_is_probed = calls.filter(pl.col("leaf") == _BLOCK)["source"].unique()
    rows = rows.with_columns(block_is_probed=pl.col("source").is_in(block_is_probed.implode()))
    rows = _with_concurrent_calls(rows, calls)
    return rows.with_columns(_explanation()).select(
        *_VCPU, "nth", "ts_ns", "gpa", "explanation", by_seq=_evidence_seq()
    )


def _matching(found: pl.DataFrame, rows: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
    """Rows of ``found`` with the keys of any of ``rows``."""
    return found.join(rows.select(keys).unique(), on=keys, how="semi", maintain_order="left")


def _page(bits: int) -> pl.Expr:
    return pl.col("gpa") // (1 << bits)


def _with_entries(rows: pl.DataFrame, calls: pl.DataFrame, entries: pl.DataFrame) -> pl.DataFrame:
    """Add the last entry of the vCPU before each fault, and the next one after it (ns)."""
    probed = calls.filter(pl.col("leaf") == VP_ENTER).select(*_VCPU, at="start_ns")
    kvm_only = entries.select(*_VCPU, at="start_ns")
    starts = _matching(pl.concat([probed, kvm_only]).drop_nulls(), rows, list(_VCPU)).sort("at")
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


def _during_fault(rows: pl.DataFrame, actions: pl.DataFrame) -> pl.DataFrame:
    """Assign the actions of a thread (column ``at``) to the fault that it handled then."""
    windows = rows.select(*_VCPU, "id", "ts_ns", "until_ns", "next_ns").sort("ts_ns")
    return (
        _matching(actions, rows, list(_VCPU))
        .sort("at")
        .join_asof(windows, left_on="at", right_on="ts_ns", by=_VCPU, check_sortedness=False)
        .filter(
            pl.col("at") < pl.col("until_ns"),
            # It handled the last fault before it, which need not be among the wanted ones.
            (pl.col("at") < pl.col("next_ns")).fill_null(True),
        )
    )


def _with_installs(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Add the installs that the vCPU's own thread attempted."""
    installs = calls.filter(pl.col("leaf").is_in([_AUG, _SEPT_ADD]), pl.col("tid").is_not_null())
    installs = installs.with_columns(at=pl.coalesce("start_ns", "end_ns"))
    done = pl.col("status") == 0
    summed = (
        _during_fault(rows, installs)
        .group_by("id")
        .agg(
            n_tried=pl.len(),
            served=(done & (pl.col("leaf") == _AUG)).any(),
            install_seq=pl.col("seq").last(),
        )
    )
    return rows.join(summed, on="id", how="left").with_columns(pl.col("served").fill_null(False))


def _with_userspace(rows: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Add the exit to userspace for the fault."""
    left_kernel = (pl.col("errno") == _EFAULT) | (pl.col("reason") == _MEMORY_FAULT)
    exits = events.filter(left_kernel.fill_null(False), pl.col("tid").is_not_null())
    exits = exits.with_columns(at=pl.col("ts_ns")).select(*_VCPU, "at", "seq")
    summed = _during_fault(rows, exits).group_by("id").agg(event_seq=pl.col("seq").first())
    return rows.join(summed, on="id", how="left")


def _with_state(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Add the last change of the page, and the next one."""
    done = calls.filter(pl.col("leaf").is_in(_STATE_CHANGES), pl.col("status") == 0)
    done = done.with_columns(at=pl.coalesce("start_ns", "end_ns"), page=_page(12))
    changes = (
        _matching(done.drop_nulls([*_PAGE, "at"]), rows, list(_PAGE))
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


def _with_concurrent_calls(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Add installs and removals by other threads while the fault was handled."""
    rows = rows.with_columns(until=pl.col("until_ns"), range=_page(_RANGE_BITS)).sort("until")
    for name, wanted, key, bits in (
        ("race", [_AUG], "page", 12),
        ("zap", [_BLOCK, _REMOVE], "range", _RANGE_BITS),
    ):
        keys = ["source", "td_id", key]
        found = calls.filter(pl.col("leaf").is_in(wanted)).with_columns(_page(bits).alias(key))
        others = (
            _matching(found.drop_nulls(["start_ns", "end_ns", "td_id", key, "tid"]), rows, keys)
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
        concurrent = (pl.col(f"{name}_end") >= pl.col("ts_ns")) & (
            pl.col(f"{name}_tid") != pl.col("tid")
        )
        rows = rows.with_columns(concurrent.fill_null(False).alias(name))
    return rows


def _explanation() -> pl.Expr:
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
        .when(blocked & pl.col("next_leaf").is_in(_REMOVALS))
        .then(pl.lit("invalidated"))
        # Without probes on BLOCK a page may have been blocked since.
        .when(settled & pl.col("block_is_probed"))
        .then(pl.lit("pending"))
        .when("race")
        .then(pl.lit("raced"))
        .when("zap")
        .then(pl.lit("invalidated"))
        .otherwise(pl.lit("unexplained"))
        .alias("explanation")
    )


def _evidence_seq() -> pl.Expr:
    explanation = pl.col("explanation")
    return (
        pl.when(explanation == "memory_fault")
        .then("event_seq")
        .when(explanation.is_in(["served", "left_loop"]))
        .then("install_seq")
        .when(explanation == "raced")
        .then("race_seq")
        .when((explanation == "invalidated") & (pl.col("state") != _BLOCK).fill_null(True))
        .then("zap_seq")
        .when(explanation != "unexplained")
        .then("state_seq")
    )
