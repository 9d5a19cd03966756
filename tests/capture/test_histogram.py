"""Counts made in the kernel equal those of a recording of the same run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from support.running import answered, refused
from support.running import tdxtrace as tdxtrace_run
from support.testbed import Tracing, program, truth

import tdxtrace
from tdxtrace.capture.histogram import retried_codes
from tdxtrace.ingest.histogram import read_histogram
from tdxtrace.tdx.status import is_retryable

Counts = Counter[tuple[int, str, int]]


def cell(n: int) -> int:
    return n if n <= 64 else max(65, 1 << n.bit_length() - 1)


def counted(path: Path) -> Counts:
    found: Counts = Counter()
    for row in read_histogram(path).requests.iter_rows(named=True):
        ended = row["outcome"] if row["outcome"] in ("succeeded", "failed") else "left"
        found[row["leaf"], ended, row["n_attempts"]] += row["n_requests"]
    return found


def recorded(path: Path) -> Counts:
    chains = tdxtrace.analyze(tdxtrace.read_trace(path)).retry_chains
    rows = chains.select("leaf", pl.col("outcome").cast(pl.String), "n_attempts").iter_rows()
    found: Counts = Counter()
    for leaf, outcome, n in rows:
        found[leaf, outcome if outcome in ("succeeded", "failed") else "left", cell(n)] += 1
    return found


def read_counts(path: Path) -> Counts:
    found: Counts = Counter()
    for (_, leaf), requests in truth(path).items():
        for _, n, _, outcomes, _ in requests:
            (ended, *others) = outcomes
            found[leaf, "left" if others else ended, cell(n)] += 1
    return found


@pytest.fixture
def bpftrace() -> None:
    if shutil.which("bpftrace") is None:
        pytest.skip("no bpftrace")


@pytest.mark.usefixtures("bpftrace")
def test_counts_are_those_of_a_recording_of_the_same_run(
    tracing: Tracing, bench: Path, tmp_path: Path
) -> None:
    script = tmp_path / "plan.bt"
    plan = ("capture", "plan", "--program", bench, "--dialect", "histogram")
    script.write_text(answered(*plan).text)
    counts, trace, csv = (tmp_path / name for name in ("counts.json", "trace.dat", "truth.csv"))
    count = ["bpftrace", "-q", "-f", "json", "-o", counts, "-c", f"{bench} {csv} 4 2 60 11", script]
    record = ("capture", "record", "--program", bench, "--tracefs", tracing.path, "-o", trace)
    done = subprocess.run(
        [*program(*record), "--", *map(str, count)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"BPFTRACE_MAP_KEYS_MAX": "65536"},
    )
    assert done.returncode == 0, done.stderr
    histogram = read_histogram(counts)
    assert (histogram.cannot, histogram.n_not_kept, histogram.is_whole) == ({}, 0, True)
    assert counted(counts) == read_counts(csv)
    assert counted(counts) == recorded(trace)


@pytest.mark.usefixtures("bpftrace", "tracing")
def test_the_command_counts_and_the_others_answer(bench: Path, tmp_path: Path) -> None:
    counts, csv = tmp_path / "counts.json", tmp_path / "truth.csv"
    words = ("capture", "histogram", "--program", bench, "-o", counts, "--every", "1s", "--")
    run = [*program(*words), str(bench), str(csv), "4", "2", "30", "5"]
    done = subprocess.run(run, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert counted(counts) == read_counts(csv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts.json", "truth.csv"]
    assert "exists" in refused(1, *words, "true")
    text = answered("analyze", "log", counts).text
    assert "TDH.MEM.PAGE.AUG" in text
    assert "not in a histogram: causes" in text
    assert "no limit" in answered("recommend", counts).text
    assert "max_attempts" in answered("attempts", counts, "--format", "csv").text
    said = tdxtrace_run("policies", counts, "--policy", "fixed-5", "--policy", "mainline")
    assert "these policies need single calls, not a histogram: mainline" in said.stderr
    assert "a histogram must be the only input" in refused(2, "attempts", counts, counts)
    assert "no single calls to select" in refused(2, "attempts", counts, "--leaf", "TDH.MEM.TRACK")


def test_the_histogram_counts_the_retryable_statuses_of_the_tables() -> None:
    codes = retried_codes()
    words = pl.Series([code << 32 for code in codes], dtype=pl.UInt64)
    frame = pl.DataFrame({"status": words})
    assert frame.select(is_retryable(pl.col("status")).all()).item()
    assert 0x8000_0200 in codes
    assert 0xC000_0B08 not in codes


@pytest.mark.parametrize(
    ("kernel", "level"), [("6.16", "full"), ("6.18", "minimal"), ("7.2", "full")]
)
def test_every_wrapper_of_a_kernel_is_counted(kernel: str, level: str) -> None:
    words = ("capture", "plan", "--kernel", kernel, "--level", level, "--dialect")
    text, plain = (answered(*words, dialect).text for dialect in ("histogram", "bpftrace"))
    probed = {line.split()[0] for line in plain.splitlines() if line.startswith("kretprobe:tdh_")}
    assert {line for line in text.splitlines() if line.startswith("kretprobe:tdh_")} == probed
    assert text.count("{") == text.count("}")
    aug = text.partition("kprobe:tdh_mem_page_aug")[2].partition("kretprobe")[0]
    assert "((uint64)arg0, (uint64)arg1, (uint64)(uint32)arg2, nsecs" in aug
