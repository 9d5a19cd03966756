"""The ``retry_chains`` table: SEAMCALLs that are attempts at the same request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Flags, Index
from tdxtrace.analysis.request_identity import contradictions, identifying, identity, same_request
from tdxtrace.analysis.threads import (
    NONE,
    TD_OWNERS,
    VP_ENTER,
    ThreadCalls,
    infer_td,
    left_lookup,
    order_by_thread,
)
from tdxtrace.tables.events import LOSSES, SEAMCALLS
from tdxtrace.tables.findings import CUTS, OUTCOMES, RETRY_CHAINS
from tdxtrace.tdx import leaves, word

# The fault path may leave its loop with the page still missing and enter the guest,
# which faults again: the same request, after a TDH.VP.ENTER.  Linux 6.16
# arch/x86/kvm/vmx/tdx.c, tdx_handle_ept_violation (RET_PF_RETRY resumes the guest).
FAULT_LEAVES: Final = ("TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD")


def retry_chains(seamcalls: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """Join the attempts at each request into one row.

    A chain is the calls by which one thread makes one request: (td, leaf, gpa,
    level) for memory leaves, (td, leaf) for TRACK and the management leaves, the
    vCPU for VP.ENTER.  Every call but the last was answered with a retryable
    status, and the thread did nothing else in between, except that a fault's
    chain continues after TDH.VP.ENTER.  Neither a pause nor a move to another CPU
    ends a chain.  A request that succeeds at once is a chain of one.

    Where arguments were not captured, calls are joined by those that were, and
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
    parts = [_chains_of_source(calls, losses, source) for source, calls in _by_source(seamcalls)]
    chains = pl.concat([RETRY_CHAINS.empty(), *parts])
    return RETRY_CHAINS.conform(resolve_elsewhere(chains))


