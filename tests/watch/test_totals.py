"""Running totals equal the findings of the whole trace, in bounded memory."""

from __future__ import annotations

import json
from functools import cache

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.running import SAMPLES
from support.story import story

import tdxtrace
from tdxtrace.analysis.thresholds import QUANTITIES as OF_FINDINGS
from tdxtrace.analysis.zero_steps import zero_steps
from tdxtrace.tables.events import LOSSES, VM_ENTRIES
from tdxtrace.watch.ticks import Tick
from tdxtrace.watch.totals import QUANTITIES, RunningTotals


def tick(calls: pl.DataFrame, entries: pl.DataFrame | None = None) -> Tick:
    last = calls["end_ns"].max()
    return Tick(
        calls,
        VM_ENTRIES.empty() if entries is None else entries,
        LOSSES.empty(),
        {tid: f"thread {tid}" for tid in calls["tid"].unique()},
        2 * calls.height,
        last if isinstance(last, int) else None,
    )


def watched(text: str, *, pieces: int = 1) -> RunningTotals:
    """Totals of a story, fed in a number of ticks."""
    scenario = story(text)
    calls = scenario.seamcalls.sort("seq")
    totals = RunningTotals()
    size = max(1, -(-calls.height // pieces))
    for begin in range(0, max(1, calls.height), size):
        totals.take(tick(calls[begin : begin + size], scenario.vm_entries if not begin else None))
    return totals


def test_quantities_are_those_of_thresholds_of_files() -> None:
    # Verdicts need the whole trace.
    assert list(QUANTITIES) == [name for name in OF_FINDINGS if name != "problems"]


@cache
def sample() -> tuple[tdxtrace.Trace, tdxtrace.Findings]:
    trace = tdxtrace.read_trace(SAMPLES / "zerostep.txt")
    return trace, tdxtrace.analyze(trace)


@given(st.integers(1, 12))
@settings(max_examples=4)
def test_totals_equal_the_findings_of_the_whole_trace(pieces: int) -> None:
    trace, findings = sample()
    calls = trace.seamcalls.sort("seq")
    totals, size = RunningTotals(), -(-calls.height // pieces)
    for begin in range(0, calls.height, size):
        totals.take(tick(calls[begin : begin + size]))
    stats = findings.leaf_stats
    assert sum(one.n_calls for one in totals.leaves.values()) == calls.height
    assert totals.quantity("busy") == stats["n_busy"].sum()
    assert totals.quantity("max-attempts") == stats["max_attempts"].max()
    refused = (pl.col("leaf") == 0) & (pl.col("status") == 0x8000020000000092)
    assert totals.n_refused == calls.filter(refused).height
    assert totals.quantity("zero-steps") == findings.zero_steps.filter(form="busy_sept").height
    by_vcpu = dict(calls.filter(refused).group_by("tid").len().iter_rows())
    assert {tid: one.n_refused for tid, one in totals.vcpus.items()} == by_vcpu


@pytest.mark.parametrize("pieces", [1, 2, 3, 9])
@pytest.mark.parametrize(
    ("text", "n_episodes"),
    [
        ("enterB*1 enterB*1 enterB*1 enterS*1 enterB*1 enterH*1 enterB*1", 2),
        ("S1 enterB*1 enterB*1 enterX*1 enterB*1 enterB*1", 2),
        ("enterB*1 B1 enterB*1 enterX*1 B1 enterB*1 2/enterB*2", 2),
        ("enterX*1 enterB*1 enterX*1 S1 enterB*1 enterX*1 enterB*1", 2),
        ("enterX*1 enterB*1 enterH*1 enterQ*1 enterB*1", 2),
    ],
)
def test_episodes_are_those_of_the_whole_in_any_number_of_ticks(
    text: str, n_episodes: int, pieces: int
) -> None:
    """Interrupts and faults on a page that is missing are no progress; other exits are."""
    scenario = story(text)
    whole = zero_steps(scenario.seamcalls, scenario.vm_entries, scenario.page_faults)
    totals = watched(text, pieces=pieces)
    assert whole.height == totals.quantity("zero-steps") == n_episodes
    assert totals.n_refused == whole["n_refused"].sum()


def test_failed_entries_are_counted_separately() -> None:
    """The exit reason does not distinguish zero-step mitigation from a TRACK."""
    totals = watched("S1 >F >F >X 2/>F")
    assert {tid: one.n_failed for tid, one in totals.vcpus.items()} == {1: 2, 2: 1}
    assert totals.n_refused == 0
    assert totals.quantity("zero-steps") == 0


def test_busy_answers_are_counted_by_leaf_and_resource() -> None:
    busy = watched("B1 K1 S1 trackD trackP trackS").busy
    assert busy["TDH.MEM.PAGE.AUG", "SEPT tree"] == 1
    assert busy["TDH.MEM.PAGE.AUG", "SEPT entry"] == 1
    assert busy["TDH.MEM.TRACK", "TD epoch"] == 1
    assert busy["TDH.MEM.TRACK", "PREVIOUS_TLB_EPOCH_BUSY"] == 1


def test_quantiles_and_worst_chains() -> None:
    totals = watched("S1 S2 S3 B4 B4 S4 S5")
    leaf = totals.leaves["TDH.MEM.PAGE.AUG"]
    assert (leaf.n_requests, leaf.quantile(0.5), leaf.quantile(0.99)) == (5, 1, 3)
    assert [one["attempts"] for one in totals.worst] == [3]


def test_memory_is_bounded() -> None:
    """Ten thousand threads start and exit."""
    calls = story("B1 S1 enterB*1 enterS*1").seamcalls.sort("seq")
    totals = RunningTotals()
    for n in range(0, 10_000, 500):
        threads = pl.DataFrame({"thread": range(n, n + 500)})
        many = threads.join(calls, how="cross", maintain_order="left_right").with_columns(
            tid=pl.col("thread"), seq=pl.col("seq") + 100 * pl.col("thread")
        )
        totals.take(tick(many.select(calls.columns).cast(calls.schema)))
    assert len(totals.vcpus) <= 4096
    assert len(totals.comms) <= 4096
    assert len(totals.worst) <= 5
    assert totals.n_refused == 10_000
    assert totals.chains.n_in_flight == 0


def test_totals_can_be_written_as_json() -> None:
    result = json.loads(json.dumps(watched("B1 S1 enterB*1").to_dict()))
    assert result["leaves"]["TDH.MEM.PAGE.AUG"]["max_attempts"] == 2
    assert result["in_flight"] == 1


def test_open_chains_of_unique_requests_are_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tdxtrace.watch.totals._MAX_KINDS", 8)
    monkeypatch.setattr("tdxtrace.watch.totals._MAX_STEPS", 60)
    seen = story("B1 B1 Z1 Z1").seamcalls.sort("seq")
    totals = RunningTotals()
    for n in range(12):
        calls = seen.with_columns(
            tid=pl.lit(1000 + n, pl.Int32),
            leaf=pl.when(pl.col("leaf") == 0).then(0).otherwise(2000 + n).cast(pl.UInt16),
            status=pl.col("status") | pl.lit(n << 16, pl.UInt64),
        )
        totals.take(tick(calls))
    assert len(totals.leaves) <= 9
    assert len(totals.busy) <= 9
    assert totals.refusals.latest.height <= 60
    n_calls = sum(leaf.n_calls for leaf in totals.leaves.values())
    assert n_calls == 12 * seen.height
    assert sum(totals.busy.values()) == sum(leaf.n_busy for leaf in totals.leaves.values())
    assert "(other leaves)" in totals.leaves
