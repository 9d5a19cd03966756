"""The ``abandoned_requests`` table: requests that were left busy, and their consequences."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.blocks import dropped_blocks
from tdxtrace.analysis.causes.entry_locks import address_of_entry, may_have_taken_entry
from tdxtrace.analysis.lookup import first_after
from tdxtrace.analysis.threads import VP_ENTER, infer_td, may_miss_events
from tdxtrace.tables.events import KERNEL_MESSAGES, SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.trace import Trace, agreement
from tdxtrace.tables.verdicts import ABANDONED_REQUESTS, CONSEQUENCES
from tdxtrace.tdx import leaves, word

# A failed host acquire of an SEPT entry's lock sets host priority on the entry, which blocks guests
# until the host takes that lock: TDX module 1.5 src/common/helpers/tdx_locks.h,
# sept_lock_acquire_host.  BUSY with operand RCX refers to an entry only for memory leaves.
_BUSY_ON_ENTRY: Final = word.is_busy_on(pl.col("final_status"), word.TDX_OPERAND_ID_RCX)
# HP_LOCK_TIMEOUT is at least 10 ms: intel/tdx-module 1.5.01 td_control_structures.h.  The guest's
# first refused TDCALL starts the timer, so it cannot start before the host's first failed attempt.
HOST_PRIORITY_NS: Final = 10_000_000
_TRACK: Final = leaves.parse_leaf("TDH.MEM.TRACK")[0]
_BLOCK: Final = leaves.parse_leaf("TDH.MEM.RANGE.BLOCK")[0]
# If one of these succeeds, a TD ends or another one begins, possibly at the same address.
_ENDS_OF_TDS: Final = leaves.numbers_of(
    [
        *("TDH.MNG.VPFLUSHDONE", "TDH.MNG.KEY.FREEID"),
        *("TDH.MNG.CREATE", "TDH.MNG.INIT", "TDH.MR.FINALIZE"),
    ]
)
# KVM prints a failure right after the call, from the same thread.  A console takes up to about
# 50 us per line (canonical/tdx issue 153: 35 to 49 us apart); a preemption takes longer.
MESSAGE_NS: Final = 10_000_000
# printk prints microseconds (Linux kernel/printk/printk.c, print_time).
_TIMESTAMP_NS: Final = 1_000
_KEY: Final = ("source", "first_seq")
_SETTLED: Final = ("source", "settled_seq", "settled_ns")
_EFFECT_COLUMNS: Final = (
    *_KEY,
    "consequence",
    "effect_source",
    "effect_seq",
    "effect_leaf",
    "effect_status",
    "effect_ns",
)


def abandoned_requests(
    trace: Trace,
    chains: pl.DataFrame,
    *,
    generation: str | None = None,
    message_ns: int = MESSAGE_NS,
) -> pl.DataFrame:
    """Find the consequences of each request that was left busy.

    Evidence is a row of the trace for each consequence.  A cut request is listed only with
    a timeout of host priority: whatever its thread did later, no call took the entry before that.

    ``host_priority_timeout``: the request was busy on an SEPT entry, and a vCPU of that TD
    exited with HOST_PRIORITY_BUSY_TIMEOUT at least HOST_PRIORITY_NS after the first attempt, and
    before any host call took or may have taken that entry's lock, whatever that call's result;
    not in generation A, which has no host priority.  Absence: a call that was not recorded may
    have taken the lock, so a loss in between rules this consequence out.  Nearest innocent traces:
    a request left busy just before the exit, while another, unrecorded request blocked the guest;
    a request of a TD that ended, whose address another TD has now.

    ``later_call_failed``: a BLOCK was left busy, and a call on its page failed because the BLOCK
    was missing (:func:`~.causes.blocks.dropped_blocks`); or a TRACK was left busy, and the next
    call of the TD that requires a TRACK failed; without a loss in between.  Nearest innocent
    trace: another BLOCK, of the page or of a range around it, succeeded, and only the TRACK is
    missing.

    ``kernel_message``: the kernel printed a failure of that leaf with that status within
    ``message_ns``.

    ``settled_later``: another call settled the request.

    Args:
        trace: The events.
        chains: The ``retry_chains`` table of the trace.
        generation: Lock generation of the module; None if unknown.
        message_ns: Longest time in ns from a call to its kernel message.

    Returns:
        The ``abandoned_requests`` table, ordered by source and first_seq: one row per consequence,
        or one ``none_seen`` row for a request without consequences.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    unfinished = RETRY_CHAINS.conform(chains).filter(
        pl.col("outcome").is_in(["abandoned", "resolved_elsewhere", "cut"]),
        pl.col("final_status").is_not_null(),
    )
    abandoned = unfinished.filter(pl.col("outcome") != "cut")
    if unfinished.is_empty():
        return ABANDONED_REQUESTS.empty()
    calls = SEAMCALLS.conform(trace.seamcalls)
    effects = [
        _settled_later(abandoned, calls),
        _timeouts(unfinished, calls, chains, trace.losses) if generation != "A" else _no_effects(),
        _later_failures(abandoned, calls, trace.losses),
        _kernel_messages(abandoned, related_messages(trace), message_ns),
    ]
    request_effects = pl.concat(effect.select(_EFFECT_COLUMNS) for effect in effects)
    explained_cut = unfinished.filter(pl.col("outcome") == "cut").join(
        request_effects, on=_KEY, how="semi"
    )
    requests = (
        pl.concat([abandoned, explained_cut])
        .select(
            *("source", "first_seq", "leaf", "tid", "tgid", "td_id", "gpa", "level"),
            "final_status",
            left_ns="end_ns",
        )
        .join(request_effects, on=_KEY, how="left")
    )
    found = requests.with_columns(
        consequence=pl.col("consequence").fill_null("none_seen").cast(pl.Enum(CONSEQUENCES)),
        after_ns=(pl.col("effect_ns") - pl.col("left_ns")).clip(0),
    )
    return ABANDONED_REQUESTS.conform(found.sort(*_KEY, "consequence"))


