"""Measure the time of attempts, policies and limits on many requests.

    python tests/bench/limits.py [--requests 10000000] [--busy 0.01]

Makes calls of eight threads and six leaves, finds their retry chains, and then times each
answer by itself and, without these, all of them together.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import polars as pl

from tdxtrace.analysis.attempts import attempts
from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.latencies import latencies
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.recommend.limits import limits
from tdxtrace.recommend.replay import policies
from tdxtrace.tables.events import LOSSES, SEAMCALLS

LEAVES = np.array([6, 6, 6, 3, 7, 29, 38, 41], np.uint16)
BUSY = 0x8000_0200_0000_0092


def calls(n: int, busy: float) -> pl.DataFrame:
    """The calls of n requests, a share of which are busy, in bursts."""
    chance = np.random.default_rng(1)
    # A burst goes on with the next request with chance 3/4.
    begins = chance.random(n) < busy / 4
    length = np.where(begins, chance.geometric(0.25, n), 0)
    ends = np.flatnonzero(begins)
    is_busy = np.zeros(n + 1, np.int32)
    np.add.at(is_busy, ends, 1)
    np.add.at(is_busy, np.minimum(ends + length[ends], n), -1)
    retried = np.cumsum(is_busy[:n]) > 0
    numbers = np.where(retried, chance.geometric(0.3, n), 0)
    request = np.repeat(np.arange(n), numbers + 1)
    last = np.append(request[1:] != request[:-1], [True])
    start = np.arange(len(request), dtype=np.int64) * 2000
    frame = pl.DataFrame(
        {
            "seq": np.arange(1, len(request) + 1, dtype=np.uint64),
            "start_ns": start,
            "end_ns": start + 1000,
            "tid": (request % 8).astype(np.int32),
            "leaf": LEAVES[request % len(LEAVES)],
            "gpa": (request.astype(np.uint64) << np.uint64(12)),
            "status": np.where(last, np.uint64(0), np.uint64(BUSY)),
        }
    ).with_columns(
        source=0,
        cpu=0,
        start_cpu=0,
        n_lines=2,
        td_id=0x7D001,
        level=0,
        probe=pl.lit("wrapper"),
        in_irq=False,
    )
    missing = [name for name in SEAMCALLS.schema if name not in frame.columns]
    frame = frame.with_columns(pl.lit(None).alias(name) for name in missing)
    return frame.select(SEAMCALLS.schema.names()).cast(SEAMCALLS.schema)


def timed(name: str, find: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """Find an answer and print how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = find()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{name:<14}{wall:8.2f} s, processor {cpu:8.2f} s, {found.height:,} rows", flush=True)
    return found


def main() -> None:
    """Time it and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000_000)
    parser.add_argument("--busy", type=float, default=0.01)
    wanted = parser.parse_args()
    seamcalls = timed("calls made", lambda: calls(wanted.requests, wanted.busy))
    chains = timed("retry_chains", lambda: retry_chains(seamcalls, LOSSES.empty()))
    wall = time.perf_counter()
    answers = timed("busy_answers", lambda: busy_answers(seamcalls, chains))
    curve = timed("attempts", lambda: attempts(chains, answers))
    timed("policies", lambda: policies(chains, answers))
    timed("limits", lambda: limits(curve, chains, LOSSES.empty(), 3600.0))
    print(f"busy_answers to limits together {time.perf_counter() - wall:.2f} s")
    timed("latencies", lambda: latencies(seamcalls, chains, answers))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak {peak:.1f} GiB")


if __name__ == "__main__":
    main()
