"""Retry chains: which SEAMCALLs are attempts at the same request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis import settled
from tdxtrace.analysis.gaps import Flags
from tdxtrace.analysis.requests import contradictions, identity, in_request, same_request
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
    parts = [_of_source(calls, losses, source) for source, calls in _by_source(seamcalls)]
    chains = pl.concat([RETRY_CHAINS.empty(), *parts])
    return RETRY_CHAINS.conform(settled.elsewhere(chains))


def _by_source(seamcalls: pl.DataFrame) -> Iterator[tuple[int, pl.DataFrame]]:
    """The calls of each source in turn; those of one alone are not copied."""
    sources = seamcalls["source"].unique().sort()
    for source in sources:
        one = len(sources) == 1
        yield int(source), seamcalls if one else seamcalls.filter(pl.col("source") == source)


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
    after = _following(previous=before, among=every)
    after[faulting] = _following(previous=skipping, among=others)[faulting]
    links = _Links(previous, before, after, _joined(thread, previous))
    parts = [_chains(thread, links, rows) for rows in (others, np.flatnonzero(entering))]
    return pl.concat(parts).sort("first_seq")


@dataclass(slots=True)
class _Links:
    """How calls of a thread follow each other: rows, NONE where there is none."""

    previous: Index
    """The call before that may be of the same request."""
    before: Index
    """The call before, whatever it is."""
    after: Index
    """The call after that ends the request, if it is not one more attempt."""
    joined: Flags
    """Whether the call is another attempt at the request of ``previous``."""


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


def _chains(thread: Threads, links: _Links, rows: Index) -> pl.DataFrame:
    """One row per chain among ``rows``, in which a chain's calls follow each other."""
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
            in_request("gpa"),
            in_request("level"),
            pl.col("begins").alias("start_ns"),
            closing["ends"].alias("end_ns"),
            _took(opening, closing),
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
    """The first value in each chain that was captured."""
    if not column.null_count():
        return column[rows[starts]]
    known = np.where(column.is_not_null().to_numpy()[rows], np.arange(len(rows)), len(rows))
    place = np.minimum.accumulate(known[::-1])[::-1][starts]
    inside = place <= ends
    value = column[rows[np.where(inside, place, 0)]]
    return value.zip_with(pl.Series(inside), pl.Series([None], dtype=column.dtype))


def _outcomes(
    thread: Threads, links: _Links, first: Index, last: Index, doubtful: Flags
) -> tuple[NDArray[np.uint8], pl.Series]:
    """How each chain ended, and what cut it short if anything did."""
    status = thread.frame["status"][last]
    error = status.fill_null(0).to_numpy() & np.uint64(word.ERROR_BIT) != 0
    open_end = thread.retryable[last] | ~thread.returned[last]
    came, goes = links.previous[first], links.after[last]
    base = np.where(came == NONE, thread.lossy_before(first), thread.lossy[came])
    lost_before = thread.lossy[first] > base
    lost_after = (goes != NONE) & (thread.lossy[goes] > thread.lossy[last])
    vanished = ~thread.returned[last] & (goes != NONE)
    by_loss = lost_before | (open_end & lost_after) | vanished | doubtful
    by_loss |= _after_unanswered(thread, links)[first]
    by_start = (came == NONE) & thread.began_midway
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


def _after_unanswered(thread: Threads, links: _Links) -> Flags:
    """Calls after one of the same request whose answer is missing: it may have been busy."""
    unanswered: Flags = (links.previous != NONE) & ~thread.returned[links.previous]
    if unanswered.any():
        unanswered &= thread.leaf == thread.leaf[links.previous]
        unanswered &= same_request(thread, links.previous)
    return unanswered


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
