"""Verdicts on abandoned requests, progress loops and kernel messages."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.broken_rules import migration_leaves
from tdxtrace.analysis.verdicts.rules import group_findings, look_up, verdict_rows
from tdxtrace.tables.events import KERNEL_MESSAGES
from tdxtrace.tables.verdicts import ABANDONED_REQUESTS, PROGRESS_LOOPS, VERDICTS
from tdxtrace.tdx import word
from tdxtrace.tdx.leaves import leaf_name
from tdxtrace.tdx.operands import resource_table
from tdxtrace.tdx.status import status_name
from tdxtrace.tdx.word import hexadecimal

_BY_CONSEQUENCE: Final = {
    "host_priority_timeout": (
        "BUG",
        "entry_left_busy",
        "abandoned busy on an entry, which kept the guest out until the timeout of host priority",
    ),
    "later_call_failed": (
        "BUG",
        "dropped_block",
        "abandoned busy; a later call on the page failed for lack of it",
    ),
    "kernel_message": (
        "UNDECIDED",
        "vm_killed",
        "abandoned busy; KVM printed it and killed the VM",
    ),
    "settled_later": (
        "EXPECTED",
        "settled_by_another",
        "abandoned busy and completed by another call",
    ),
    "none_seen": (
        "UNDECIDED",
        "end_not_seen",
        "abandoned busy; the trace does not show the consequence",
    ),
}
_DECIDED_BY: Final = {
    "kernel_message": "the verdict on the busy answer itself; for that " + "probe every tdh_* "
    "wrapper at entry and return",
    "none_seen": "record until the TD ends, with tdx_vcpu_run probed, and give --dmesg",
}
_BY_PROGRESS: Final = {
    "seen": ("EXPECTED", "interruptible_flow", "repeated, and done in the end"),
    "not_seen": ("UNDECIDED", "no_maximum_of_restarts", "repeated without visible progress"),
    "unknown": ("UNDECIDED", "end_not_seen", "repeated; its end was not recorded"),
}
_OFF_CPU: Final = (
    "record sched:sched_switch, and kvm_mmu_page_fault%return (1 is RET_PF_RETRY): a thread off "
    "its CPU and KVM's local loop look alike"
)
_TRACE: Final = (
    "a trace of that moment: entry and return of every tdh_* wrapper, and tdx_vcpu_run, by the "
    "clock local"
)


def on_abandoned(abandoned: pl.DataFrame) -> pl.DataFrame:
    """Give verdicts on requests that were abandoned busy, per TD, leaf and consequence.

    BUG requires a recorded consequence: a vCPU that ran into the timeout of host priority, or a
    call that failed because of the abandoned request.  Absence: a call that was not recorded may
    have completed the request, so without a consequence the verdict is UNDECIDED.  Nearest
    innocent trace: another thread completes the request, EXPECTED.

    Args:
        abandoned: The ``abandoned_requests`` table.
    """
    rows = ABANDONED_REQUESTS.conform(abandoned)
    if rows.is_empty():
        return VERDICTS.empty()
    groups = group_findings(rows, ["consequence"], "first_seq")
    verdict, rule, reason = _verdict_rule_reason("consequence", _BY_CONSEQUENCE)
    return verdict_rows(
        groups,
        "abandoned",
        "abandoned_requests",
        {
            "verdict": verdict,
            "what": pl.col("consequence").cast(pl.String),
            "sentence": _sentence("request", reason),
            "rule": rule,
            "decided_by": look_up("consequence", _DECIDED_BY),
        },
    )


def on_loops(loops: pl.DataFrame) -> pl.DataFrame:
    """Give verdicts on progress loops, per TD, leaf, kind and progress.

    The verdict is never BUG or HOSTILE: an interruptible call has no maximum number of restarts, a
    silent thread may be off its CPU, and the end of a loop may not have been recorded.

    Args:
        loops: The ``progress_loops`` table.
    """
    rows = PROGRESS_LOOPS.conform(loops)
    if rows.is_empty():
        return VERDICTS.empty()
    groups = group_findings(
        rows, ["loop", "progress"], "first_seq", repeats=pl.col("n_repeats").max()
    )
    verdict, rule, reason = _verdict_rule_reason("progress", _BY_PROGRESS)
    local = pl.col("loop") == "local_retry"
    silent = pl.lit("followed by a long silence of the vCPU's thread, without SEAMCALL or entry")
    repeats_text = pl.format("answered {} up to {} times, {}", "loop", "repeats", reason)
    return verdict_rows(
        groups,
        "loop",
        "progress_loops",
        {
            "verdict": pl.when(local).then(pl.lit("UNDECIDED")).otherwise(verdict),
            "what": pl.format("{}, progress {}", "loop", "progress"),
            "sentence": pl.when(local)
            .then(_sentence("fault", silent))
            .otherwise(_sentence("request", repeats_text)),
            "rule": pl.when(local).then(pl.lit("local_loop_or_off_cpu")).otherwise(rule),
            "decided_by": pl.when(local)
            .then(pl.lit(_OFF_CPU))
            .otherwise(pl.lit("record longer; fetch RCX at return, which moves on with progress")),
        },
    )


def on_messages(messages: pl.DataFrame) -> pl.DataFrame:
    """Give verdicts on kernel messages, per leaf and status.

    A message has one status: it proves a fault only if a correct kernel never gets that status.
    BUG requires OPERAND_BUSY with an operand id that can only be the TDR or the TDVPR for that
    leaf, or TLB_TRACKING_NOT_DONE.  Absence of messages proves nothing, since KVM limits their
    rate.  Nearest innocent message: the same code with an operand that another call or the guest
    may hold, such as the SEPT entry: UNDECIDED.

    A warning counts if it contains the status of its call, and no message of the same log reports
    that leaf and status: KVM prints both for one failure.

    Args:
        messages: The ``kernel_messages`` table.
    """
    failures = ("seamcall_failed", "vp_enter_ret", "exceeded_retries", "crashing")
    messages = KERNEL_MESSAGES.conform(messages)
    reported = messages.filter(pl.col("message").is_in(failures))
    has_status = (pl.col("message") == "warning") & pl.col("status").is_not_null()
    warned = messages.filter(has_status).join(reported, on=["source", "leaf", "status"], how="anti")
    rows = pl.concat([reported, warned])
    if rows.is_empty():
        return VERDICTS.empty()
    rows = rows.with_columns(td_id=pl.lit(None, pl.UInt64), code=word.status_code(pl.col("status")))
    groups = group_findings(rows, ["message", "status", "code"], "seq")
    return verdict_rows(groups, "message", "kernel_messages", _message_columns())


def _message_columns() -> dict[str, pl.Expr]:
    status, leaf, message = pl.col("status"), pl.col("leaf"), pl.col("message").cast(pl.String)
    # RAX in a warning may have been overwritten since the call: no verdict of BUG from it.
    is_printed = message != "warning"
    order = (pl.col("code") == word.TDX_TLB_TRACKING_NOT_DONE).fill_null(False) & is_printed
    serialised = _is_of_td_or_vcpu(status, leaf) & is_printed
    name = pl.coalesce(status_name(status).str.strip_prefix("TDX_"), pl.lit("status"))
    low = word.low32(status)
    operand = pl.when(low != 0).then(pl.concat_str(pl.lit(" "), hexadecimal(low)))
    subject = pl.concat_str(name, operand.fill_null(""))
    subject = pl.when(status.is_not_null()).then(subject).otherwise(message)
    reason = (
        pl.when(serialised)
        .then(pl.lit("the TD's or vCPU's own page was busy: KVM did not keep its calls apart"))
        .when(order)
        .then(pl.lit("the host did not block and track the range before it went on"))
        .otherwise(pl.lit("who is to blame does not follow from the message alone"))
    )
    rule = (
        pl.when(serialised)
        .then(pl.lit("tdr_or_tdvpr_busy"))
        .when(order)
        .then(pl.lit("block_track_then_operate"))
        .otherwise(pl.lit("message_alone"))
    )
    return {
        "verdict": pl.when(serialised | order).then(pl.lit("BUG")).otherwise(pl.lit("UNDECIDED")),
        "what": pl.concat_str(message, pl.lit(": "), subject),
        "sentence": pl.format(
            "{}, as the kernel printed {}: {}.",
            pl.coalesce(pl.format("{} failed ({})", leaf_name(leaf), subject), message),
            pl.when(pl.col("n_rows") == 1)
            .then(pl.lit("once"))
            .otherwise(pl.format("{} times", "n_rows")),
            reason,
        ),
        "rule": rule,
        "decided_by": pl.lit(_TRACE),
    }


def _is_of_td_or_vcpu(status: pl.Expr, leaf: pl.Expr) -> pl.Expr:
    """Return whether a status can only mean that the TDR or the TDVPR was busy."""
    table = resource_table()
    certain = table.filter(
        pl.col("resource").is_in(["TDR", "TDVPR"]), pl.col("alternative").is_null()
    )
    keys = certain.select(_operand_key(pl.col("leaf"), pl.col("operand_id"))).to_series()
    named = _operand_key(leaf, word.low32(status)).is_in(keys.implode())
    return (word.is_busy(status) & named & ~leaf.is_in(migration_leaves())).fill_null(False)


def _operand_key(leaf: pl.Expr, operand_id: pl.Expr) -> pl.Expr:
    return leaf.cast(pl.UInt64) * (1 << 32) + operand_id.cast(pl.UInt64)


def _verdict_rule_reason(
    column: str, words: dict[str, tuple[str, str, str]]
) -> tuple[pl.Expr, pl.Expr, pl.Expr]:
    verdict, rule, reason = (
        look_up(column, {key: given[i] for key, given in words.items()}) for i in range(3)
    )
    return verdict, rule, reason


def _sentence(subject: str, reason: pl.Expr) -> pl.Expr:
    n = pl.col("n_rows")
    plural = pl.when(n == 1).then(pl.lit(f" {subject}")).otherwise(pl.lit(f" {subject}s"))
    leaf = pl.coalesce(leaf_name(pl.col("leaf")), pl.lit("a vCPU"))
    return pl.concat_str(
        n.cast(pl.String), plural, pl.lit(" of "), leaf, pl.lit(": "), reason, pl.lit(".")
    )
