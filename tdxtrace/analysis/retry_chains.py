"""The ``retry_chains`` table: SEAMCALLs that are attempts at the same request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Flags, Index, Times
from tdxtrace.analysis.loops.linking import (
    NONE,
    doubt_open_ends,
    link_attempts,
    order_by_chain,
)
from tdxtrace.analysis.request_identity import (
    has_second_caller,
    identifying,
    identity,
    named_requests,
    request_keys,
    same_request,
)
from tdxtrace.analysis.threads import (
    TD_OWNERS,
    VP_ENTER,
    ThreadCalls,
    infer_td,
    left_lookup,
    order_by_thread,
)
from tdxtrace.compiler import Runner
from tdxtrace.tables.events import LOSSES, SEAMCALLS
from tdxtrace.tables.findings import CUTS, OUTCOMES, RETRY_CHAINS
from tdxtrace.tdx import leaves, word

# A fault's requests, and those to enter the vCPU that faulted: what one thread may have open at a
# time.  Linux 6.16 arch/x86/kvm/vmx/tdx.c: tdx_handle_ept_violation leaves its loop with the page
# still missing and enters the guest, which faults again, there or elsewhere first.
_FAULT_LEAVES: Final = leaves.numbers_of(("TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"))
_OF_VCPU: Final = (*_FAULT_LEAVES, VP_ENTER)


def retry_chains(seamcalls: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """Join the attempts at each request into one row.

    A chain is the calls by which one thread makes one request: (td, leaf, gpa,
    level) for memory leaves, (td, leaf) for TRACK and the management leaves, the
    vCPU for VP.ENTER.  Every call but the last was answered with a retryable
    status, and no other thread settled the request before the next, unless that one followed
    at once.  Neither a pause, nor a move to another CPU, nor another call of the thread ends
    a chain.  A request that succeeds at once is a chain of one.

    Where arguments were not captured, calls are joined by those that were, and
    ``identity`` says so.  A call that names no request, where others of its leaf do (its entry is
    missing), joins none: it may belong to any that its thread has open, and these are ``cut``.
    A window of lost events cuts the chains that could reach into it: those open in its threads,
    and the first one after it of the thread, and of each leaf of a vCPU.

    A request is ``abandoned`` if its thread began another one later, and was recorded without
    a loss up to its end; ``cut`` by the trace's end if it made none, or only went on with those
    that were open, since it may come back.  An entry is no other request for a fault.

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
    chains = pl.concat([RETRY_CHAINS.empty(), *parts], how="diagonal")
    return RETRY_CHAINS.conform(resolve_elsewhere(chains))


def _by_source(seamcalls: pl.DataFrame) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield the calls of each source; those of a single source are not copied."""
    sources = seamcalls["source"].unique().sort()
    for source in sources:
        one = len(sources) == 1
        yield int(source), seamcalls if one else seamcalls.filter(pl.col("source") == source)


def _chains_of_source(calls: pl.DataFrame, losses: pl.DataFrame, source: int) -> pl.DataFrame:
    thread = order_by_thread(calls, losses, source)
    links = _link(thread)
    links.joined &= thread.lossy == thread.lossy[links.previous]
    links.joined &= ~_settled_between(thread, links)
    order = _ordered(links.joined, links.previous, thread.run)
    return _chains(thread, links, order).sort("first_seq")


@dataclass(slots=True)
class _Links:
    """What each call has to do with others of its thread, by row number."""

    previous: Index
    """The attempt before at the same request that may have had to be repeated; NONE if none."""
    joined: Flags
    """Whether the call is another attempt: the one before was answered with a retryable status."""
    doubtful: Flags
    """Whether an attempt may be missing from its chain, or belong to another."""


@dataclass(slots=True)
class _Ordered:
    """Calls chain by chain."""

    rows: Index
    """Row numbers: those of a chain follow each other, chains are in the order of their first."""
    starts: Index
    """Place of each chain's first call in ``rows``."""
    ends: Index
    """Place of its last call."""


