"""Estimated effects of taking a lock: the ``lock_values`` and ``entry_waits`` tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Times
from tdxtrace.analysis.causes.conflicts import TREE
from tdxtrace.analysis.causes.evidence import BusyEvidence
from tdxtrace.analysis.causes.mmu_lock import FAULTS, ZAPS
from tdxtrace.analysis.loops.ranking import BOUNDS_UNKNOWN
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.tables.causes import BUSY_CAUSES, ENTRY_WAITS, LOCK_VALUES, LOCKS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tdx.leaves import numbers_of
from tdxtrace.tdx.word import ERROR_BIT

# "A spinlock around affected seamcalls" (P. Bonzini, kvm list, 2024-09-10): the leaves that the
# series under review sent through one retry loop, tdx_seamcall_sept (20240904030751.117579-10).
_SEAMCALL_LOCK: Final = numbers_of(
    [
        *("TDH.MEM.PAGE.ADD", "TDH.MEM.SEPT.ADD", "TDH.MEM.SEPT.REMOVE", "TDH.MEM.PAGE.AUG"),
        *("TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE", "TDH.MEM.RANGE.UNBLOCK"),
    ]
)
# Leaves that mainline calls with mmu_lock held for writing, and leaves of unmerged series:
# splitting huge pages and removing SEPT pages (huge page series for TDX; v1 series, 2024-09).
_WRITE: Final = [
    *ZAPS,
    *numbers_of(
        [
            *("TDH.MEM.SEPT.REMOVE", "TDH.MEM.RANGE.UNBLOCK"),
            *("TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE"),
        ]
    ),
]
READERS: Final[dict[str, list[int]]] = {"seamcall_lock": [], "mmu_lock": FAULTS}
WRITERS: Final[dict[str, list[int]]] = {"seamcall_lock": _SEAMCALL_LOCK, "mmu_lock": _WRITE}


def lock_values(
    sources: Iterable[BusyEvidence],
    busy_causes: pl.DataFrame | pl.LazyFrame,
    retry_chains: pl.DataFrame,
) -> pl.DataFrame:
    """Estimate the effect of two locks: the seed's around the S-EPT leaves of a TD, and mmu_lock.

    The lock removes a busy answer if it serialises the call and the holder: both take it for
    the same TD, and at least one of them for writing.  Guests and armed entries take neither lock.

    The wait is modelled as a queue: requests arrive at the start of their first attempt, are
    served in that order, and hold the lock for the duration of their last attempt; readers share
    it.  Earlier waits do not delay arrivals, so the sum is an upper estimate.  Requests that
    never succeeded are excluded.

    Args:
        sources: Evidence of each source.
        busy_causes: The ``busy_causes`` table, or a query of it.
        retry_chains: The ``retry_chains`` table of the same trace.

    Returns:
        The ``lock_values`` table, by source, lock, TD and leaf.

    Raises:
        TableError: If a table lacks a column or has one of another type.
    """
    needed = ("source", "rank", "start_ns", "end_ns", "leaf", "td_id", "cause", "holder_leaf")
    answers = BUSY_CAUSES.pick(busy_causes, *needed, "holder_td_id").filter(pl.col("rank") == 1)
    chains = RETRY_CHAINS.conform(retry_chains)
    parts = [LOCK_VALUES.empty()]
    for evidence in sources:
        of_source = pl.col("source") == evidence.source
        parts += [
            _values_of_lock(evidence, lock, answers.filter(of_source), chains.filter(of_source))
            for lock in LOCKS
        ]
    return pl.concat(parts).sort("source", "lock", "td_id", "leaf")


def _values_of_lock(
    evidence: BusyEvidence, lock: str, answers: pl.DataFrame, chains: pl.DataFrame
) -> pl.DataFrame:
    covered = [*READERS[lock], *WRITERS[lock]]
    here = pl.col("leaf").is_in(covered)
    counts = (
        evidence.calls.filter(here).group_by("td_id", "leaf").agg(n_calls=pl.len().cast(pl.UInt64))
    )
    removed = _count_removed(answers.filter(here), lock)
    waits = _queue_waits_by_leaf(evidence.calls.filter(here), chains.filter(here), WRITERS[lock])
    by = ["td_id", "leaf"]
    counted = ("n_busy", "n_removed", "n_kept", "n_unknown", "n_waits")
    rows = counts.join(removed, on=by, how="left", nulls_equal=True).join(
        waits, on=by, how="left", nulls_equal=True
    )
    return LOCK_VALUES.conform(
        rows.with_columns(
            source=pl.lit(evidence.source, pl.UInt16),
            lock=pl.lit(lock).cast(pl.Enum(LOCKS)),
            **{name: pl.col(name).fill_null(0).cast(pl.UInt64) for name in counted},
            **{
                name: pl.col(name).fill_null(0).cast(pl.Int64)
                for name in ("busy_ns", "waited_ns", "max_wait_ns")
            },
        )
    )


def _count_removed(answers: pl.DataFrame, lock: str) -> pl.DataFrame:
    """Count busy attempts per TD and leaf that the lock removes, keeps, or may remove."""
    writes = pl.col("leaf").is_in(WRITERS[lock]) | pl.col("holder_leaf").is_in(WRITERS[lock])
    covered = pl.col("holder_leaf").is_in([*READERS[lock], *WRITERS[lock]])
    same_td = pl.col("td_id") == pl.col("holder_td_id")
    removed = (covered & writes & same_td & (pl.col("cause") != "unexplained")).fill_null(False)
    unknown = pl.col("cause") == "unexplained"
    took = pl.col("end_ns") - pl.col("start_ns")
    return answers.group_by("td_id", "leaf").agg(
        n_busy=pl.len(),
        n_removed=removed.sum(),
        n_unknown=unknown.sum(),
        n_kept=(~removed & ~unknown).sum(),
        busy_ns=took.filter(removed).sum(),
    )


def _queue_waits_by_leaf(
    calls: pl.DataFrame, chains: pl.DataFrame, writers: list[int]
) -> pl.DataFrame:
    """Return the ns per TD and leaf that requests would have waited for the lock of their TD."""
    arrivals = chains.select(seq="last_seq", arrival="start_ns")
    served = calls.filter((pl.col("status") < ERROR_BIT).fill_null(False), pl.col("certain")).join(
        arrivals, on="seq"
    )
    parts = [pl.DataFrame(schema=_WAIT_COLUMNS)]
    for part in served.partition_by("td_id"):
        queue = part.sort("arrival", "seq")
        wait = queue_waits(
            queue["arrival"].to_numpy(),
            (queue["ends"] - queue["begins"]).to_numpy(),
            queue["leaf"].is_in(writers).to_numpy(),
        )
        waits = queue.select("td_id", "leaf").with_columns(wait=pl.Series(wait))
        parts.append(
            waits.group_by("td_id", "leaf").agg(
                waited_ns=pl.col("wait").sum(),
                max_wait_ns=pl.col("wait").max(),
                n_waits=(pl.col("wait") > 0).sum(),
            )
        )
    return pl.concat(parts)


_WAIT_COLUMNS: Final = {
    "td_id": pl.UInt64,
    "leaf": pl.UInt16,
    "waited_ns": pl.Int64,
    "max_wait_ns": pl.Int64,
    "n_waits": pl.UInt32,
}


def queue_waits(arrival: Times, service: Times, writes: NDArray[np.bool_]) -> Times:
    """Return the wait of each request for a fair reader-writer lock.

    Args:
        arrival: Arrival time of each request, ascending, in ns.
        service: Time for which each request holds the lock, in ns.
        writes: Whether each request takes the lock exclusively.

    Returns:
        ns from arrival to acquiring the lock.  A writer waits for all earlier requests, a reader
        for the last earlier writer.

    Example:
        >>> queue_waits(np.array([0, 1, 2]), np.array([10, 5, 5]), np.array([True, False, True]))
        array([ 0,  9, 13])
    """
    n = len(arrival)
    place = np.flatnonzero(writes)
    # For each group of readers between two writers: the latest end if no reader waits, and the
    # longest service time.
    bounds = np.append(place, n)
    readers_done = np.full(len(bounds), np.iinfo(np.int64).min)
    longest = np.zeros(len(bounds), np.int64)
    group = np.searchsorted(place, np.arange(n), side="right")
    readers = ~writes
    np.maximum.at(readers_done, group[readers], (arrival + service)[readers])
    np.maximum.at(longest, group[readers], service[readers])
    free = np.empty(len(bounds), np.int64)
    free[0] = last = np.iinfo(np.int64).min // 2
    for i, (at, lasts) in enumerate(
        zip(arrival[place].tolist(), service[place].tolist(), strict=True)
    ):
        last = max(at, last, int(readers_done[i]), last + int(longest[i])) + lasts
        free[i + 1] = last
    wait = np.maximum(free[group] - arrival, 0)
    wait[place] = free[1:] - service[place] - arrival[place]
    return np.asarray(wait, np.int64)


_TAKERS_OF_MMU_LOCK: Final = [*READERS["mmu_lock"], *WRITERS["mmu_lock"]]


def entry_waits(sources: Iterable[BusyEvidence]) -> pl.DataFrame:
    """Evaluate the seed's remedy for zero-step on each run of refused entries.

    The remedy: if TDH.VP.ENTER finds the S-EPT tree held, take and release mmu_lock, which
    waits for the critical sections in flight, and enter again (P. Bonzini, kvm list,
    2024-09-10).  It would have sufficed if every holder in flight at the first refused entry
    runs under mmu_lock, and no entry that was tried after the last holder had ended was
    refused again.

    Args:
        sources: Evidence of each source.

    Returns:
        The ``entry_waits`` table, by source and first_seq.
    """
    parts = [_waits_of_source(evidence) for evidence in sources]
    return pl.concat([ENTRY_WAITS.empty(), *parts]).sort("source", "first_seq")


def _waits_of_source(evidence: BusyEvidence) -> pl.DataFrame:
    refused = evidence.busy.attempts.filter(pl.col("leaf") == VP_ENTER, pl.col("lock") == TREE)
    if refused.is_empty():
        return ENTRY_WAITS.empty()
    runs = _runs(evidence, refused["row"])
    first = runs.filter(pl.col("row") == pl.col("row").first().over("run"))
    last = first.join(_in_flight(evidence), on="row", how="left").select(
        "run", "last_end_ns", "n_holders", "waits_for_all"
    )
    rows = (
        runs.join(last, on="run", how="left")
        .group_by("run", maintain_order=True)
        .agg(
            pl.col("seq").first().alias("first_seq"),
            pl.col("tid", "tgid", "td_id", "vp_id", "entered_ns").first(),
            pl.col("begins").first().alias("start_ns"),
            pl.len().cast(pl.UInt32).alias("n_refused"),
            pl.col("n_holders").first().fill_null(0),
            pl.col("last_end_ns", "waits_for_all").first(),
            n_after=(pl.col("begins") > pl.col("last_end_ns")).sum().cast(pl.UInt32),
        )
    )
    sufficed = pl.col("waits_for_all") & (pl.col("n_after") == 0)
    return ENTRY_WAITS.conform(
        rows.with_columns(
            source=pl.lit(evidence.source, pl.UInt16),
            wait_ns=(pl.col("last_end_ns") - pl.col("start_ns")).clip(0),
            sufficed=pl.when(pl.col("n_holders") > 0).then(sufficed),
        )
    )


def _in_flight(evidence: BusyEvidence) -> pl.DataFrame:
    """Return per attempt: count of possible holders, their last end, whether all take mmu_lock."""
    holders = evidence.possible_holders.filter(
        pl.col("grade") < BOUNDS_UNKNOWN, pl.col("core_ns") >= -evidence.busy.slack_ns
    )
    ends, leaf = evidence.calls["ends"], evidence.calls["leaf"]
    return (
        holders.with_columns(
            ends=ends.gather(holders["holder"]), leaf=leaf.gather(holders["holder"])
        )
        .group_by(row="attempt")
        .agg(
            n_holders=pl.len().cast(pl.UInt32),
            last_end_ns=pl.col("ends").max(),
            waits_for_all=pl.col("leaf").is_in(_TAKERS_OF_MMU_LOCK).all(),
        )
    )


def _runs(evidence: BusyEvidence, refused: pl.Series) -> pl.DataFrame:
    """Return refused entries, the run of each, and the start of the vCPU's next accepted entry."""
    entries = (
        evidence.calls.with_row_index("row")
        .filter(pl.col("leaf") == VP_ENTER)
        .with_columns(refused=pl.col("row").is_in(refused.implode()))
        .sort("tid", "begins", "row")
    )
    begins_run = pl.col("refused") & ~pl.col("refused").shift().over("tid").fill_null(False)
    next_entry = pl.when(~pl.col("refused")).then("begins").backward_fill().over("tid")
    return entries.with_columns(run=begins_run.cum_sum(), entered_ns=next_entry).filter("refused")