def _by_source(seamcalls: pl.DataFrame) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield the calls of each source; those of a single source are not copied."""
    sources = seamcalls["source"].unique().sort()
    for source in sources:
        one = len(sources) == 1
        yield int(source), seamcalls if one else seamcalls.filter(pl.col("source") == source)


def _chains_of_source(calls: pl.DataFrame, losses: pl.DataFrame, source: int) -> pl.DataFrame:
    thread = order_by_thread(calls, losses, source)
    all_rows = np.arange(len(thread.owner))
    before = thread.previous(all_rows)
    entering = thread.leaf == VP_ENTER
    faulting = np.isin(thread.leaf, leaves.numbers_of(FAULT_LEAVES))
    others = np.flatnonzero(~entering)
    previous_non_entry = np.full(len(all_rows), NONE)
    previous_non_entry[others] = thread.previous(others)
    previous = np.where(faulting, previous_non_entry, before)
    after = _next_rows(previous=before, among=all_rows)
    after[faulting] = _next_rows(previous=previous_non_entry, among=others)[faulting]
    links = _Links(previous, before, after, _joined(thread, previous))
    parts = [_chains(thread, links, rows) for rows in (others, np.flatnonzero(entering))]
    return pl.concat(parts).sort("first_seq")


@dataclass(slots=True)
class _Links:
    """Order of calls within a thread, as row numbers; NONE where there is none."""

    previous: Index
    """The call before that may be of the same request."""
    before: Index
    """The call before, of any kind."""
    after: Index
    """The next call, which ends the request unless it is another attempt."""
    joined: Flags
    """Whether the call is another attempt at the request of ``previous``."""


def _next_rows(previous: Index, among: Index) -> Index:
    """The row after each, given the row before each of ``among``; NONE if none."""
    after = np.full(len(previous), NONE)
    has = among[previous[among] != NONE]
    after[previous[has]] = has
    return after


def _joined(thread: ThreadCalls, previous: Index) -> Flags:
    """Whether each call is another attempt at the request of the one before."""
    again: Flags = (previous != NONE) & thread.retryable[previous]
    again &= thread.leaf == thread.leaf[previous]
    again &= thread.lossy == thread.lossy[previous]
    return again & same_request(thread, previous)


def _chains(thread: ThreadCalls, links: _Links, rows: Index) -> pl.DataFrame:
    """One row per chain among ``rows``, in which the calls of a chain follow each other."""
    if not len(rows):
        return RETRY_CHAINS.empty()
    broken = contradictions(thread, rows, links.joined[rows])
    joined = links.joined[rows] & ~broken
    starts = np.flatnonzero(~joined)
    ends = np.append(starts[1:], len(rows)) - 1
    first, last, n = rows[starts], rows[ends], ends - starts + 1
    resumed = np.cumsum(joined & (links.previous[rows] != links.before[rows]))
    again = resumed[ends] - resumed[starts]
    doubtful = broken[starts] | np.append(broken[starts[1:]], [False])
    outcome, cut = _outcomes(thread, links, first, last, doubtful)
    opening = thread.frame[first]
    closing = thread.frame[last]
    return RETRY_CHAINS.conform(
        opening.select(
            "source",
            pl.col("seq").alias("first_seq"),
            closing["seq"].alias("last_seq"),
            "leaf",
            "tid",
            *(
                _first_known(thread.frame[c], rows, starts, ends)
                for c in ("tgid", "td_id", "vp_id")
            ),
            identifying("gpa"),
            identifying("level"),
            pl.col("begins").alias("start_ns"),
            closing["ends"].alias("end_ns"),
            _duration(opening, closing),
            pl.Series("n_attempts", n, dtype=pl.UInt32),
            pl.Series("n_busy", n - 1 + thread.retryable[last], dtype=pl.UInt32),
            pl.Series("n_segments", again + 1, dtype=pl.UInt32),
            pl.Series("outcome", outcome, dtype=pl.UInt8).cat.to(pl.Enum(OUTCOMES)),
            closing["status"].alias("final_status"),
            identity(),
            cut.alias("cut_by"),
            pl.lit(None, pl.UInt64).alias("settled_seq"),
        )
    )


def _first_known(column: pl.Series, rows: Index, starts: Index, ends: Index) -> pl.Series:
    """First captured value in each chain."""
    if not column.null_count():
        return column[rows[starts]]
    known = np.where(column.is_not_null().to_numpy()[rows], np.arange(len(rows)), len(rows))
    place = np.minimum.accumulate(known[::-1])[::-1][starts]
    inside = place <= ends
    value = column[rows[np.where(inside, place, 0)]]
    return value.zip_with(pl.Series(inside), pl.Series([None], dtype=column.dtype))


def _outcomes(
    thread: ThreadCalls, links: _Links, first: Index, last: Index, doubtful: Flags
) -> tuple[NDArray[np.uint8], pl.Series]:
    """Outcome of each chain, and what cut it."""
    status = thread.frame["status"][last]
    error = status.fill_null(0).to_numpy() & np.uint64(word.ERROR_BIT) != 0
    open_end = thread.retryable[last] | ~thread.returned[last]
    previous, following = links.previous[first], links.after[last]
    base = np.where(previous == NONE, thread.lossy_before(first), thread.lossy[previous])
    lost_before = thread.lossy[first] > base
    lost_after = (following != NONE) & (thread.lossy[following] > thread.lossy[last])
    vanished = ~thread.returned[last] & (following != NONE)
    by_loss = lost_before | (open_end & lost_after) | vanished | doubtful
    by_loss |= _after_unanswered(thread, links)[first]
    by_start = (previous == NONE) & thread.started_midway
    by_end = open_end & (following == NONE)
    is_cut = by_loss | by_start | by_end
    outcome = np.select(
        [is_cut, open_end, error],
        [OUTCOMES.index("cut"), OUTCOMES.index("abandoned"), OUTCOMES.index("failed")],
        OUTCOMES.index("succeeded"),
    ).astype(np.uint8)
    cut_by = np.select([by_loss, by_start], [CUTS.index("lost_events"), 0], CUTS.index("trace_end"))
    named = pl.Series(cut_by.astype(np.uint8)).cat.to(pl.Enum(CUTS))
    kept = pl.DataFrame({"why": named, "cut": is_cut})
    return outcome, kept.select(pl.when("cut").then("why")).to_series()


def _after_unanswered(thread: ThreadCalls, links: _Links) -> Flags:
    """Calls after one of the same request whose status is missing: it may have been busy."""
    unanswered: Flags = (links.previous != NONE) & ~thread.returned[links.previous]
    if unanswered.any():
        unanswered &= thread.leaf == thread.leaf[links.previous]
        unanswered &= same_request(thread, links.previous)
    return unanswered


def _duration(opening: pl.DataFrame, closing: pl.DataFrame) -> pl.Series:
    """Time in ns from the first attempt to the end of the last; for VP.ENTER to its last start."""
    both = pl.DataFrame(
        {
            "leaf": opening["leaf"],
            "first": opening["start_ns"],
            "entered": closing["start_ns"],
            "last": closing["end_ns"],
        }
    )
    end = pl.when(pl.col("leaf") == VP_ENTER).then("entered").otherwise("last")
    return both.select(took_ns=end - pl.col("first")).to_series()


_REQUEST: Final = ("source", "td_id", "leaf", "gpa", "level")


def resolve_elsewhere(chains: pl.DataFrame) -> pl.DataFrame:
    """Set the outcome of requests that another call settled, and infer their TDs.

    A request that its caller left busy is ``resolved_elsewhere`` if a call outside
    the chain succeeded on the same (td, leaf, gpa, level) after the chain began:
    the page is in the wanted state and the lock's host priority is cleared.  Only
    requests that a page or a TD identifies can be: a vCPU has no second caller.

    Args:
        chains: The ``retry_chains`` table without ``resolved_elsewhere``.

    Returns:
        The same rows in the same order, with outcome, settled_seq and td_id set.
    """
    chains = infer_td(chains, chains, TD_OWNERS[:2])
    given_up = chains.filter(
        pl.col("outcome") == "abandoned",
        pl.col("td_id").is_not_null() | pl.col("gpa").is_not_null(),
    )
    if given_up.is_empty():
        return chains
    # Also a chain whose beginning was lost: its last call succeeded.
    succeeded = (pl.col("outcome") == "succeeded") | (pl.col("final_status") < word.ERROR_BIT)
    done = chains.filter(succeeded).join(
        given_up.select(_REQUEST).unique(), on=_REQUEST, how="semi", nulls_equal=True
    )
    found = _first_success_after(given_up, done)
    by = left_lookup(chains, found, ("source", "first_seq"))
    resolved = pl.lit("resolved_elsewhere", pl.Enum(OUTCOMES))
    return chains.with_columns(
        settled_seq=by, outcome=pl.when(by.is_not_null()).then(resolved).otherwise("outcome")
    )


def _first_success_after(given_up: pl.DataFrame, done: pl.DataFrame) -> pl.DataFrame:
    """For each abandoned chain: the first success on its request after it began."""
    left = given_up.select("first_seq", *_REQUEST, when="start_ns").sort("when")
    right = done.select(*_REQUEST, by_seq="last_seq", when="end_ns").sort("when")
    # join_asof takes no null in its keys.
    left, right = (
        f.with_columns(pl.col("td_id", "gpa", "level").fill_null(0)) for f in (left, right)
    )
    joined = left.join_asof(
        right, on="when", by=list(_REQUEST), strategy="forward", check_sortedness=False
    )
    return joined.filter(pl.col("by_seq").is_not_null()).select("source", "first_seq", "by_seq")


def assign_chain(calls: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Give each call the ``first_seq`` of its retry chain.

    The attempts of a chain are the calls of its thread and leaf from its first to its last:
    a thread makes one request of a leaf at a time.

    Args:
        calls: Rows of the ``seamcalls`` table.
        chains: The ``retry_chains`` table; calls of chains that are not in it are left out.

    Returns:
        The calls with the column ``chain``, ordered by ``seq``.
    """
    begins = chains.select("source", "tid", "leaf", "first_seq", "last_seq", chain="first_seq")
    # join_asof takes no null in its keys.
    begins, own_calls = (
        f.with_columns(thread=pl.col("tid").fill_null(-1)) for f in (begins, calls)
    )
    return (
        own_calls.sort("seq")
        .join_asof(
            begins.drop("tid").sort("first_seq"),
            left_on="seq",
            right_on="first_seq",
            by=["source", "thread", "leaf"],
            check_sortedness=False,
        )
        .filter(pl.col("seq") <= pl.col("last_seq"))
        .drop("thread", "first_seq", "last_seq", strict=False)
    )
