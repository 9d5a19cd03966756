"""Retry chains: which SEAMCALLs are attempts at the same request."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis import settled
from tdxtrace.analysis.gaps import Flags
from tdxtrace.analysis.requests import identity, in_request, same_request
from tdxtrace.analysis.threads import NONE, Index, Threads, ordered
from tdxtrace.tables.events import LOSSES, SEAMCALLS
from tdxtrace.tables.findings import CUTS, OUTCOMES, RETRY_CHAINS
from tdxtrace.tdx import leaves, word

# The fault path leaves its loop with the page still missing and enters the guest
# again, which faults again: the same request, after a TDH.VP.ENTER.  Linux 6.16
# arch/x86/kvm/vmx/tdx.c, tdx_handle_ept_violation (RET_PF_RETRY resumes the guest).
FAULT_LEAVES: Final = ("TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD")
_VP_ENTER: Final = leaves.parse_leaf("TDH.VP.ENTER")[0]


def retry_chains(seamcalls: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """Join the attempts at each request into one row.

    A chain is the calls by which one thread makes one request: (td, leaf, gpa,
    level) for memory leaves, (td, leaf) for TRACK and the management leaves, the
    vCPU for VP.ENTER.  Every call but the last was answered with a retryable
    status, and the thread did nothing else in between, except that a fault's
    chain goes on after TDH.VP.ENTER.  Neither a pause nor a move to another CPU
    ends a chain.  A request that succeeds at once is a chain of one.

    Where arguments were not captured, calls are joined by what there is, and
    ``identity`` says so.  A window of lost events cuts the chains of its CPU that
    could reach into it: such a chain is ``cut``, whatever its last status says.

    Args:
        seamcalls: The ``seamcalls`` table, in any order.
        losses: The ``losses`` table of the same trace.

    Returns:
        The ``retry_chains`` table, ordered by source and ``first_seq``.  Every row
        of ``seamcalls`` belongs to exactly one chain, so ``n_attempts`` sums to its
        height.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        Which statuses are retried: ``tdxtrace.tdx.status.is_retryable``.
    """
    seamcalls, losses = SEAMCALLS.conform(seamcalls), LOSSES.conform(losses)
    parts = [
        _of_source(calls, losses, int(source[0]))
        for source, calls in seamcalls.group_by("source", maintain_order=True)
    ]
    chains = pl.concat([RETRY_CHAINS.empty(), *parts])
    return RETRY_CHAINS.conform(settled.elsewhere(chains).sort("source", "first_seq"))


def _of_source(calls: pl.DataFrame, losses: pl.DataFrame, source: int) -> pl.DataFrame:
    thread = ordered(calls, losses, source)
    every = np.arange(len(thread.owner))
    before = thread.previous(every)
    entering = thread.leaf == _VP_ENTER
    faulting = np.isin(thread.leaf, leaves.numbers_of(FAULT_LEAVES))
    others = np.flatnonzero(~entering)
    skipping = np.full(len(every), NONE)
    skipping[others] = thread.previous(others)
    previous = np.where(faulting, skipping, before)
    joined = _joined(thread, previous)
    after = _following(previous=before, among=every)
    after[faulting] = _following(previous=skipping, among=others)[faulting]
    parts = [
        _chains(thread, joined, rows, previous, before, after)
        for rows in (others, np.flatnonzero(entering))
    ]
    return pl.concat(parts)


def _following(previous: Index, among: Index) -> Index:
    """The row after each, given the row before each of ``among``; NONE if none."""
    after = np.full(len(previous), NONE)
    has = among[previous[among] != NONE]
    after[previous[has]] = has
    return after


def _joined(thread: Threads, previous: Index) -> Flags:
    """Whether each call is another attempt at the request of the one before."""
    again: Flags = (previous != NONE) & thread.retryable[previous]
    again &= thread.leaf == thread.leaf[previous]
    again &= thread.lossy == thread.lossy[previous]
    return again & same_request(thread, previous)


def _chains(
    thread: Threads, joined: Flags, rows: Index, previous: Index, before: Index, after: Index
) -> pl.DataFrame:
    """One row per chain among ``rows``, in which a chain's calls follow each other."""
    starts = np.flatnonzero(~joined[rows])
    first = rows[starts]
    last = rows[np.append(starts[1:], len(rows)) - 1] if len(rows) else first
    n = np.diff(np.append(starts, len(rows)))
    resumed = np.cumsum(joined[rows] & (previous[rows] != before[rows]))
    again = resumed[np.append(starts[1:], len(rows)) - 1] - resumed[starts] if len(rows) else n
    busy_last = thread.retryable[last]
    outcome, cut = _outcomes(thread, first, last, previous, after)
    opening = thread.frame[first]
    closing = thread.frame[last]
    return RETRY_CHAINS.conform(
        opening.select(
            "source",
            pl.col("seq").alias("first_seq"),
            closing["seq"].alias("last_seq"),
            "leaf",
            "tid",
            closing["tgid"],
            "td_id",
            "vp_id",
            in_request("gpa"),
            in_request("level"),
            pl.col("begins").alias("start_ns"),
            closing["ends"].alias("end_ns"),
            _took(opening, closing),
            pl.Series("n_attempts", n, dtype=pl.UInt32),
            pl.Series("n_busy", n - 1 + busy_last, dtype=pl.UInt32),
            pl.Series("n_segments", again + 1, dtype=pl.UInt32),
            pl.Series("outcome", outcome, dtype=pl.UInt8).cat.to(pl.Enum(OUTCOMES)),
            closing["status"].alias("final_status"),
            identity(),
            cut.alias("cut_by"),
            pl.lit(None, pl.UInt64).alias("settled_seq"),
        )
    )


