"""Where a policy stops in the recorded requests, and where the recording no longer tells.

A recording tells what a policy would have met as long as the policy does what the recorded
kernel did.  Four things end that:

- a kick: it takes the vCPUs out of the guest, so what a call after it meets is not known from
  a call without it, nor the other way round;
- the pace: a loop inside the wrapper calls again at once, one through the fault handler later, so
  that the same wait takes it more calls;
- the death of the VM: it makes no further requests;
- giving up: the lock's host-priority bit stays set and keeps guests out until a host call takes
  the lock (TDX module, ``tdx_locks.h``, ``release_sharex_lock_hp``: only a successful host call
  clears it), and the page stays as it was.  What the VM's other requests meet until then may
  differ.
"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.recommend.policy_definitions import MAINLINE, LeafPolicy
from tdxtrace.tdx import word
from tdxtrace.tdx.leaves import numbers_of, parse_leaf

REQUEST: Final = ("source", "first_seq")
_VM: Final = ("source", "vm")
# TDX_OPERAND_BUSY with operand SEPT tree, the v1 series' TDX_ERROR_SEPT_BUSY.
_SEPT_BUSY: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_SEPT
# sc_retry() below every wrapper repeats these itself, at most ten calls, before the caller
# sees a status: Linux 6.16 arch/x86/virt/vmx/tdx/tdx.c.
_RETRIED_BELOW: Final = word.TDX_RND_NO_ENTROPY
# Leaves that Linux 6.16 and later call once, and once more after a kick.
_KICKED: Final = {leaf: rule.calls for leaf, rule in MAINLINE.rules.items() if rule.kicks}
_MOST_KICKED_CALLS: Final = 2
VP_ENTER: Final = parse_leaf("TDH.VP.ENTER")[0]
GAVE_UP: Final = ("abandoned", "resolved_elsewhere")


def vm_of() -> pl.Expr:
    """Return the VM of a request: its TD, else its process; null where neither is known."""
    return pl.coalesce("td_id", pl.col("tgid").cast(pl.UInt64))


def perhaps_kicked(chains: pl.DataFrame) -> pl.DataFrame:
    """Return the sources and leaves whose second calls the recorded kernel may have kicked for.

    A kernel that kicks makes two calls at most: a request with three shows that it does not.
    Without one nothing in the requests tells which of the two it is.

    Args:
        chains: The ``retry_chains`` table.

    Returns:
        Columns source, leaf.
    """
    most = (
        chains.filter(pl.col("leaf").is_in(numbers_of(list(_KICKED))))
        .group_by("source", "leaf")
        .agg(pl.col("n_attempts").max())
    )
    return most.filter(pl.col("n_attempts") <= _MOST_KICKED_CALLS).select("source", "leaf")


def first_events(
    answers: pl.DataFrame, rule: LeafPolicy, bugs: pl.DataFrame, kicked: pl.DataFrame
) -> pl.DataFrame:
    """Return the first answer of each request after which the recording no longer tells.

    Where the policy kicks, a request that its last call settled without a kick is taken to be
    settled with it: the kick only takes vCPUs away.  A busy answer of that call says nothing.

    Args:
        answers: Busy answers of one leaf with the columns of their requests.
        rule: The policy for that leaf.
        bugs: Columns source, seq: answers at which a doubling limit is fatal.
        kicked: Result of :func:`perhaps_kicked`.

    Returns:
        The rows of these answers, one per request that has one, and the columns event
        (``stop``: the policy makes no further call; ``kick``: a kick lies between what the
        policy does next and what was recorded next) and then (what follows a stop).
    """
    ends = pl.lit(False)
    if rule.calls is not None:
        ends = pl.col("number") >= rule.calls
    if rule.budget_ns is not None:
        ends = ends | (pl.col("waited_ns") > rule.budget_ns)
    if rule.doubling is not None:
        here = bugs.select("source", "seq", bug=pl.lit(True))
        answers = answers.join(here, on=("source", "seq"), how="left")
        ends = ends | pl.col("bug").fill_null(False)
    after_kick = ends if rule.kicks else pl.lit(False)
    stops = ~is_retried(rule.answers) | ends
    goes_on_unkicked = pl.col("may_be_kicked") & (pl.col("n_attempts") > 1)
    event = (
        pl.when(after_kick)
        .then(pl.lit("kick"))
        .when(stops)
        .then(pl.lit("stop"))
        .when(goes_on_unkicked & (not rule.kicks))
        .then(pl.lit("kick"))
    )
    then = (
        pl.when(is_retried(rule.answers)).then(pl.lit(rule.then)).otherwise(pl.lit(rule.otherwise))
    )
    marked = kicked.select("source", "leaf", may_be_kicked=pl.lit(True))
    return (
        answers.join(marked, on=("source", "leaf"), how="left")
        .with_columns(pl.col("may_be_kicked").fill_null(False))
        .with_columns(event=event)
        .filter(pl.col("event").is_not_null())
        .with_columns(then=pl.when(pl.col("event") == "stop").then(then))
        .sort(*REQUEST, "number")
        .unique(REQUEST, keep="first", maintain_order=True)
        .drop("bug", "may_be_kicked", strict=False)
    )


def n_outpaced(answers: pl.DataFrame, events: pl.DataFrame, rule: LeafPolicy) -> int:
    """Return the number of requests that would need more calls than allowed if made at once.

    They were busy for at least as long as the policy's calls take back to back, though the
    recorded kernel made fewer.  TDH.VP.ENTER is left out: every kernel enters again by way of
    vcpu_run.

    Args:
        answers: Busy answers of one leaf with the columns of their requests.
        events: Result of :func:`first_events` for them.
        rule: The policy for that leaf.
    """
    calls = rule.calls if rule.doubling is None else rule.doubling.bug
    busy = answers.filter(word.is_busy(pl.col("status")), pl.col("leaf") != VP_ENTER)
    each_ns = _busy_call_ns(busy)
    if calls is None or each_ns is None:
        return 0
    held = busy.group_by(REQUEST).agg(pl.col("waited_ns").max())
    long = held.filter(pl.col("waited_ns") // each_ns >= calls)
    return long.join(events, on=REQUEST, how="anti").height


def _busy_call_ns(busy: pl.DataFrame) -> int | None:
    """Typical time of one busy call: of the first ones of requests, whose start is recorded."""
    first = busy.filter(pl.col("number") == 1, pl.col("waited_ns") > 0)["waited_ns"]
    return None if first.is_empty() else int(first.median() or 0) or None  # type: ignore[arg-type]


def is_retried(answers: str) -> pl.Expr:
    """Return whether a policy that retries these ``answers`` retries after a status."""
    status = pl.col("status")
    below = word.status_code(status) == pl.lit(_RETRIED_BELOW, dtype=pl.UInt64)
    return {
        "any": pl.lit(True),
        "busy": word.is_busy(status) | below,
        "sept": (status == pl.lit(_SEPT_BUSY, dtype=pl.UInt64)) | below,
    }[answers]


def deaths(stops: pl.DataFrame) -> pl.DataFrame:
    """Return the time at which the policy kills each VM.

    Args:
        stops: Events of all leaves of one policy (:func:`first_events`).

    Returns:
        Columns source, vm (null: all requests of unknown VMs), dead_ns.
    """
    fatal = stops.filter(pl.col("event") == "stop", pl.col("then") == "kill")
    return fatal.group_by(_VM).agg(dead_ns=pl.col("at_ns").min())


def outlived(rows: pl.DataFrame, dead: pl.DataFrame, time: str) -> pl.Series:
    """Return whether each row lies after the death of its VM.

    Args:
        rows: Rows with source, vm and ``time``.
        dead: Result of :func:`deaths`.
        time: Column with the time of the row.
    """
    if dead.is_empty():
        return pl.repeat(False, rows.height, eager=True)
    joined = rows.join(dead, on=_VM, how="left", nulls_equal=True, maintain_order="left")
    return joined.select((pl.col(time) > pl.col("dead_ns")).fill_null(False)).to_series()


_PURPOSE: Final = ("source", "leaf", "vm_key", "what")


def followers(chains: pl.DataFrame) -> pl.DataFrame:
    """Return the start of each request by what it is for: leaf and page, else leaf and vCPU.

    Args:
        chains: The ``retry_chains`` table.

    Returns:
        Columns source, leaf, vm_key, what, next_ns; ordered by next_ns.
    """
    return chains.select("source", "leaf", *_purpose(), next_ns="start_ns").sort("next_ns")


def _purpose() -> list[pl.Expr]:
    """VM and page or vCPU of a request; what was not recorded is one value of its own."""
    what = pl.coalesce("gpa", pl.col("vp_id").cast(pl.UInt64))
    return [vm_of().fill_null(0).alias("vm_key"), what.fill_null(0).alias("what")]


def is_dependent(stops: pl.DataFrame, later: pl.DataFrame) -> pl.Series:
    """Return whether each stop lies where an earlier one may have changed what its VM meets.

    What a stop changes lasts until the host makes the same call for the same page or vCPU
    again: with the operation given up, its later steps are not made, and may not clear the
    lock's priority.  Where the fault handler itself comes again, it lasts until its request
    was settled.  A stop at which the recorded kernel gave up too changes nothing that was not
    recorded.

    Args:
        stops: Stops of all leaves of one policy, without those after the death of their VM.
        later: Result of :func:`followers`.

    Returns:
        One boolean for each stop, in order.
    """
    same = pl.col("gave_up") & (pl.col("number") == pl.col("n_seen"))
    ends = (
        pl.when(same)
        .then("at_ns")
        .when(pl.col("then") == "again")
        .then("end_ns")
        .otherwise(pl.col("next_ns").fill_null(pl.Int64.max()))
    )
    return (
        stops.with_row_index("place")
        .with_columns(_purpose())
        .sort("end_ns")
        .join_asof(
            later,
            left_on="end_ns",
            right_on="next_ns",
            by=_PURPOSE,
            strategy="forward",
            check_sortedness=False,
        )
        .sort("at_ns", "place")
        .with_columns(lasts=ends.cum_max().shift().over("source", "vm_key"))
        .sort("place")
        .select((pl.col("start_ns") < pl.col("lasts")).fill_null(False))
        .to_series()
    )