def _link(thread: ThreadCalls, *, of_process: bool = True) -> _Links:
    """Find the attempt before each call, in a trace without losses."""
    n = len(thread.owner)
    key, named = request_keys(thread, of_process=of_process), named_requests(thread)
    is_open = thread.retryable | ~thread.returned
    number = np.zeros(1 << 16, np.int64)
    used = np.unique(thread.leaf)
    number[used] = np.arange(len(used))
    code = number[thread.leaf]
    changes = is_open[:-1] & (key[1:] != key[:-1])
    size = 1 << int(2 * changes.sum() + 1).bit_length()
    slots = np.zeros(size, np.uint64), np.full(size, NONE, np.int64)
    scratch = [np.zeros(len(used), np.int64) for _ in range(3)]
    previous, doubtful = np.full(n, NONE, np.int64), np.zeros(n, np.bool_)
    calls = thread.owner, code, key, is_open, named
    thread.run(link_attempts)(*calls, *slots, *scratch, previous, doubtful)
    if doubtful.any():
        is_last = np.ones(n, np.bool_)
        is_last[previous[previous != NONE]] = False
        told = thread.owner, code, is_open, named, is_last, scratch[0], doubtful
        thread.run(doubt_open_ends)(*told)
    joined = (previous != NONE) & thread.retryable[previous] & same_request(thread, previous)
    joined &= (thread.owner == thread.owner[previous]) & (thread.leaf == thread.leaf[previous])
    return _Links(previous, joined, doubtful)


def _ordered(joined: Flags, previous: Index, run: Runner[Any]) -> _Ordered:
    """Bring the calls of each chain together."""
    n = len(joined)
    chain, begins, rows = np.empty(n, np.int64), np.zeros(n + 1, np.int64), np.empty(n, np.int64)
    n_chains = run(order_by_chain)(np.where(joined, previous, NONE), chain, begins, rows)
    ends = begins[:n_chains] - 1
    return _Ordered(rows, np.append([0], ends[:-1] + 1)[:n_chains], ends)


def _settled_between(thread: ThreadCalls, links: _Links) -> Flags:
    """Whether another thread settled a request that its own took up again after something else.

    Such a call is a new request: the page was there, and is wanted again.  A call right after the
    one before it is the caller's loop, which had not looked.
    """
    found = np.zeros(len(links.joined), np.bool_)
    apart = np.flatnonzero(links.joined & (links.previous != np.arange(len(found)) - 1))
    if not len(apart):
        return found
    request = thread.frame.select("td_id", "leaf", "gpa", "level", "begins", "ends", "status")
    again = request[apart].with_columns(
        since=request["begins"][links.previous[apart]], row=pl.Series(apart)
    )
    again = again.filter(has_second_caller())
    on = ["td_id", "leaf", "gpa", "level"]
    done = request.filter(pl.col("status") < word.ERROR_BIT)
    done = done.join(again.select(on).unique(), on=on, how="semi", nulls_equal=True)
    times = again.select(*on, "row", "since", when="begins").sort("when")
    met = (
        _without_null_keys(times)
        .join_asof(
            _without_null_keys(done.select(*on, when="ends", settled="ends").sort("when")),
            on="when",
            by=on,
            check_sortedness=False,
            # Where entries were not recorded a call ends when it begins: it settles not itself.
            allow_exact_matches=False,
        )
        .filter(pl.col("settled") > pl.col("since"))
    )
    found[met["row"].to_numpy()] = True
    return found


def _chains(thread: ThreadCalls, links: _Links, order: _Ordered) -> pl.DataFrame:
    """One row per chain."""
    rows, starts, ends = order.rows, order.starts, order.ends
    first, last, n = rows[starts], rows[ends], ends - starts + 1
    outcome, cut, whole_until = _outcomes(thread, links, order)
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
            pl.Series("n_segments", _segments(thread, links, order), dtype=pl.UInt32),
            pl.Series("outcome", outcome, dtype=pl.UInt8).cat.to(pl.Enum(OUTCOMES)),
            closing["status"].alias("final_status"),
            identity(),
            cut.alias("cut_by"),
            pl.lit(None, pl.UInt64).alias("settled_seq"),
        )
    ).with_columns(whole_until.alias("whole_until"))


