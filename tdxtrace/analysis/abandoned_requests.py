"""Abandoned requests: what callers left busy, and what came of it later."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.related_messages import related_messages
from tdxtrace.analysis.td_of import with_td
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.trace import Trace
from tdxtrace.tables.verdicts import ABANDONED_REQUESTS, CONSEQUENCES
from tdxtrace.tdx import leaves, word

# A failed host acquire of an entry leaves the host's priority behind, which shuts guests out until
# a host takes that lock: TDX module 1.5 src/common/helpers/tdx_locks.h, sept_lock_acquire_host.
# Only memory leaves whose answer was BUSY, operand RCX, met an entry.
_ON_ENTRY: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_RCX
# What a range that was not blocked, or not tracked, answers: 1.5 helpers.h is_tlb_tracked;
# public reports: canonical/tdx issue 213, Chen Yu on the kvm list, 2024-05-26.
_GPA_RANGE_NOT_BLOCKED: Final = 0xC000_0B06_0000_0000
_UNPREPARED: Final = (word.TDX_TLB_TRACKING_NOT_DONE, _GPA_RANGE_NOT_BLOCKED)
_VP_ENTER: Final = leaves.parse_leaf("TDH.VP.ENTER")[0]
_PREPARES: Final = leaves.numbers_of(["TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK"])
# KVM prints a failure right after the call, from the same thread; a console takes up to some
# 50 us a line (canonical/tdx issue 153: 35 to 49 us apart), a preemption longer.
MESSAGE_NS: Final = 10_000_000
# printk prints microseconds (Linux kernel/printk/printk.c, print_time).
_STAMP_NS: Final = 1_000
_KEY: Final = ("source", "first_seq")
_COLUMNS: Final = (
    *_KEY,
    "consequence",
    "effect_source",
    "effect_seq",
    "effect_leaf",
    "effect_status",
    "effect_ns",
)


def abandoned_requests(
    trace: Trace, chains: pl.DataFrame, *, message_ns: int = MESSAGE_NS
) -> pl.DataFrame:
    """Say of each request that was left busy what came of it.

    ``host_priority_timeout``: the request met an entry, and before anyone settled it a
    vCPU of that TD left with HOST_PRIORITY_BUSY_TIMEOUT.  ``later_call_failed``: a
    BLOCK or TRACK was left busy, and the next call that needs it failed on that page for lack of
    it.  ``kernel_message``: the kernel printed a failure of that leaf with that
    status within ``message_ns``.  ``settled_later``: another call settled it.

    Args:
        trace: The events.
        chains: The ``retry_chains`` table of it.
        message_ns: Longest time from a call to the message about it.

    Returns:
        The ``abandoned_requests`` table: one row per consequence, ``none_seen`` where there is
        none, by source and first_seq.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    left = RETRY_CHAINS.conform(chains).filter(
        pl.col("outcome").is_in(["abandoned", "resolved_elsewhere"]),
        pl.col("final_status").is_not_null(),
    )
    if left.is_empty():
        return ABANDONED_REQUESTS.empty()
    calls = SEAMCALLS.conform(trace.seamcalls)
    effects = [
        _settled(left, calls),
        _timeouts(left, calls, chains),
        _unprepared(left, calls),
        _messages(left, related_messages(trace), message_ns),
    ]
    seen = pl.concat(effect.select(_COLUMNS) for effect in effects)
    every = left.select(
        *("source", "first_seq", "leaf", "tid", "tgid", "td_id", "gpa", "level"),
        "final_status",
        left_ns="end_ns",
    ).join(seen, on=_KEY, how="left")
    found = every.with_columns(
        consequence=pl.col("consequence").fill_null("none_seen").cast(pl.Enum(CONSEQUENCES)),
        after_ns=(pl.col("effect_ns") - pl.col("left_ns")).clip(0),
    )
    return ABANDONED_REQUESTS.conform(found.sort(*_KEY, "consequence"))


def _effect(rows: pl.DataFrame, consequence: str) -> pl.DataFrame:
    return rows.with_columns(
        consequence=pl.lit(consequence), effect_source=pl.col("effect_source").cast(pl.UInt16)
    )


def _settling(calls: pl.DataFrame, left: pl.DataFrame) -> pl.DataFrame:
    """The few calls that settled any of these requests."""
    wanted = left.select("source", seq="settled_seq").drop_nulls()
    return calls.join(wanted, on=["source", "seq"], how="semi")


