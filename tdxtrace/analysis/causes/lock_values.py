"""Lock values: what would a lock around SEAMCALLs have bought, and what would it have cost?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.causes.overlaps import Times
from tdxtrace.analysis.causes.scene import Scene
from tdxtrace.tables.causes import BUSY_CAUSES, LOCK_VALUES, LOCKS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tdx.leaves import numbers_of
from tdxtrace.tdx.word import ERROR_BIT

# "A spinlock around affected seamcalls" (P. Bonzini, kvm list, 2024-09-10): those that the
# series it answers sent through one retry loop, tdx_seamcall_sept (20240904030751.117579-10).
_SEAMCALL_LOCK: Final = numbers_of(
    [
        *("TDH.MEM.PAGE.ADD", "TDH.MEM.SEPT.ADD", "TDH.MEM.SEPT.REMOVE", "TDH.MEM.PAGE.AUG"),
        *("TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE", "TDH.MEM.RANGE.UNBLOCK"),
    ]
)
# Linux 6.16 arch/x86/kvm/vmx/tdx.c and mmu/tdp_mmu.c: faults install under mmu_lock held for
# reading, zaps hold it for writing; the splitting of pages too (huge page series for TDX).
_READ: Final = numbers_of(["TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"])
_WRITE: Final = numbers_of(
    [
        *("TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE", "TDH.MEM.SEPT.REMOVE"),
        *("TDH.MEM.RANGE.UNBLOCK", "TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE"),
    ]
)
READERS: Final[dict[str, list[int]]] = {"seamcall_lock": [], "mmu_lock": _READ}
WRITERS: Final[dict[str, list[int]]] = {"seamcall_lock": _SEAMCALL_LOCK, "mmu_lock": _WRITE}


def lock_values(
    scenes: Iterable[Scene], busy_causes: pl.DataFrame, retry_chains: pl.DataFrame
) -> pl.DataFrame:
    """Weigh two locks: the seed's around the S-EPT leaves of a TD, and mmu_lock as Linux has it.

    A busy answer is removed if the lock keeps its call and the holder apart: both take it for
    one TD, and not both for reading.  Guests and armed entries take neither.

    The wait is that of a queue: requests come when their first attempt did, in that order,
    and have the lock for as long as their last attempt took; readers share it.  No request
    comes later because its thread waited before, so the sum is an upper estimate.  Requests
    that never succeeded are left out.

    Args:
        scenes: One per source.
        busy_causes: The ``busy_causes`` table.
        retry_chains: The ``retry_chains`` table of the same trace.

    Returns:
        The ``lock_values`` table, by source, lock, TD and leaf.

    Raises:
        TableError: If a table lacks a column or has one of another type.
    """
    answers = BUSY_CAUSES.conform(busy_causes).filter(pl.col("rank") == 1)
    chains = RETRY_CHAINS.conform(retry_chains)
    parts = [LOCK_VALUES.empty()]
    for scene in scenes:
        mine = pl.col("source") == scene.source
        parts += [
            _of_lock(scene, lock, answers.filter(mine), chains.filter(mine)) for lock in LOCKS
        ]
    return pl.concat(parts).sort("source", "lock", "td_id", "leaf")


def _of_lock(scene: Scene, lock: str, answers: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    covered = [*READERS[lock], *WRITERS[lock]]
    here = pl.col("leaf").is_in(covered)
    calls = scene.done.filter(here).group_by("td_id", "leaf").agg(n_calls=pl.len().cast(pl.UInt64))
    busy = _removed(answers.filter(here), lock)
    waits = _waits(scene.done.filter(here), chains.filter(here), WRITERS[lock])
    by = ["td_id", "leaf"]
    counted = ("n_busy", "n_removed", "n_kept", "n_unknown", "n_waits")
    rows = calls.join(busy, on=by, how="left", nulls_equal=True).join(
        waits, on=by, how="left", nulls_equal=True
    )
    return LOCK_VALUES.conform(
        rows.with_columns(
            source=pl.lit(scene.source, pl.UInt16),
            lock=pl.lit(lock).cast(pl.Enum(LOCKS)),
            **{name: pl.col(name).fill_null(0).cast(pl.UInt64) for name in counted},
            **{
                name: pl.col(name).fill_null(0).cast(pl.Int64)
                for name in ("busy_ns", "waited_ns", "max_wait_ns")
            },
        )
    )


def _removed(answers: pl.DataFrame, lock: str) -> pl.DataFrame:
    """Per TD and leaf: busy attempts that the lock removes, keeps, or may do either with."""
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


def _waits(calls: pl.DataFrame, chains: pl.DataFrame, writers: list[int]) -> pl.DataFrame:
    """Per TD and leaf: how long requests would have queued for the lock of their TD."""
    arrivals = chains.select(seq="last_seq", arrival="start_ns")
    served = calls.filter((pl.col("status") < ERROR_BIT).fill_null(False), pl.col("certain")).join(
        arrivals, on="seq"
    )
    parts = [pl.DataFrame(schema=_WAITS)]
    for part in served.partition_by("td_id"):
        queue = part.sort("arrival", "seq")
        wait = queued(
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


_WAITS: Final = {
    "td_id": pl.UInt64,
    "leaf": pl.UInt16,
    "waited_ns": pl.Int64,
    "max_wait_ns": pl.Int64,
    "n_waits": pl.UInt32,
}


def queued(arrival: Times, service: Times, writes: NDArray[np.bool_]) -> Times:
    """How long each of a queue waits for a fair lock that readers share.

    Args:
        arrival: When each comes, in order, in ns.
        service: How long each has the lock.
        writes: Whether it wants the lock alone.

    Returns:
        ns from arrival to having the lock.  A writer waits for all that came before it, a
        reader for the last writer that did.

    Example:
        >>> queued(np.array([0, 1, 2, 3]), np.array([10, 5, 5, 5]), np.array([True, 0, 0, 1], bool))
        array([ 0,  9,  8, 12])
    """
    n = len(arrival)
    place = np.flatnonzero(writes)
    # Readers between two writers, and before the first: when they are done at the latest, if
    # they need not wait, and the longest of them.
    bounds = np.append(place, n)
    done = np.full(len(bounds), np.iinfo(np.int64).min)
    longest = np.zeros(len(bounds), np.int64)
    group = np.searchsorted(place, np.arange(n), side="right")
    readers = ~writes
    np.maximum.at(done, group[readers], (arrival + service)[readers])
    np.maximum.at(longest, group[readers], service[readers])
    free = np.empty(len(bounds), np.int64)
    free[0] = last = np.iinfo(np.int64).min // 2
    for i, (at, lasts) in enumerate(
        zip(arrival[place].tolist(), service[place].tolist(), strict=True)
    ):
        last = max(at, last, int(done[i]), last + int(longest[i])) + lasts
        free[i + 1] = last
    wait = np.maximum(free[group] - arrival, 0)
    wait[place] = free[1:] - service[place] - arrival[place]
    return np.asarray(wait, np.int64)