def _segments(thread: ThreadCalls, links: _Links, order: _Ordered) -> Index:
    """Parts of each chain between which its thread entered a vCPU."""
    n_entries = np.cumsum(thread.leaf == VP_ENTER)
    again = links.joined & (thread.leaf != VP_ENTER)
    again &= n_entries != n_entries[links.previous]
    resumed: Index = np.cumsum(again[order.rows])
    return resumed[order.ends] - resumed[order.starts] + 1


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
    thread: ThreadCalls, links: _Links, order: _Ordered
) -> tuple[NDArray[np.uint8], pl.Series, pl.Series]:
    """Outcome of each chain, what cut it, and until when its thread was recorded without a loss."""
    first, last = order.rows[order.starts], order.rows[order.ends]
    status = thread.frame["status"][last]
    error = status.fill_null(0).to_numpy() & np.uint64(word.ERROR_BIT) != 0
    open_end = thread.retryable[last] | ~thread.returned[last]
    before = _before(thread)[first]
    base = np.where(before == NONE, thread.lossy_before(first), thread.lossy[before])
    vanished = ~thread.returned[last] & _goes_on(thread, last, np.arange(len(thread.owner)))
    by_loss = (thread.lossy[first] > base) | vanished | _after_unanswered(thread, links)[first]
    by_start = (before == NONE) & thread.started_midway
    if links.doubtful.any():
        doubtful = np.logical_or.reduceat(links.doubtful[order.rows], order.starts)
        if thread.started_midway and not thread.lossy.any():
            # Nothing was lost since: what does not name its request began before the trace.
            by_start |= doubtful
        else:
            by_loss |= doubtful & ~by_start
    by_end = open_end & ~_goes_on(thread, last, first)
    is_cut = by_loss | by_start | by_end
    outcome = np.select(
        [is_cut, open_end, error],
        [OUTCOMES.index("cut"), OUTCOMES.index("abandoned"), OUTCOMES.index("failed")],
        OUTCOMES.index("succeeded"),
    ).astype(np.uint8)
    until, is_lost = _recorded_until(thread, last)
    # Whether another thread settled it before the loss is not known yet.
    by_later_loss = is_lost & open_end & ~by_loss & ~by_start
    outcome[by_later_loss] = OUTCOMES.index("abandoned")
    cut_by = np.select([by_loss, by_start], [CUTS.index("lost_events"), 0], CUTS.index("trace_end"))
    named = pl.Series(cut_by.astype(np.uint8)).cat.to(pl.Enum(CUTS))
    kept = pl.DataFrame(
        {"why": named, "cut": is_cut & ~by_later_loss, "until": until, "lost": by_later_loss}
    )
    told = kept.select(pl.when("cut").then("why"), until=pl.when("lost").then("until"))
    return outcome, told["why"], told["until"]


def _before(thread: ThreadCalls) -> Index:
    """The call after which a request is known to begin, if nothing was lost since; NONE if none.

    It is the one before in the thread.  What a vCPU has open lives through its other calls: for
    these leaves it is the one before of the same leaf.
    """
    before = thread.previous(np.arange(len(thread.owner)))
    if thread.started_midway or thread.lossy[-1:].any():
        for leaf in _OF_VCPU:
            of_leaf = np.flatnonzero(thread.leaf == leaf)
            before[of_leaf] = thread.previous(of_leaf)
    return before


def _goes_on(thread: ThreadCalls, rows: Index, among: Index) -> Flags:
    """Whether each thread has any of the calls ``among`` after its row; entries end no fault."""
    found = _latest(thread, rows, among) > rows
    faulting = np.isin(thread.leaf[rows], _FAULT_LEAVES)
    if faulting.any():
        others = among[thread.leaf[among] != VP_ENTER]
        found[faulting] = (_latest(thread, rows, others) > rows)[faulting]
    return found


def _latest(thread: ThreadCalls, rows: Index, among: Index) -> Index:
    """The last of the calls ``among`` in the thread of each row; NONE if none."""
    if not len(among):
        return np.full(len(rows), NONE)
    place = np.searchsorted(thread.owner[among], thread.owner[rows], "right") - 1
    latest = among[np.maximum(place, 0)]
    return np.where(thread.owner[latest] == thread.owner[rows], latest, NONE)


def _recorded_until(thread: ThreadCalls, rows: Index) -> tuple[Times, Flags]:
    """End of each thread's last call before the next loss after a row, and whether there is one."""
    if not thread.lossy[-1:].any():
        return np.zeros(len(rows), np.int64), np.zeros(len(rows), np.bool_)
    after = np.searchsorted(thread.lossy, thread.lossy[rows], "right")
    inside = np.minimum(after, len(thread.owner) - 1)
    is_lost = (after < len(thread.owner)) & (thread.owner[inside] == thread.owner[rows])
    return thread.frame["ends"].to_numpy()[inside - 1], is_lost


