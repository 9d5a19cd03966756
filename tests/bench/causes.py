"""How long busy causes take on many SEAMCALLs, and how much memory.

    python tests/bench/causes.py [--calls 10000000] [--busy 0.05]

Makes the calls of sixteen threads of two TDs, and finds who made each busy one so,
and which rules were broken.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import polars as pl

from tdxtrace.analysis.causes.busy_causes import broken_rules, busy_causes
from tdxtrace.analysis.causes.evidence import gather_evidence
from tdxtrace.tables.events import (
    HOST_EVENTS,
    LOSSES,
    PAGE_FAULTS,
    SEAMCALLS,
    THREADS,
    VM_ENTRIES,
)
from tdxtrace.tables.trace import Provenance, Source, Trace

THREADS_MADE = 16
ENTER, BUSY_TREE, BUSY_EPOCH = 0, 0x8000_0200_0000_0092, 0x8000_0200_0000_00A9
# Leaves, and how often each is called.
LEAVES = {0: 0.45, 6: 0.25, 3: 0.05, 7: 0.1, 38: 0.05, 29: 0.1}


def calls(n: int, busy: float) -> pl.DataFrame:
    """Calls of threads that each make one after the other, by their end."""
    chance = np.random.default_rng(1)
    tid = np.repeat(np.arange(THREADS_MADE), n // THREADS_MADE)
    n = len(tid)
    leaf = chance.choice(list(LEAVES), n, p=list(LEAVES.values())).astype(np.uint16)
    is_busy = chance.random(n) < busy
    took = np.where(leaf == ENTER, chance.integers(5000, 60_000, n), chance.integers(1500, 9000, n))
    took = np.where(is_busy, chance.integers(700, 1500, n), took)
    step = took + chance.integers(300, 6000, n)
    end = np.cumsum(step.reshape(THREADS_MADE, -1), axis=1).ravel()
    refused = np.where(np.isin(leaf, (ENTER, 38)), BUSY_EPOCH, BUSY_TREE).astype(np.uint64)
    answer = np.where(leaf == ENTER, chance.choice([48, 1, 77, 12], n), 0).astype(np.uint64)
    frame = pl.DataFrame(
        {
            "start_ns": end - took,
            "end_ns": end,
            "tid": tid.astype(np.int32),
            "cpu": tid.astype(np.uint16),
            "leaf": leaf,
            "td_id": tid // 8 << 12,
            "vp_id": tid,
            "gpa": chance.integers(0, 1 << 20, n) << 12,
            "status": np.where(is_busy, refused, answer),
        }
    ).sort("end_ns")
    frame = frame.with_columns(
        seq=pl.int_range(1, n + 1),
        source=0,
        tgid=pl.col("tid") // 8,
        start_cpu="cpu",
        td_id=pl.when(pl.col("leaf") != ENTER).then("td_id"),
        vp_id=pl.when(pl.col("leaf") == ENTER).then("vp_id"),
        gpa=pl.when(pl.col("leaf").is_in([6, 3, 7, 29])).then("gpa"),
        level=0,
        probe=pl.lit("wrapper"),
        n_lines=2,
        in_irq=False,
    )
    missing = [name for name in SEAMCALLS.schema if name not in frame.columns]
    frame = frame.with_columns(pl.lit(None).alias(name) for name in missing)
    return frame.select(SEAMCALLS.schema.names()).cast(SEAMCALLS.schema)


def traced(seamcalls: pl.DataFrame) -> Trace:
    """The trace that has nothing but these calls."""
    source = Source(
        "made", "ftrace", "none", 0, seamcalls.height, 0, 0, 1, "mono", 1, None, None, {}
    )
    return Trace(
        seamcalls,
        VM_ENTRIES.empty(),
        PAGE_FAULTS.empty(),
        HOST_EVENTS.empty(),
        THREADS.empty(),
        LOSSES.empty(),
        Provenance((source,), 0, "made", "0"),
    )


def main() -> None:
    """Run and print."""
    words = argparse.ArgumentParser()
    words.add_argument("--calls", type=int, default=10_000_000)
    words.add_argument("--busy", type=float, default=0.05)
    asked = words.parse_args()
    trace = traced(calls(asked.calls, asked.busy))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, cpu = time.perf_counter(), time.process_time()
    seen = list(gather_evidence(trace))
    for name, find in (("busy_causes", busy_causes), ("broken_rules", broken_rules)):
        rows = find(seen).height
        took = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{name:<14} after {took[0]:6.1f} s, processor {took[1]:6.1f} s, {rows:,} rows")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak {peak:.1f} GiB, {before:.1f} of them to make the calls")


if __name__ == "__main__":
    main()
