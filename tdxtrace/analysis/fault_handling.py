"""Handling of each private fault before its vCPU was entered again."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.block_rounds import entry_key, level_by_address, state_changes
from tdxtrace.analysis.threads import VP_ENTER, infer_td
from tdxtrace.analysis.zero_steps import SHARED_BITS, exit_reason_of_entry
from tdxtrace.tdx import leaves
from tdxtrace.tdx.status import is_retryable
from tdxtrace.tdx.word import is_success

_EFAULT: Final = 14
# KVM_EXIT_MEMORY_FAULT: Linux include/uapi/linux/kvm.h.  It leaves the kernel as -EFAULT.
_MEMORY_FAULT: Final = 39
_EPT_VIOLATION: Final = 48
_AUG, _SEPT_ADD, _BLOCK, _REMOVE = leaves.numbers_of(
    f"TDH.MEM.{name}" for name in ("PAGE.AUG", "SEPT.ADD", "RANGE.BLOCK", "PAGE.REMOVE")
)
# Blocks guest writes to a list of pages, which is not in any trace: TDX module 1.5.05
# tdh_export_blockw.c.
_BLOCKW: Final = leaves.parse_leaf("TDH.EXPORT.BLOCKW")[0]
_VCPU: Final = ("source", "tid")
# One invalidation of the mirror table freezes a range of at least 2 MB, not a page.
_RANGE_LEVEL: Final = 1

EXPLANATIONS: Final = (
    "memory_fault",
    "served",
    "churned",
    "undone",
    "left_loop",
    "invalidated",
    "pending",
    "raced",
    "unexplained",
)


def number_faults(calls: pl.DataFrame, faults: pl.DataFrame) -> pl.DataFrame:
    """Number the private faults of every vCPU in time order.

    Args:
        calls: The ``seamcalls`` table; its TDH.VP.ENTER exits are used for vCPUs without rows in
            ``faults``.
        faults: The ``page_faults`` table.

    Returns:
        Columns source, tid, tgid, seq, ts_ns, gpa, nth (from 0), next_ns (time of the vCPU's next
        fault; null if none).
    """
    private = (pl.col("gpa").cast(pl.UInt64) & pl.lit(SHARED_BITS, pl.UInt64)) == 0
    private_faults = faults.filter(private, pl.col("tid").is_not_null())
    is_fault = exit_reason_of_entry() == _EPT_VIOLATION
    exits = calls.filter(pl.col("leaf") == VP_ENTER, is_fault, pl.col("tid").is_not_null()).join(
        private_faults.select(_VCPU).unique(), on=_VCPU, how="anti"
    )
    columns = ("source", "tid", "tgid", "seq", "ts_ns", "gpa")
    probed = exits.with_columns(ts_ns=pl.col("end_ns")).select(columns)
    every = pl.concat([private_faults.select(columns), probed]).sort(*_VCPU, "ts_ns", "seq")
    return every.with_columns(
        nth=pl.int_range(pl.len()).over(_VCPU), next_ns=pl.col("ts_ns").shift(-1).over(_VCPU)
    )


def explain_faults(
    wanted: pl.DataFrame,
    calls: pl.DataFrame,
    entries: pl.DataFrame,
    events: pl.DataFrame,
    rounds: pl.DataFrame,
) -> pl.DataFrame:
    """Explain why each private fault was or was not resolved when the vCPU was entered again.

    A fault belongs to the Secure EPT entries of all levels that map its page: a blocked 2 MB range
    explains the faults inside it.  Each explanation requires a row as evidence, in this order:

    ``memory_fault``: the thread exited to userspace with KVM_EXIT_MEMORY_FAULT.  ``served``: the
    thread installed the page.  ``churned``, ``undone``: the page was blocked, and restored
    (:func:`~.block_rounds.block_rounds`).  ``left_loop``: the thread's last install may be tried
    again.  ``invalidated``: the page was blocked and then removed, or another thread was
    blocking or removing near it.  ``pending``: the page was installed before the entry that
    faulted; not used if no row has TDH.MEM.RANGE.BLOCK (the page may have been blocked since), nor
    after a TDH.EXPORT.BLOCKW, whose pages are not in the trace: a live migration makes writes fault
    on present pages.  ``raced``: another thread was installing the page.  Else ``unexplained``:
    absence from the trace is not evidence.

    Args:
        wanted: Rows of :func:`number_faults`.
        calls: The ``seamcalls`` table.
        entries: The ``vm_entries`` table.
        events: The ``host_events`` table.
        rounds: Outcomes of blocked ranges (:func:`~.block_rounds.block_rounds`).

    Returns:
        Columns source, tid, nth, ts_ns, gpa, explanation (the first of EXPLANATIONS that fits)
        and by_seq (the call or event that is evidence for it).
    """
    named = wanted.with_columns(id=pl.int_range(pl.len()), td_id=pl.lit(None, pl.UInt64))
    rows = _with_entries(infer_td(named, calls), calls, entries)
    rows = _with_installs(rows, calls)
    rows = _with_userspace(rows, events)
    rows = _with_state(rows, calls, rounds)
    block_is_probed = calls.filter(pl.col("leaf") == _BLOCK)["source"].unique()
    rows = rows.with_columns(block_is_probed=pl.col("source").is_in(block_is_probed.implode()))
    rows = _with_concurrent_calls(rows, calls)
    return rows.with_columns(_explanation()).select(
        *_VCPU, "nth", "ts_ns", "gpa", "explanation", by_seq=_evidence_seq()
    )


def _matching(found: pl.DataFrame, rows: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
    """Return the rows of ``found`` whose keys occur in ``rows``."""
    return found.join(rows.select(keys).unique(), on=keys, how="semi", maintain_order="left")


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
    """Assign each action of a thread (time in column ``at``) to the fault handled at that time."""
    windows = rows.select(*_VCPU, "id", "ts_ns", "until_ns", "next_ns").sort("ts_ns")
    return (
        _matching(actions, rows, list(_VCPU))
        .sort("at")
        .join_asof(windows, left_on="at", right_on="ts_ns", by=_VCPU, check_sortedness=False)
        .filter(
            pl.col("at") < pl.col("until_ns"),
            # The action belongs to the last fault before it, which may not be a wanted one.
            (pl.col("at") < pl.col("next_ns")).fill_null(True),
        )
    )


def _with_installs(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Add the installs that the vCPU's own thread attempted."""
    installs = calls.filter(pl.col("leaf").is_in([_AUG, _SEPT_ADD]), pl.col("tid").is_not_null())
    installs = installs.with_columns(
        at=pl.coalesce("start_ns", "end_ns"), left=_may_be_tried_again(pl.col("status"))
    )
    done = pl.col("status") == 0
    summed = (
        _during_fault(rows, installs)
        .group_by("id")
        .agg(
            left=pl.col("left").sort_by("at").last(),
            served=(done & (pl.col("leaf") == _AUG)).any(),
            install_seq=pl.col("seq").last(),
        )
    )
    flags = pl.col("served", "left").fill_null(False)
    return rows.join(summed, on="id", how="left").with_columns(flags)