def _after_unanswered(thread: ThreadCalls, links: _Links) -> Flags:
    """Calls after one of the same request whose status is missing: it may have been busy."""
    unanswered: Flags = (links.previous != NONE) & ~thread.returned[links.previous]
    if unanswered.any():
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

    A request that its caller left busy is ``resolved_elsewhere`` if a call of another thread
    succeeded on the same (td, leaf, gpa, level) after the chain began:
    the page is in the wanted state and the lock's host priority is cleared.  Only
    requests that a page or a TD identifies can be: a vCPU has no second caller.

    Args:
        chains: The ``retry_chains`` table without ``resolved_elsewhere``; the column
            ``whole_until``, if it has it, says until when the thread was recorded without a loss:
            what was not settled by then is cut.

    Returns:
        The same rows in the same order, with outcome, settled_seq and td_id set.
    """
    chains = infer_td(chains, chains, TD_OWNERS[:2])
    given_up = chains.filter(pl.col("outcome") == "abandoned", has_second_caller())
    if given_up.is_empty():
        return _cut_by_later_loss(chains)
    # Also a chain whose beginning was lost: its last call succeeded.
    succeeded = (pl.col("outcome") == "succeeded") | (pl.col("final_status") < word.ERROR_BIT)
    done = chains.filter(succeeded).join(
        given_up.select(_REQUEST).unique(), on=_REQUEST, how="semi", nulls_equal=True
    )
    found = _first_success_after(given_up, done)
    by = left_lookup(chains, found, ("source", "first_seq"))
    resolved = pl.lit("resolved_elsewhere", pl.Enum(OUTCOMES))
    return _cut_by_later_loss(
        chains.with_columns(
            settled_seq=by, outcome=pl.when(by.is_not_null()).then(resolved).otherwise("outcome")
        )
    )


def _cut_by_later_loss(chains: pl.DataFrame) -> pl.DataFrame:
    """Cut what is still abandoned where a later loss may hide the next attempt."""
    if "whole_until" not in chains.columns:
        return chains
    is_cut = (pl.col("outcome") == "abandoned") & pl.col("whole_until").is_not_null()
    return chains.with_columns(
        outcome=pl.when(is_cut).then(pl.lit("cut", pl.Enum(OUTCOMES))).otherwise("outcome"),
        cut_by=pl.when(is_cut).then(pl.lit("lost_events", pl.Enum(CUTS))).otherwise("cut_by"),
    )


def _first_success_after(given_up: pl.DataFrame, done: pl.DataFrame) -> pl.DataFrame:
    """For each abandoned chain: the first success on its request after it began."""
    until = "whole_until" if "whole_until" in given_up.columns else pl.lit(None, pl.Int64)
    left = given_up.select("first_seq", "tid", *_REQUEST, when="start_ns", until=until)
    right = done.select(*_REQUEST, by_seq="last_seq", by="tid", when="end_ns", settled="end_ns")
    left, right = (_without_null_keys(f.sort("when")) for f in (left, right))
    joined = left.join_asof(
        right, on="when", by=list(_REQUEST), strategy="forward", check_sortedness=False
    )
    in_time = (pl.col("settled") <= pl.col("until")).fill_null(True)
    is_other = (pl.col("tid") != pl.col("by")).fill_null(True)
    found = joined.filter(pl.col("by_seq").is_not_null(), in_time, is_other)
    return found.select("source", "first_seq", "by_seq")


def _without_null_keys(requests: pl.DataFrame) -> pl.DataFrame:
    """Requests as ``join_asof`` can match them: it takes no null in its keys."""
    return requests.with_columns(pl.col("td_id", "gpa", "level").fill_null(0))


def assign_chain(calls: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Give each call the ``first_seq`` of its retry chain.

    Args:
        calls: Rows of the ``seamcalls`` table, among them all retryable ones of these chains.
        chains: Rows of the ``retry_chains`` table.

    Returns:
        source, seq, leaf, status, end_ns and ``chain`` of the calls of these chains, those of a
        chain behind each other in the order of time.
    """
    columns = ("source", "seq", "leaf", "status", "end_ns")
    parts = []
    for source, of_source in _by_source(calls):
        thread = order_by_thread(of_source, LOSSES.empty(), source)
        own, seq = chains.filter(pl.col("source") == source), thread.frame["seq"]
        # The chains tell what was separated: by losses, another thread, or process.
        links = _link(thread, of_process=False)
        links.joined &= ~seq.is_in(own["first_seq"].implode()).to_numpy()
        links.joined &= ~seq.is_in(own["last_seq"].implode()).to_numpy()[links.previous]
        order = _ordered(links.joined, links.previous, thread.run)
        firsts = order.rows[np.repeat(order.starts, order.ends - order.starts + 1)]
        parts.append(thread.frame.select(columns)[order.rows].with_columns(chain=seq[firsts]))
    if not parts:
        return calls.select(*columns, chain="seq")
    begun = chains.select("source", chain="first_seq")
    return pl.concat(parts).join(begun, on=["source", "chain"], how="semi", maintain_order="left")
