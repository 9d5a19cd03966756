"""Chains and busy answers are the same in memory and on disk, for any number of parts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.running import SAMPLES
from support.story import story

import tdxtrace
from tdxtrace import pipeline
from tdxtrace.analysis.call_order import BeginsOfParts, calls_in_order
from tdxtrace.analysis.stored_chains import store_chains
from tdxtrace.ingest.read import ReadOptions, convert
from tdxtrace.tables import store
from tdxtrace.tables import trace as tables
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.store import SortedFile
from tdxtrace.tables.trace import Findings, Trace

_ANSWERS = ("retry_chains", "leaf_stats", "zero_steps", "vm_stats", "vcpu_stats", "busy_answers")

words = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["", "", "2/"]),
    st.sampled_from(["", "sept", "track", "enter", "enter"]),
    st.sampled_from("BBSE"),
    st.sampled_from("12"),
    st.sampled_from(["", "#1", "@1"]),
)
others = st.sampled_from(["lost", "lost@1", "midway", "B~", "_1s"])
stories = st.lists(st.one_of(words, words, words, others), max_size=30).map(" ".join)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Chains are kept on disk, and ranges of three rows are sorted at a time."""
    monkeypatch.setattr(store, "GROUP_ROWS", 3)
    monkeypatch.setattr(store, "_SAMPLED", 1)
    return monkeypatch


def answers(trace: Trace, rows: int) -> Findings:
    """Findings of a trace in memory whose chains go to disk, in parts of so many rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_PART_ROWS", rows)
        patch.setattr(store, "GROUP_ROWS", max(3, rows // 2))
        patch.setattr(store, "_SAMPLED", 1)
        stored = store_chains(trace)
        chains = pipeline._Chains(stored.chains.scan(), stored.scan_answers)
        patch.setattr(pipeline, "_chains", lambda *_: chains)
        found = tdxtrace.analyze(trace)
        found.busy_answers  # noqa: B018 - made while the parts are small
    return found


def assert_same(found: Findings, expected: Findings) -> None:
    for name in _ANSWERS:
        assert getattr(found, name).equals(getattr(expected, name)), name


@settings(max_examples=10, deadline=None)
@given(stories, st.integers(1, 12))
def test_chains_computed_in_parts_are_the_same(text: str, rows: int) -> None:
    """Cuts inside chains, losses and zero-step episodes."""
    trace = story(text).trace
    assert_same(answers(trace, rows), tdxtrace.analyze(trace))


@cache
def sample(name: str) -> Findings:
    return tdxtrace.analyze(tdxtrace.read_trace(SAMPLES / name))


@pytest.mark.parametrize("n", [7, 100])
@pytest.mark.parametrize("name", ["contended.txt", "lost.txt.xz", "zerostep.txt"])
def test_chains_of_a_recording_computed_in_parts_are_the_same(name: str, n: int) -> None:
    trace = tdxtrace.read_trace(SAMPLES / name)
    assert_same(answers(trace, trace.seamcalls.height // n + 1), sample(name))


def test_a_store_is_answered_in_parts_where_memory_is_short(tmp_path: Path) -> None:
    convert([SAMPLES / "contended.txt"], tmp_path / "trace", ReadOptions())
    trace = tdxtrace.read_trace(tmp_path / "trace")
    found = tdxtrace.analyze(trace, memory=1)
    assert_same(found, sample("contended.txt"))
    assert not trace.is_in_memory("seamcalls")
    chains = found.scan("retry_chains").select("n_attempts")
    assert chains.collect()["n_attempts"].max() == 64


def test_a_call_waits_for_those_that_began_before_it() -> None:
    """Recordings have calls in the order of their ends; the first one of thread 2 is long."""
    calls = story("S1 2/(1 S2 S3 2/)S S4").seamcalls.sort("end_ns")
    begins = BeginsOfParts()
    parts = list(begins.record(calls.iter_slices(1)))
    ordered = list(calls_in_order(parts, begins))
    assert pl.concat(ordered)["start_ns"].is_sorted()
    assert [part.height for part in ordered] == [1, 3, 1]


def test_sources_do_not_wait_for_each_other() -> None:
    """Clocks of two inputs differ: the second one's is behind."""
    one = story("S1 S2 S3").seamcalls
    late = one.with_columns(pl.col("start_ns", "end_ns") + 10**12, source=pl.lit(0, pl.UInt16))
    both = pl.concat([late, one.with_columns(source=pl.lit(1, pl.UInt16))])
    begins = BeginsOfParts()
    parts = list(begins.record(both.iter_slices(2)))
    ordered = list(calls_in_order(parts, begins))
    assert [part["source"].to_list() for part in ordered] == [[0, 0], [0], [1], [1, 1]]


def test_rows_of_any_order_are_sorted_a_range_at_a_time(
    in_parts: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chains = sample("contended.txt").retry_chains
    shuffled = chains.sample(fraction=1.0, shuffle=True, seed=1)
    other = shuffled.with_columns(source=pl.lit(1, pl.UInt16))
    file = SortedFile(RETRY_CHAINS, tmp_path / "chains.parquet")
    sizes: list[int] = []

    def counted(rows: pl.DataFrame) -> pl.DataFrame:
        sizes.append(rows.height)
        return rows

    for part in pl.concat([other, shuffled]).head(120).iter_slices(7):
        file.add(part)
    made = file.finish(None, counted)
    expected = pl.concat([other, shuffled]).head(120).sort("source", "first_seq")
    assert made.read().equals(expected)
    assert max(sizes) <= 8
