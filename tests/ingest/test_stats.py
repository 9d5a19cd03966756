"""Counts and losses of lines without rows."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from tdxtrace.ingest.batch import UNKNOWN
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.events import LOSS_KINDS, LOSSES, THREADS


def see(stats: SourceStats, *heard: tuple[int, int]) -> None:
    """Let CPUs be heard of, each at a time."""
    cpus = np.array([cpu for cpu, _ in heard], np.int32)
    stats.observe_timestamps(cpus, np.array([ns for _, ns in heard], np.int64))


def rows(stats: SourceStats, *names: str) -> list[tuple[object, ...]]:
    return LOSSES.check(stats.losses(0)).select(names).rows()


def test_lines_of_one_kind_and_name_are_one_row() -> None:
    stats = SourceStats()
    stats.count("noise", "sched_switch", 3)
    stats.count("noise", "sched_switch", 9, 5)
    stats.count("noise", "sys_enter", 4)
    assert rows(stats, "kind", "detail", "line_no", "n_events", "n_lines", "severity") == [
        ("noise", "sched_switch", 3, 6, 6, "info"),
        ("noise", "sys_enter", 4, 1, 1, "info"),
    ]


def test_of_samples_the_first_is_shown() -> None:
    stats = SourceStats()
    stats.count_sample("unparsed", "what is this", 3)
    stats.count_sample("unparsed", "and this", 9)
    assert rows(stats, "detail", "line_no", "n_lines") == [("what is this", 3, 2)]


def test_a_note_stands_for_no_line() -> None:
    stats = SourceStats()
    stats.record_loss("overwritten", 7, "x")
    stats.record_loss("overwritten", 0, "nothing")
    stats.record_loss("buffer_full", None, "CPU 1", cpu=1, start_ns=5)
    assert rows(stats, "kind", "n_events", "n_lines", "cpu", "start_ns") == [
        ("overwritten", 7, 0, None, None),
        ("buffer_full", None, 0, 1, 5),
    ]


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_every_kind_has_advice(kind: str) -> None:
    stats = SourceStats()
    stats.count(kind, "some_event", 1)
    (advice,) = stats.losses(0)["advice"]
    assert advice
    assert "{name}" not in advice


def test_the_advice_for_a_probe_names_it() -> None:
    stats = SourceStats()
    stats.count("unmapped", "p_0x4240\x1b", 1)
    assert "--map p_0x4240\\x1b=" in stats.losses(0)["advice"][0]


def test_losses_are_in_order_of_their_first_line_and_what_the_decoder_counts_is_last() -> None:
    stats = SourceStats()
    stats.count("merged", "", None, 7)
    stats.count("noise", "sys_enter", 4)
    stats.count("noise", "sched_switch", 3)
    assert rows(stats, "kind", "line_no") == [("noise", 3), ("noise", 4), ("merged", None)]


# Gaps.


def gaps(stats: SourceStats) -> list[tuple[object, ...]]:
    return rows(stats, "cpu", "start_ns", "end_ns", "n_events", "line_no", "n_lines")


def test_a_gap_lies_between_the_cpus_last_event_and_its_next() -> None:
    stats = SourceStats()
    see(stats, (1, 10), (2, 15), (1, 20))
    stats.record_lost_events(1, 420, 4)
    see(stats, (2, 30), (1, 40), (1, 50))
    assert gaps(stats) == [(1, 20, 40, 420, 4, 1)]


def test_a_gap_is_closed_by_a_later_block_if_need_be() -> None:
    stats = SourceStats()
    see(stats, (1, 10))
    stats.record_lost_events(1, None, 2)
    see(stats, (2, 30))
    see(stats, (2, 35), (1, 44))
    see(stats, (1, 50))
    assert gaps(stats) == [(1, 10, 44, None, 2, 1)]


def test_a_gap_may_have_no_event_on_one_side() -> None:
    stats = SourceStats()
    stats.record_lost_events(1, 5, 1)
    see(stats, (1, 10), (2, 20))
    stats.record_lost_events(2, 6, 4)
    assert gaps(stats) == [(1, None, 10, 5, 1, 1), (2, 20, None, 6, 4, 1)]


def test_two_gaps_in_a_row_end_together() -> None:
    stats = SourceStats()
    see(stats, (1, 10))
    stats.record_lost_events(1, 5, 2)
    stats.record_lost_events(1, 6, 3)
    see(stats, (1, 30))
    assert gaps(stats) == [(1, 10, 30, 5, 2, 1), (1, 10, 30, 6, 3, 1)]


def test_a_gap_whose_cpu_is_unknown_lies_between_any_events() -> None:
    stats = SourceStats()
    see(stats, (1, 10), (2, 20))
    stats.record_lost_events(UNKNOWN, 5, 3)
    see(stats, (2, 30), (1, 40))
    assert gaps(stats) == [(None, 20, 30, 5, 3, 1)]


def test_times_out_of_order_widen_a_gap() -> None:
    stats = SourceStats()
    see(stats, (1, 25), (1, 20))
    stats.record_lost_events(1, 5, 3)
    assert gaps(stats) == [(1, 25, None, 5, 3, 1)]


@pytest.mark.parametrize("cpu", [8191, 8192, 65_535, 65_536, 99_999, 2**31 - 1])
def test_no_cpu_number_is_too_large(cpu: int) -> None:
    stats = SourceStats()
    see(stats, (0, 5))
    stats.record_lost_events(cpu, 5, 1)
    see(stats, (cpu, 10))
    stats.record_lost_events(cpu, 5, 3)
    found = LOSSES.check(stats.losses(0))
    assert found["n_lines"].to_list() == [1, 1]
    assert found["end_ns"].to_list() == [10, None]


@pytest.mark.parametrize("n", [2**63, 2**64 - 1])
def test_no_number_of_lost_events_is_too_large(n: int) -> None:
    stats = SourceStats()
    stats.record_lost_events(1, n, 1)
    assert LOSSES.check(stats.losses(0))["n_lines"].to_list() == [1]


# Times and CPUs.


def test_the_span_is_that_of_all_cpus() -> None:
    stats = SourceStats()
    assert (stats.span(), stats.cpus()) == ((None, None), [])
    see(stats, (3, 20), (1, 30))
    see(stats, (1, 10), (3, 25))
    assert (stats.span(), stats.cpus()) == ((10, 30), [1, 3])


def test_no_timestamps_change_nothing() -> None:
    stats = SourceStats()
    see(stats)
    assert stats.span() == (None, None)


def test_a_cpu_that_was_not_printed_counts_for_the_span_only() -> None:
    stats = SourceStats()
    see(stats, (UNKNOWN, 10))
    assert (stats.span(), stats.cpus()) == ((10, 10), [])


@pytest.mark.parametrize("seed", range(5))
def test_timestamps_may_come_in_blocks_or_at_once(seed: int) -> None:
    luck = np.random.default_rng(seed)
    cpus = luck.integers(-1, 5, 200).astype(np.int32)
    times = np.sort(luck.integers(0, 10**9, 200))
    times[:40] = times[:40][::-1]
    whole, parts = SourceStats(), SourceStats()
    whole.observe_timestamps(cpus, times)
    for at in range(0, 200, 7):
        parts.observe_timestamps(cpus[at : at + 7], times[at : at + 7])
    assert whole.span() == parts.span() == (times.min(), times.max())
    for cpu in whole.cpus():
        mine = times[cpus == cpu]
        assert whole.first_ns[cpu] == parts.first_ns[cpu] == mine.min()
        assert whole.last_ns[cpu] == parts.last_ns[cpu] == mine.max()


# Threads.


def test_threads_are_listed_with_every_name_and_their_process() -> None:
    stats = SourceStats()
    stats.threads = {(8, "b"): UNKNOWN, (7, "CPU 0/KVM"): 40, (7, "a"): 40, (UNKNOWN, "x"): 1}
    table = THREADS.check(stats.thread_table(2))
    assert table.rows() == [(2, 7, 40, "CPU 0/KVM"), (2, 7, 40, "a"), (2, 8, None, "b")]


def test_an_empty_stats_is_empty_tables() -> None:
    assert SourceStats().losses(0).equals(LOSSES.empty())
    assert SourceStats().thread_table(0).equals(THREADS.empty())
    assert SourceStats().losses(0).filter(pl.col("kind") == "noise").is_empty()
