"""What is kept while watching: it adds up to what the whole says, and does not grow."""

from __future__ import annotations

import json

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st
from support.running import SAMPLES
from support.story import story

import tdxtrace
from tdxtrace.analysis.thresholds import QUANTITIES as OF_FINDINGS
from tdxtrace.tables.events import LOSSES, VM_ENTRIES
from tdxtrace.watch.running import QUANTITIES, Running
from tdxtrace.watch.ticks import Tick


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


def watched(text: str, *, pieces: int = 1) -> Running:
    """A story, told in looks of so many calls."""
    told = story(text)
    calls = told.seamcalls.sort("seq")
    running = Running()
    size = max(1, -(-calls.height // pieces))
    for begin in range(0, max(1, calls.height), size):
        running.take(tick(calls[begin : begin + size], told.vm_entries if not begin else None))
    return running


def test_the_same_names_as_thresholds_of_files() -> None:
    assert list(QUANTITIES) == list(OF_FINDINGS)


@given(st.integers(1, 12))
@settings(max_examples=4)
def test_sums_are_those_of_the_whole(pieces: int) -> None:
    trace = tdxtrace.read_trace(SAMPLES / "zerostep.txt")
    findings = tdxtrace.analyze(trace)
    calls = trace.seamcalls.sort("seq")
    running, size = Running(), -(-calls.height // pieces)
    for begin in range(0, calls.height, size):
        running.take(tick(calls[begin : begin + size]))
    stats = findings.leaf_stats
    assert sum(one.n_calls for one in running.leaves.values()) == calls.height
    assert running.quantity("busy") == stats["n_busy"].sum()
    assert running.quantity("max-attempts") == stats["max_attempts"].max()
    refused = (pl.col("leaf") == 0) & (pl.col("status") == 0x8000020000000092)
    assert running.n_refused == calls.filter(refused).height
    by_vcpu = dict(calls.filter(refused).group_by("tid").len().iter_rows())
    assert {tid: one.n_refused for tid, one in running.vcpus.items()} == by_vcpu


def test_refusals_in_a_row_are_one_episode_in_one_look_or_more() -> None:
    text = "enterB*1 enterB*1 enterB*1 enterS*1 enterB*1 enterS*1"
    for pieces in (1, 2, 3, 6):
        running = watched(text, pieces=pieces)
        (one,) = running.vcpus.values()
        assert (one.n_refused, one.episodes) == (4, 2)
        assert running.quantity("zero-steps") == 2


def test_failed_entries_are_counted_apart() -> None:
    """KVM's word for them does not tell zero-step mitigation from a TRACK."""
    running = watched("S1 >F >F >X 2/>F")
    assert {tid: one.n_failed for tid, one in running.vcpus.items()} == {1: 2, 2: 1}
    assert running.n_refused == 0
    assert running.quantity("zero-steps") == 0


def test_causes_by_leaf() -> None:
    busy = watched("B1 K1 S1 trackD trackS").busy
    assert busy["TDH.MEM.PAGE.AUG", "SEPT tree"] == 1
    assert busy["TDH.MEM.PAGE.AUG", "SEPT entry"] == 1
    assert busy["TDH.MEM.TRACK", "TD epoch"] == 1


def test_quantiles_and_the_worst() -> None:
    running = watched("S1 S2 S3 B4 B4 S4 S5")
    leaf = running.leaves["TDH.MEM.PAGE.AUG"]
    assert (leaf.n_requests, leaf.quantile(0.5), leaf.quantile(0.99)) == (5, 1, 3)
    assert [one["attempts"] for one in running.worst] == [3]


def test_what_is_kept_is_bounded() -> None:
    """Ten thousand threads come and go."""
    calls = story("B1 S1 enterB*1 enterS*1").seamcalls.sort("seq")
    running = Running()
    for n in range(0, 10_000, 500):
        looks = [
            calls.with_columns(tid=pl.lit(n + k, pl.Int32), seq=pl.col("seq") + 100 * (n + k))
            for k in range(500)
        ]
        running.take(tick(pl.concat(looks)))
    assert len(running.vcpus) <= 4096
    assert len(running.comms) <= 4096
    assert len(running.worst) <= 5
    assert running.n_refused == 10_000
    assert running.chains.n_in_flight == 0


def test_it_is_plain_data() -> None:
    told = json.loads(json.dumps(watched("B1 S1 enterB*1").to_dict()))
    assert told["leaves"]["TDH.MEM.PAGE.AUG"]["max_attempts"] == 2
    assert told["in_flight"] == 1