def _effect(rows: pl.DataFrame, consequence: str) -> pl.DataFrame:
    return rows.with_columns(
        consequence=pl.lit(consequence), effect_source=pl.col("effect_source").cast(pl.UInt16)
    )


def _settling_calls(calls: pl.DataFrame, abandoned: pl.DataFrame) -> pl.DataFrame:
    """Return the calls that settled these requests: source, settled_seq, settled_ns and effect."""
    settling_seqs = abandoned.select("source", seq="settled_seq").drop_nulls()
    return calls.join(settling_seqs, on=["source", "seq"], how="semi").select(
        "source",
        effect_leaf="leaf",
        effect_status="status",
        effect_ns=pl.coalesce("end_ns", "start_ns"),
        settled_seq="seq",
        settled_ns="end_ns",
    )


def _settled_later(abandoned: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Return the requests that another call settled, by ``settled_seq`` of their chain."""
    settling = _settling_calls(calls, abandoned)
    rows = abandoned.join(settling, on=["source", "settled_seq"])
    rows = rows.with_columns(effect_source="source", effect_seq="settled_seq")
    return _effect(rows, "settled_later")


def _timeouts(
    abandoned: pl.DataFrame, calls: pl.DataFrame, chains: pl.DataFrame, losses: pl.DataFrame
) -> pl.DataFrame:
    """Return requests left busy on an entry, with a host priority timeout that they can explain."""
    status = pl.col("status") & pl.lit(word.CODE_BITS, pl.UInt64)
    code = word.TDX_HOST_PRIORITY_BUSY_TIMEOUT & word.CODE_BITS
    exits = calls.filter(pl.col("leaf") == VP_ENTER, status == code)
    of_entry = abandoned.filter(
        _BUSY_ON_ENTRY,
        pl.col("leaf").is_in(_memory_leaves()),
        pl.col("td_id").is_not_null(),
    )
    if exits.is_empty() or of_entry.is_empty():
        return _no_effects()
    # Use the first exit that is late enough: an earlier one has another cause.
    from_ns = pl.coalesce("start_ns", "end_ns") + HOST_PRIORITY_NS
    requests = of_entry.with_columns(
        address=address_of_entry(), due_ns=pl.max_horizontal("end_ns", from_ns)
    )
    timeouts = _timeout_exits(exits, chains).drop_nulls("td_id")
    rows = first_after(requests, "due_ns", timeouts, "effect_ns", ["source", "td_id"])
    rows = rows.filter(pl.col("effect_ns").is_not_null())
    rows = _of_one_td(_untouched_entries(rows, calls), calls)
    return _effect(_without_losses(rows, losses), "host_priority_timeout")


def _untouched_entries(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Keep the requests whose entry no host call took, or may have taken, before effect_ns."""
    taking = calls.filter(may_have_taken_entry(), pl.col("gpa").is_not_null()).select(
        "source",
        "td_id",
        address=address_of_entry(),
        taken_ns=pl.coalesce("end_ns", "start_ns"),
        taken_from_ns=pl.coalesce("start_ns", "end_ns"),
    )
    next_taken = first_after(rows, "end_ns", taking, "taken_ns", ["source", "td_id", "address"])
    return next_taken.filter((pl.col("taken_from_ns") > pl.col("effect_ns")).fill_null(True))


def _of_one_td(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Keep the requests without an end or begin of a TD at their address before their effect."""
    ends = calls.filter(
        pl.col("leaf").is_in(_ENDS_OF_TDS), pl.col("status") == 0, pl.col("end_ns").is_not_null()
    ).select("source", "td_id", other_ns="end_ns")
    next_end = first_after(rows, "end_ns", ends, "other_ns", ["source", "td_id"])
    return next_end.filter((pl.col("other_ns") > pl.col("effect_ns")).fill_null(True))


def _without_losses(rows: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """Keep the requests without possibly lost events between their end and their effect."""
    return rows.filter(~may_miss_events(rows, losses, "end_ns", "effect_ns"))


def _next_effects(
    requests: pl.DataFrame, effects: pl.DataFrame, keys: list[str], calls: pl.DataFrame
) -> pl.DataFrame:
    """Join each request with the first effect after it, unless another call settled it earlier."""
    settled = _settling_calls(calls, requests).select(_SETTLED)
    columns = (c for c in effects.columns if c.startswith("effect_"))
    rows = requests.join(settled, on=["source", "settled_seq"], how="left")
    known = effects.drop_nulls(keys).select(*keys, *columns)
    return first_after(rows, "end_ns", known, "effect_ns", keys).filter(
        pl.col("effect_ns").is_not_null(),
        (pl.col("effect_ns") <= pl.col("settled_ns")).fill_null(True),
    )


def _timeout_exits(exits: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    return infer_td(exits, chains).select(
        "source",
        "td_id",
        effect_source="source",
        effect_seq="seq",
        effect_leaf="leaf",
        effect_status="status",
        effect_ns="end_ns",
    )


def _memory_leaves() -> list[int]:
    return leaves.leaf_table().filter(pl.col("request") == "gpa")["leaf"].to_list()


def _later_failures(
    abandoned: pl.DataFrame, calls: pl.DataFrame, losses: pl.DataFrame
) -> pl.DataFrame:
    """Return BLOCKs and TRACKs left busy, with the first call that failed without them."""
    numbered = calls.with_row_index("row").with_columns(
        begins=pl.coalesce("start_ns", "end_ns"), at=pl.coalesce("end_ns", "start_ns")
    )
    status = pl.col("status") & pl.lit(word.CODE_BITS, pl.UInt64)
    not_tracked = numbered.filter(status == word.TDX_TLB_TRACKING_NOT_DONE)
    of_td = abandoned.filter(pl.col("td_id").is_not_null())
    tracks = of_td.filter(pl.col("leaf") == _TRACK)
    blocks = of_td.filter(pl.col("leaf") == _BLOCK, pl.col("gpa").is_not_null())
    dropped = [
        dropped_blocks(numbered.filter(pl.col("source") == source)).select("row")
        for source in blocks["source"].unique()
    ]
    not_blocked = numbered.join(
        pl.concat([numbered.select("row").clear(), *dropped]), on="row", how="semi"
    )
    parts = [
        _next_effects(blocks, _failures(not_blocked), ["source", "td_id", "gpa"], calls),
        _next_effects(tracks, _failures(not_tracked), ["source", "td_id"], calls),
    ]
    rows = _without_losses(pl.concat(parts, how="diagonal"), losses)
    return _effect(rows, "later_call_failed")


def _failures(calls: pl.DataFrame) -> pl.DataFrame:
    return calls.select(
        *("source", "td_id", "gpa"),
        effect_source="source",
        effect_seq="seq",
        effect_leaf="leaf",
        effect_status="status",
        effect_ns="at",
    )


def _kernel_messages(
    abandoned: pl.DataFrame, messages: pl.DataFrame, message_ns: int
) -> pl.DataFrame:
    """Return requests with a kernel message about a failure with the request's last status."""
    keys = ["source", "leaf", "final_status"]
    failures = messages.filter(pl.col("message") == "seamcall_failed").select(
        "source", "leaf", "ts_ns", "log_source", "seq", final_status="status"
    )
    # A timestamp in microseconds may lie before the end of the call it follows.
    began = abandoned.with_columns(from_ns=pl.col("end_ns") - _TIMESTAMP_NS)
    rows = first_after(began, "from_ns", failures.drop_nulls(keys), "ts_ns", keys)
    rows = rows.filter(pl.col("ts_ns") - pl.col("end_ns") <= message_ns)
    rows = rows.with_columns(
        effect_source="log_source",
        effect_seq="seq",
        effect_leaf="leaf",
        effect_status="final_status",
        effect_ns="ts_ns",
    )
    return _effect(rows, "kernel_message")


def _no_effects() -> pl.DataFrame:
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


def related_messages(trace: Trace) -> pl.DataFrame:
    """Return the kernel messages whose clock is comparable with the clock of an event input.

    Messages of logs whose clock differs are left out.

    Args:
        trace: The events and messages.

    Returns:
        ``kernel_messages`` with ``source`` (number of the event input) and ``log_source`` (number
        of the log); one row per message and comparable input.
    """
    messages = KERNEL_MESSAGES.conform(trace.kernel_messages).filter(pl.col("ts_ns").is_not_null())
    sources = trace.provenance.sources
    pairs = [
        (number, log)
        for number, source in enumerate(sources)
        for log, other in enumerate(sources)
        if not source.is_log and other.is_log and agreement(source, other).comparable
    ]
    schema = {"source": pl.UInt16, "log_source": pl.UInt16}
    comparable_pairs = pl.DataFrame(pairs, schema=schema, orient="row")
    return messages.rename({"source": "log_source"}).join(comparable_pairs, on="log_source")
