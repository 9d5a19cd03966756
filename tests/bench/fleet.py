"""Measure the cost of a fleet's facts, and the coverage of its intervals.

    python tests/bench/fleet.py coverage [--fleets 1000] [--seed 1]
    python tests/bench/fleet.py many FACTS --hosts 10000
    python tests/bench/fleet.py equal TRACES

coverage: hosts of one kind differ in the log-odds of a busy answer by a normal random effect; the
interval of the share of all requests is compared with the mean over hosts, of which those that
were recorded are a sample. many: the facts of few traces, multiplied. equal: every table of the
facts of a folder's traces against one process that reads them all, and one worker against two.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from polars.testing import assert_frame_equal

from tdxtrace.analysis.attempts import AttemptCounts, curves_of
from tdxtrace.fleet.engine import LocalEngine
from tdxtrace.fleet.limits import fleet_limits
from tdxtrace.fleet.mapping import map_traces, part_folder
from tdxtrace.fleet.merge import (
    Facts,
    FleetCounts,
    count_fleet,
    host_squares,
    open_facts,
    recorded_of,
)
from tdxtrace.fleet.storage import open_storage, trace_inputs
from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.recommend.limits import limits_of
from tdxtrace.recommend.target import Target
from tdxtrace.tables.fleet import ATTEMPT_COUNTS, ATTEMPT_TOTALS
from tdxtrace.tables.trace import Findings

# Chance that a request is busy on a host in the middle, and that it is so once more.
BUSY, STAYS = 0.05, 0.5
DEEPEST = 12
REQUESTS = 500


def coverage(n_fleets: int, seed: int) -> None:
    """Print how often 95 % intervals hold the share of requests that need more."""
    chance = np.random.default_rng(seed)
    print(f"{n_fleets} fleets a row, {REQUESTS} requests a host on average, {BUSY:.0%} busy")
    print("hosts  sd of log-odds  requests a host  hosts as clusters: 1, 2, 3 attempts  as one: 1")
    for n_hosts in (10, 50, 200):
        for spread in (0.0, 0.5, 1.0):
            for sizes in ("equal", "unequal"):
                of_hosts, as_one = _covered(chance, n_fleets, n_hosts, spread, sizes)
                shares = " ".join(f"{100 * share:6.1f}" for share in of_hosts)
                print(f"{n_hosts:5} {spread:15} {sizes:>16} {shares:>38} {100 * as_one[0]:11.1f}")


def _covered(
    chance: np.random.Generator, n_fleets: int, n_hosts: int, spread: float, sizes: str
) -> tuple[list[float], list[float]]:
    odds = np.log(BUSY / (1 - BUSY))
    p = 1 / (1 + np.exp(-(odds + spread * chance.standard_normal((n_fleets, n_hosts)))))
    n = np.full(p.shape, REQUESTS)
    if sizes == "unequal":
        n = np.maximum(chance.lognormal(np.log(REQUESTS) - 0.5, 1.0, p.shape), 20).astype(np.int64)
    whole = 1 / (1 + np.exp(-(odds + spread * chance.standard_normal(1_000_000))))
    more = chance.binomial(n, p)
    fleet, host = np.indices(p.shape)
    rows, left = [], more
    for step in range(1, DEEPEST + 1):
        further = chance.binomial(left, STAYS) if step < DEEPEST else np.zeros_like(left)
        rows.append((np.full(p.size, step), (left - further).ravel()))
        left = further
    by_host = pl.DataFrame(
        {
            "leaf": np.tile(fleet.ravel(), DEEPEST).astype(np.uint16),
            "host": np.tile(host.ravel(), DEEPEST),
            "step": np.concatenate([step for step, _ in rows]),
            "n_more": np.concatenate([ends for _, ends in rows]),
        }
    ).with_columns(
        by=pl.lit("leaf", ATTEMPT_COUNTS.schema["by"]),
        kind=pl.lit(None, pl.String),
        unit=pl.lit("attempts", ATTEMPT_COUNTS.schema["unit"]),
        settled=pl.lit("none", ATTEMPT_COUNTS.schema["settled"]),
    )
    sums = pl.DataFrame(
        {"leaf": fleet.ravel().astype(np.uint16), "host": host.ravel(), "n_all": n.ravel()}
    )
    truth = [float(whole.mean()) * STAYS**step for step in range(3)]
    plain = _counts(by_host, sums, n_hosts)
    squares = host_squares(by_host.filter(pl.col("n_more") > 0), sums)
    steps = pl.concat([plain.steps, squares.drop("host", "n_more")], how="diagonal").with_columns(
        pl.selectors.numeric().exclude("leaf", "source", "td_id").fill_null(0)
    )
    sizes_of = sums.group_by("leaf").agg(
        host_clusters=pl.len().cast(pl.Int64), host_sizes=(pl.col("n_all") ** 2).sum()
    )
    hosts = AttemptCounts(steps, plain.totals.join(sizes_of, on="leaf"), has_makers=False)
    return _holds(curves_of(hosts), truth), _holds(curves_of(plain), truth)


def _counts(by_host: pl.DataFrame, sums: pl.DataFrame, n_hosts: int) -> AttemptCounts:
    """The counts of each fleet, as those of a leaf; each request is a burst of its own."""
    keys = ["leaf", "by", "kind", "unit", "settled", "step"]
    ends = by_host.group_by(keys).agg(pl.col("n_more").sum())
    done = ends.with_columns(step=pl.col("step") + 1, n_done="n_more", n_more=pl.lit(0, pl.Int64))
    steps = pl.concat([ends.with_columns(n_done=pl.lit(0, pl.Int64)), done])
    steps = steps.with_columns(squares="n_more", n_episodes="n_more")
    missing = [c for c in ATTEMPT_COUNTS.columns if c.name not in steps.columns]
    steps = steps.with_columns(
        pl.lit(None if c.nullable else 0, c.dtype).alias(c.name) for c in missing
    )
    totals = (
        sums.group_by("leaf")
        .agg(pl.col("n_all").sum())
        .with_columns(n_requests=pl.col("n_all").cast(pl.UInt64), n_done=pl.col("n_all"))
    )
    missing = [c for c in ATTEMPT_TOTALS.columns if c.name not in totals.columns]
    totals = totals.with_columns(
        pl.lit(None if c.nullable else 0, c.dtype).alias(c.name) for c in missing
    )
    kept = steps.filter((pl.col("n_more") > 0) | (pl.col("n_done") > 0))
    return AttemptCounts(ATTEMPT_COUNTS.conform(kept), ATTEMPT_TOTALS.conform(totals), False)


def _holds(curves: pl.DataFrame, truth: list[float]) -> list[float]:
    found = []
    for within, more in enumerate(truth, 1):
        rows = curves.filter(pl.col("within") == within)
        held = (1 - rows["done_high"] <= more) & (more <= 1 - rows["done_low"])
        found.append(float(held.sum()) / curves["leaf"].n_unique())
    return found


def many(facts: Path, n_hosts: int) -> None:
    """Multiply facts, and print the time and memory of an answer about them."""
    # Hard links need the same file system.
    place = Path(tempfile.mkdtemp(prefix="tdxtrace-bench-", dir=facts.absolute().parent))
    try:
        marks = sorted(facts.rglob("provenance.json"))
        for number in range(n_hosts):
            mark = marks[number % len(marks)]
            words = json.loads(mark.read_text()) | {"host": f"h{number:05}", "part": f"p{number}"}
            folder = place / part_folder(words, words["part"])
            folder.mkdir(parents=True)
            for file in mark.parent.glob("*.parquet"):
                (folder / file.name).hardlink_to(file)
            (folder / mark.name).write_text(json.dumps(words))
        begin, cpu = time.perf_counter(), time.process_time()
        fleet = open_facts(open_storage(str(place)))
        opened = time.perf_counter() - begin
        rows = fleet_limits(fleet, Target(1e-3))
        took, used = time.perf_counter() - begin, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        n = int(rows.filter(made_by="anyone", unit="ns")["n_requests"].sum())
        print(
            f"{n_hosts:,} hosts, {n:,} requests: opened {opened:.1f} s, answered {took:.1f} s "
            f"({used:.1f} s of CPU), at most {peak:.0f} MB"
        )
    finally:
        shutil.rmtree(place)


def equal(folder: Path) -> None:
    """Compare the facts of traces with one process that reads all of them."""
    inputs = trace_inputs([str(folder)])
    place = Path(tempfile.mkdtemp(prefix="tdxtrace-bench-"))
    try:
        for n_workers in (1, 2):
            engine = LocalEngine(n_workers)
            done = map_traces(inputs, open_storage(str(place / str(n_workers))), engine)
            engine.close()
            for url, reason in done.failures:
                print(f"failed: {url}: {reason}")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{n_workers} workers: {done.n_done} traces in {done.seconds:.1f} s; {peak:.0f} MB"
            )
        fleet = open_facts(open_storage(str(place / "2")))
        order = [
            next(g.url for g in inputs if Path(g.url).name.split(".")[0] == host)
            for host in fleet.parts["host"]
        ]
        begin = time.perf_counter()
        findings = analyze(read_trace(*order))
        counts = count_fleet(fleet, with_tds=True)
        curves = curves_of(counts.whole)
        print(f"one process: {time.perf_counter() - begin:.1f} s")
        _compare(fleet, counts, curves, findings)
    finally:
        shutil.rmtree(place)


def _compare(fleet: Facts, counts: FleetCounts, curves: pl.DataFrame, findings: Findings) -> None:
    own = curves.filter(pl.col("by") != "td")
    theirs = findings.attempts.filter(pl.col("by") != "td")
    assert_frame_equal(own, theirs, check_exact=True)
    print(f"attempts: {own.height:,} rows equal, bit for bit")
    rough = ["pace_ns", "worst_td"]
    ours = limits_of(curves, recorded_of(fleet, counts.leaves)).drop(rough)
    assert_frame_equal(ours, findings.limits.drop(rough), check_exact=True)
    print(f"limits: {ours.height:,} rows equal, bit for bit, but for {', '.join(rough)}")
    key = ["source", "leaf", "resource", "cause"]
    shares = fleet.table("shares").sort(key)
    assert_frame_equal(shares, findings.cause_shares.sort(key), check_exact=True)
    print(f"cause_shares: {shares.height:,} rows equal")
    ours, theirs = fleet.table("vms").drop("td_id"), findings.vm_stats.drop("td_id")
    assert_frame_equal(ours.sort(pl.all()), theirs.sort(pl.all()), check_exact=True)
    print(f"vm_stats: {ours.height:,} rows equal, but for td_id")


def main() -> None:
    """Run what the command line asks for."""
    # numba, in a worker too, imports what is named coverage: not the program beside this one.
    sys.path.pop(0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    of_coverage = commands.add_parser("coverage")
    of_coverage.add_argument("--fleets", type=int, default=1000)
    of_coverage.add_argument("--seed", type=int, default=1)
    of_many = commands.add_parser("many")
    of_many.add_argument("facts", type=Path)
    of_many.add_argument("--hosts", type=int, default=10_000)
    commands.add_parser("equal").add_argument("traces", type=Path)
    given = parser.parse_args()
    if given.command == "coverage":
        coverage(given.fleets, given.seed)
    elif given.command == "many":
        many(given.facts, given.hosts)
    else:
        equal(given.traces)


if __name__ == "__main__":
    main()
