"""Measure time, size and memory of a report of many SEAMCALLs.

    python tests/bench/report.py [--calls 5000000] [--parts] [--profile PART] [--form html]

Simulates several scenarios (a quiet boot, attacks that make zero-step episodes, hostile guests,
hosts that give up), reads what would have been recorded, and puts these traces one after the
other until there are so many calls: four sets of TDs and threads take turns.  Then does what
``tdxtrace report`` does; ``--parts`` asks for each answer by itself before, in the report's
order, so that each part is what was not found before it.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import pstats
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.report.outline import sections, title
from tdxtrace.report.render import report
from tdxtrace.simulate import command
from tdxtrace.tables.events import EVENT_TABLES, LOSSES, THREADS
from tdxtrace.tables.trace import Findings, Trace

SCENARIOS = (
    *("boot_storm", "zero_step_attack", "hostile_guest", "conversion_churn", "removal"),
    *("host_gives_up", "lifecycle", "crowd"),
)
# In the order in which the report asks.
ANSWERS = (
    *("busy_causes", "cause_shares", "busy_answers", "attempts", "zero_step_causes"),
    *("abandoned_requests", "progress_loops", "verdicts", "limits", "policies"),
    *("step_thresholds", "td_conflicts", "time_shares", "latencies"),
)
# Sets of TDs, vCPUs and threads that take turns.
N_SETS = 4
_THREADS, _WORDS = ("tid", "tgid"), ("td_id", "vp_id")
_TIMES = ("start_ns", "end_ns", "ts_ns")


def parts() -> list[Trace]:
    """The scenarios' traces, read back from text."""
    made = []
    with tempfile.TemporaryDirectory(prefix="tdxtrace-bench-") as folder:
        for name in SCENARIOS:
            path = Path(folder) / f"{name}.txt"
            options, paths = command.TraceOptions(), command.OutputPaths(path)
            command.simulate(name, 1, command.ScenarioChanges(), options, paths)
            made.append(read_trace(path))
    return made


def round_of(traces: list[Trace], number: int) -> dict[str, pl.DataFrame]:
    """Every scenario once, one after the other, the set of TDs that this round is for."""
    tables: dict[str, list[pl.DataFrame]] = {table.name: [] for table in EVENT_TABLES}
    seq, now = 0, 0
    for place, trace in enumerate(traces):
        source = trace.provenance.sources[0]
        assert source.first_ns is not None
        assert source.last_ns is not None
        key = 1 + number * len(traces) + place
        for name, rows in trace.tables().items():
            tables[name].append(moved(rows, seq, now - source.first_ns, key))
        seq += source.n_lines
        now += source.last_ns - source.first_ns + 1_000_000
    return {name: pl.concat(rows) for name, rows in tables.items()}


def moved(rows: pl.DataFrame, seq: int, ns: int, key: int | None) -> pl.DataFrame:
    """Rows later, and of other TDs and threads where there is a key."""
    changes: list[pl.Expr] = []
    for name in rows.columns:
        if name in ("seq", "line_no"):
            changes.append(pl.col(name) + seq)
        elif name in _TIMES:
            changes.append(pl.col(name) + ns)
        elif key is not None and name in _THREADS:
            changes.append(pl.col(name) + 100_000 * key)
        elif key is not None and name in _WORDS:
            changes.append(pl.col(name) ^ pl.lit(key << 40, pl.UInt64))
    return rows.with_columns(changes)


def large(n_calls: int) -> Trace:
    """A trace of at least so many calls."""
    traces = parts()
    rounds = [round_of(traces, number) for number in range(N_SETS)]
    n_lines = sum(trace.provenance.sources[0].n_lines for trace in traces)
    ends = [rounds[0][name]["end_ns"].max() for name in ("seamcalls", "vm_entries")]
    length = max(int(end) for end in ends if isinstance(end, int)) + 1_000_000
    n_rounds = -(-n_calls // rounds[0]["seamcalls"].height)
    tables = {
        name: pl.concat(
            moved(rounds[n % N_SETS][name], n * n_lines, n * length, None) for n in range(n_rounds)
        )
        for name in rounds[0]
    }
    tables["threads"] = pl.concat(made["threads"] for made in rounds)
    for table in (THREADS, LOSSES):
        tables[table.name] = tables[table.name].unique(table.key, maintain_order=True)
    source = dataclasses.replace(
        traces[0].provenance.sources[0],
        path="large.txt",
        n_lines=n_rounds * n_lines,
        first_ns=0,
        last_ns=n_rounds * length,
    )
    result = dataclasses.replace(traces[0].provenance, sources=(source,))
    return Trace(**tables, provenance=result)


class Clock:
    """Measures parts, and profiles one of them."""

    def __init__(self, profiled: str | None) -> None:
        self.profiled = profiled
        self.total = 0.0

    def part(self, name: str, find: Callable[[], Any]) -> Any:  # noqa: ANN401 - of any part
        """Find something and print how long it took."""
        profile = cProfile.Profile() if name == self.profiled else None
        wall, cpu = time.perf_counter(), time.process_time()
        found = profile.runcall(find) if profile else find()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.total += wall
        rows = f"{found.height:>12,} rows" if isinstance(found, pl.DataFrame) else ""
        print(f"{name:<20}{wall:8.2f} s, processor {cpu:8.2f} s{rows}", flush=True)
        if profile:
            pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        return found


def main() -> None:
    """Make the trace, time every part, print."""
    del sys.path[0]  # this folder: numba would take its coverage.py for the package coverage
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=5_000_000)
    parser.add_argument("--form", default="html", choices=("html", "md", "json"))
    parser.add_argument(
        "--parts", action="store_true", help="every answer by itself, not two at a time"
    )
    parser.add_argument("--profile", metavar="PART", help="print a profile of this part")
    words = parser.parse_args()
    clock = Clock(words.profile)
    trace: Trace = clock.part("trace made", lambda: large(words.calls))
    trace.check()
    clock.total = 0.0
    findings: Findings = clock.part("analyze", lambda: analyze(trace))
    for name in ANSWERS if words.parts or words.profile else ():
        clock.part(name, lambda name=name: getattr(findings, name))  # type: ignore[misc]
    page = clock.part(words.form, lambda: report(findings, words.form))
    busy = findings.leaf_stats["n_busy"].sum()
    print(
        f"{clock.total:.1f} s in all for {trace.seamcalls.height:,} SEAMCALLs, {busy:,} busy, "
        f"{findings.zero_steps.height:,} zero-step episodes; {title(findings)!r}: "
        f"{len(sections(findings))} sections, {len(page):,} bytes; peak "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )


if __name__ == "__main__":
    main()