def _outcomes(
    thread: Threads, first: Index, last: Index, previous: Index, after: Index
) -> tuple[NDArray[np.uint8], pl.Series]:
    """How each chain ended, and what cut it short if anything did."""
    status = thread.frame["status"][last]
    error = status.fill_null(0).to_numpy() & np.uint64(word.ERROR_BIT) != 0
    open_end = thread.retryable[last] | ~thread.returned[last]
    came, goes = previous[first], after[last]
    base = np.where(came == NONE, thread.lossy_before(first), thread.lossy[came])
    lost_before = thread.lossy[first] > base
    lost_after = (goes != NONE) & (thread.lossy[goes] > thread.lossy[last])
    vanished = ~thread.returned[last] & (goes != NONE)
    by_loss = lost_before | (open_end & lost_after) | vanished
    by_loss |= _after_unknown(thread, previous)[first]
    by_start = thread.edge[first]
    by_end = open_end & (goes == NONE)
    is_cut = by_loss | by_start | by_end
    outcome = np.select(
        [is_cut, open_end, error],
        [OUTCOMES.index("cut"), OUTCOMES.index("abandoned"), OUTCOMES.index("failed")],
        OUTCOMES.index("succeeded"),
    ).astype(np.uint8)
    why = np.select([by_loss, by_start], [CUTS.index("lost_events"), 0], CUTS.index("trace_end"))
    named = pl.Series(why.astype(np.uint8)).cat.to(pl.Enum(CUTS))
    kept = pl.DataFrame({"why": named, "cut": is_cut})
    return outcome, kept.select(pl.when("cut").then("why")).to_series()


def _after_unknown(thread: Threads, previous: Index) -> Flags:
    """Whether the thread's call before was for the same request and never seen to return.

    It may have been busy: then this call is a later attempt, not the first.
    """
    if thread.returned.all():
        return np.zeros(len(previous), np.bool_)
    unknown: Flags = (previous != NONE) & ~thread.returned[previous]
    unknown &= thread.leaf == thread.leaf[previous]
    return unknown & same_request(thread, previous)


def _took(opening: pl.DataFrame, closing: pl.DataFrame) -> pl.Series:
    """Time from the first attempt to the end of the last, the guest's own time left out."""
    both = pl.DataFrame(
        {
            "leaf": opening["leaf"],
            "first": opening["start_ns"],
            "entered": closing["start_ns"],
            "last": closing["end_ns"],
        }
    )
    end = pl.when(pl.col("leaf") == _VP_ENTER).then("entered").otherwise("last")
    return both.select(took_ns=end - pl.col("first")).to_series()