def _settled(left: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Requests that another call settled: the chain says which."""
    by = _settling(calls, left).select(
        "source",
        effect_leaf="leaf",
        effect_status="status",
        effect_ns=pl.coalesce("end_ns", "start_ns"),
        settled_seq="seq",
    )
    rows = left.filter(pl.col("settled_seq").is_not_null()).join(by, on=["source", "settled_seq"])
    rows = rows.with_columns(effect_source="source", effect_seq="settled_seq")
    return _effect(rows, "settled_later")


def _timeouts(left: pl.DataFrame, calls: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Entries left busy, and the exits by host priority's timeout of the same TD."""
    status = pl.col("status") & pl.lit(word.CODE_BITS, pl.UInt64)
    code = word.TDX_HOST_PRIORITY_BUSY_TIMEOUT & word.CODE_BITS
    exits = calls.filter(pl.col("leaf") == _VP_ENTER, status == code)
    of_entry = left.filter(
        pl.col("final_status") == _ON_ENTRY,
        pl.col("leaf").is_in(_memory_leaves()),
        pl.col("td_id").is_not_null(),
    )
    if exits.is_empty() or of_entry.is_empty():
        return _none()
    tds = _exits(exits, chains).drop_nulls("td_id")
    settled = _settling(calls, of_entry)
    settled = settled.select("source", settled_seq="seq", settled_ns="end_ns")
    waiting = of_entry.join(settled, on=["source", "settled_seq"], how="left")
    rows = (
        waiting.sort("end_ns")
        .join_asof(
            tds.sort("effect_ns"),
            left_on="end_ns",
            right_on="effect_ns",
            by=["source", "td_id"],
            strategy="forward",
            coalesce=False,
            check_sortedness=False,
        )
        .filter(
            pl.col("effect_ns").is_not_null(),
            (pl.col("effect_ns") <= pl.col("settled_ns")).fill_null(True),
        )
    )
    return _effect(rows, "host_priority_timeout")


def _exits(exits: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    return with_td(exits, chains).select(
        "source",
        "td_id",
        effect_source="source",
        effect_seq="seq",
        effect_leaf="leaf",
        effect_status="status",
        effect_ns="end_ns",
    )


def _memory_leaves() -> list[int]:
    table = leaves.leaf_table()
    return table.filter(pl.col("request") == "gpa")["leaf"].to_list()


def _unprepared(left: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """BLOCKs left busy, and the calls on the same page that failed for lack of them."""
    status = pl.col("status") & pl.lit(word.CODE_BITS, pl.UInt64)
    failed = calls.filter(status.is_in(_UNPREPARED)).select(
        "source",
        "td_id",
        "gpa",
        effect_source="source",
        effect_seq="seq",
        effect_leaf="leaf",
        effect_status="status",
        effect_ns=pl.coalesce("end_ns", "start_ns"),
    )
    dropped = left.filter(pl.col("leaf").is_in(_PREPARES), pl.col("td_id").is_not_null())
    if failed.is_empty() or dropped.is_empty():
        return _none()
    found = []
    for keys in (["source", "td_id", "gpa"], ["source", "td_id"]):
        by_page = "gpa" in keys
        mine = dropped.filter(pl.col("gpa").is_not_null() == by_page)
        found.append(
            mine.sort("end_ns")
            .join_asof(
                failed.drop_nulls(keys)
                .select(*keys, *(c for c in failed.columns if c.startswith("effect_")))
                .sort("effect_ns"),
                left_on="end_ns",
                right_on="effect_ns",
                by=keys,
                strategy="forward",
                coalesce=False,
                check_sortedness=False,
            )
            .filter(pl.col("effect_ns").is_not_null())
        )
    rows = pl.concat(found, how="diagonal")
    # A request that somebody settled first did not make the later call fail.
    settled = _settling(calls, dropped)
    settled = settled.select("source", settled_seq="seq", settled_ns="end_ns")
    rows = rows.join(settled, on=["source", "settled_seq"], how="left")
    rows = rows.filter((pl.col("effect_ns") <= pl.col("settled_ns")).fill_null(True))
    return _effect(rows, "later_call_failed")


def _messages(left: pl.DataFrame, said: pl.DataFrame, message_ns: int) -> pl.DataFrame:
    """Failures that the kernel printed about the request's last status."""
    keys = ["source", "leaf", "final_status"]
    failures = said.filter(pl.col("message") == "seamcall_failed").select(
        "source", "leaf", "ts_ns", "log_source", "seq", final_status="status"
    )
    # A stamp of microseconds may lie before the end it follows.
    began = left.with_columns(from_ns=pl.col("end_ns") - _STAMP_NS).sort("from_ns")
    rows = began.join_asof(
        failures.drop_nulls(keys).sort("ts_ns"),
        left_on="from_ns",
        right_on="ts_ns",
        by=keys,
        strategy="forward",
        coalesce=False,
        check_sortedness=False,
    )
    rows = rows.filter(pl.col("ts_ns") - pl.col("end_ns") <= message_ns)
    rows = rows.with_columns(
        effect_source="log_source",
        effect_seq="seq",
        effect_leaf="leaf",
        effect_status="final_status",
        effect_ns="ts_ns",
    )
    return _effect(rows, "kernel_message")


def _none() -> pl.DataFrame:
    types = {
        "source": pl.UInt16,
        "first_seq": pl.UInt64,
        "consequence": pl.String,
        "effect_source": pl.UInt16,
        "effect_seq": pl.UInt64,
        "effect_leaf": pl.UInt16,
        "effect_status": pl.UInt64,
        "effect_ns": pl.Int64,
    }
    return pl.DataFrame(schema=types)