def _may_be_tried_again(status: pl.Expr) -> pl.Expr:
    """Return whether KVM may have left its loop after a status: success, retryable or null."""
    return (is_success(status) | is_retryable(status)).fill_null(True)


def _with_userspace(rows: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Add the exit to userspace for the fault."""
    left_kernel = (pl.col("errno") == _EFAULT) | (pl.col("reason") == _MEMORY_FAULT)
    exits = events.filter(left_kernel.fill_null(False), pl.col("tid").is_not_null())
    exits = exits.with_columns(at=pl.col("ts_ns")).select(*_VCPU, "at", "seq")
    summed = _during_fault(rows, exits).group_by("id").agg(event_seq=pl.col("seq").first())
    return rows.join(summed, on="id", how="left")


def _latest_by_level(rows: pl.DataFrame, calls: pl.DataFrame, left_on: str) -> pl.DataFrame:
    """Add to each fault the last call that began before a time on an entry that maps its page.

    Args:
        rows: Faults with source, td_id, gpa.
        calls: Calls with source, td_id, level (of the entry, or of the range to compare), gpa, at,
            and the columns to add.
        left_on: Column of ``rows`` with the time.
    """
    keys = ["source", "td_id", "key"]
    calls = calls.drop_nulls(["source", "td_id", "gpa", "at"])
    found = []
    for (level,), part in calls.group_by("level"):
        key = entry_key(int(str(level)))
        fault_keys = (
            rows.lazy().select("id", "source", "td_id", "gpa", left_on).with_columns(key=key)
        )
        changes_of_fault = part.lazy().with_columns(key=key)
        changes_of_fault = changes_of_fault.join(
            fault_keys, on=keys, how="semi", maintain_order="left"
        ).sort("at")
        found.append(
            fault_keys.sort(left_on)
            .join_asof(
                changes_of_fault.with_columns(began="at").drop("gpa", "level"),
                left_on=left_on,
                right_on="at",
                by=keys,
                check_sortedness=False,
            )
            .drop("at", "key", "source", "td_id", "gpa", left_on, strict=False)
        )
    if not found:
        names = {n: t for n, t in calls.schema.items() if n not in rows.columns and n != "at"}
        return rows.with_columns(pl.lit(None, t).alias(n) for n, t in names.items() if n != "level")
    latest = pl.concat(found).sort("began", nulls_last=False).unique("id", keep="last")
    named = rows.lazy().join(latest.drop("began"), on="id", how="left", maintain_order="left")
    return named.collect()


def _with_state(rows: pl.DataFrame, calls: pl.DataFrame, rounds: pl.DataFrame) -> pl.DataFrame:
    """Add the last state change of the page, and the fate of its round if that was a BLOCK."""
    fates = rounds.select("source", state_seq="seq", fate=pl.col("fate").cast(pl.String))
    changes = state_changes(calls).select(
        *("source", "td_id", "level", "gpa", "at"),
        state="leaf",
        state_ns="end",
        state_seq="seq",
    )
    rows = _latest_by_level(rows, changes, "ts_ns")
    rows = rows.join(fates, on=["source", "state_seq"], how="left", maintain_order="left")
    lists = calls.filter(pl.col("leaf") == _BLOCKW)
    first = lists.group_by("source").agg(blockw_ns=pl.coalesce("start_ns", "end_ns").min())
    return rows.join(first, on="source", how="left", maintain_order="left")


def _with_concurrent_calls(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Add installs and removals by other threads while the fault was handled."""
    for name, wanted, lowest in (
        ("race", [_AUG], 0),
        ("zap", [_BLOCK, _REMOVE], _RANGE_LEVEL),
    ):
        level = pl.max_horizontal(level_by_address().fill_null(0), lowest)
        others = (
            calls.filter(pl.col("leaf").is_in(wanted))
            .drop_nulls(["start_ns", "end_ns", "tid"])
            .select(
                *("source", "td_id", "gpa"),
                level=level,
                at="start_ns",
                **{f"{name}_end": "end_ns", f"{name}_tid": "tid", f"{name}_seq": "seq"},
            )
        )
        rows = _latest_by_level(rows, others, "until_ns")
        concurrent = (pl.col(f"{name}_end") >= pl.col("ts_ns")) & (
            pl.col(f"{name}_tid") != pl.col("tid")
        )
        rows = rows.with_columns(concurrent.fill_null(False).alias(name))
    return rows


def _explanation() -> pl.Expr:
    blocked = pl.col("state") == _BLOCK
    installed = (pl.col("state") == _AUG) & (pl.col("state_ns") <= pl.col("entered_ns"))
    write_blocked = (pl.col("blockw_ns") <= pl.col("ts_ns")).fill_null(False)
    return (
        pl.when(pl.col("event_seq").is_not_null())
        .then(pl.lit("memory_fault"))
        .when("served")
        .then(pl.lit("served"))
        .when(blocked & (pl.col("fate") == "churned"))
        .then(pl.lit("churned"))
        .when(blocked & (pl.col("fate") == "undone"))
        .then(pl.lit("undone"))
        .when("left")
        .then(pl.lit("left_loop"))
        .when(blocked & (pl.col("fate") == "removed"))
        .then(pl.lit("invalidated"))
        # Without probes on BLOCK, a page may have been blocked since; a write blocked by an export
        # in progress looks the same.
        .when(installed & pl.col("block_is_probed") & ~write_blocked)
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
