"""What became of every line that is no row."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from tdxtrace.ingest.raw import UNKNOWN
from tdxtrace.ingest.tally import Tally
from tdxtrace.tables.events import LOSS_KINDS, LOSSES, THREADS


def see(tally: Tally, *heard: tuple[int, int]) -> None:
    """Let CPUs be heard of, each at a time."""
    cpus = np.array([cpu for cpu, _ in heard], np.int32)
    tally.see(cpus, np.array([ns for _, ns in heard], np.int64))


def rows(tally: Tally, *names: str) -> list[tuple[object, ...]]:
    return LOSSES.check(tally.losses(0)).select(names).rows()


def test_lines_of_one_kind_and_name_are_one_row() -> None:
    tally = Tally()
    tally.count("noise", "sched_switch", 3)
    tally.count("noise", "sched_switch", 9, 5)
    tally.count("noise", "sys_enter", 4)
    assert rows(tally, "kind", "detail", "line_no", "n_events", "n_lines", "severity") == [
        ("noise", "sched_switch", 3, 6, 6, "info"),
        ("noise", "sys_enter", 4, 1, 1, "info"),
    ]


def test_of_samples_the_first_is_shown() -> None:
    tally = Tally()
    tally.count_sample("unparsed", "what is this", 3)
    tally.count_sample("unparsed", "and this", 9)
    assert rows(tally, "detail", "line_no", "n_lines") == [("what is this", 3, 2)]


def test_a_note_stands_for_no_line() -> None:
    tally = Tally()
    tally.note("overwritten", 7, "x")
    tally.note("overwritten", 0, "nothing")
    tally.note("buffer_full", None, "CPU 1", cpu=1, start_ns=5)
    assert rows(tally, "kind", "n_events", "n_lines", "cpu", "start_ns") == [
        ("overwritten", 7, 0, None, None),
        ("buffer_full", None, 0, 1, 5),
    ]


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_every_kind_has_advice(kind: str) -> None:
    tally = Tally()
    tally.count(kind, "some_event", 1)
    (advice,) = tally.losses(0)["advice"]
    assert advice
    assert "{name}" not in advice


def test_the_advice_for_a_probe_names_it() -> None:
    tally = Tally()
    tally.count("unmapped", "p_0x4240\x1b", 1)
    assert "--map p_0x4240\\x1b=" in tally.losses(0)["advice"][0]


# Gaps.


def gaps(tally: Tally) -> list[tuple[object, ...]]:
    return rows(tally, "cpu", "start_ns", "end_ns", "n_events", "line_no", "n_lines")


def test_a_gap_lies_between_the_cpus_last_event_and_its_next() -> None:
    tally = Tally()
    see(tally, (1, 10), (2, 15), (1, 20))
    tally.lost(1, 420, 4)
    see(tally, (2, 30), (1, 40), (1, 50))
    assert gaps(tally) == [(1, 20, 40, 420, 4, 1)]


def test_a_gap_is_closed_by_a_later_block_if_need_be() -> None:
    tally = Tally()
    see(tally, (1, 10))
    tally.lost(1, None, 2)
    see(tally, (2, 30))
    see(tally, (2, 35), (1, 44))
    see(tally, (1, 50))
    assert gaps(tally) == [(1, 10, 44, None, 2, 1)]


def test_a_gap_may_have_no_event_on_one_side() -> None:
    tally = Tally()
    tally.lost(1, 5, 1)
    see(tally, (1, 10), (2, 20))
    tally.lost(2, 6, 4)
    assert gaps(tally) == [(1, None, 10, 5, 1, 1), (2, 20, None, 6, 4, 1)]


def test_two_gaps_in_a_row_end_together() -> None:
    tally = Tally()
    see(tally, (1, 10))
    tally.lost(1, 5, 2)
    tally.lost(1, 6, 3)
    see(tally, (1, 30))
    assert gaps(tally) == [(1, 10, 30, 5, 2, 1), (1, 10, 30, 6, 3, 1)]


def test_a_gap_whose_cpu_is_unknown_lies_between_any_events() -> None:
    tally = Tally()
    see(tally, (1, 10), (2, 20))
    tally.lost(UNKNOWN, 5, 3)
    see(tally, (2, 30), (1, 40))
    assert gaps(tally) == [(None, 20, 30, 5, 3, 1)]


def test_times_out_of_order_widen_a_gap() -> None:
    tally = Tally()
    see(tally, (1, 25), (1, 20))
    tally.lost(1, 5, 3)
    assert gaps(tally) == [(1, 25, None, 5, 3, 1)]


@pytest.mark.parametrize("cpu", [8191, 8192, 65_535, 65_536, 99_999, 2**31 - 1])
def test_no_cpu_number_is_too_large(cpu: int) -> None:
    tally = Tally()
    see(tally, (0, 5))
    tally.lost(cpu, 5, 1)
    see(tally, (cpu, 10))
    tally.lost(cpu, 5, 3)
    found = LOSSES.check(tally.losses(0))
    assert found["n_lines"].to_list() == [1, 1]
    assert found["end_ns"].to_list() == [10, None]


@pytest.mark.parametrize("n", [2**63, 2**64 - 1])
def test_no_number_of_lost_events_is_too_large(n: int) -> None:
    tally = Tally()
    tally.lost(1, n, 1)
    assert LOSSES.check(tally.losses(0))["n_lines"].to_list() == [1]


# Times and CPUs.


def test_the_span_is_that_of_all_cpus() -> None:
    tally = Tally()
    assert (tally.span(), tally.cpus()) == ((None, None), [])
    see(tally, (3, 20), (1, 30))
    see(tally, (1, 10), (3, 25))
    assert (tally.span(), tally.cpus()) == ((10, 30), [1, 3])


def test_nothing_heard_changes_nothing() -> None:
    tally = Tally()
    see(tally)
    assert tally.span() == (None, None)


def test_a_cpu_that_was_not_printed_counts_for_the_span_only() -> None:
    tally = Tally()
    see(tally, (UNKNOWN, 10))
    assert (tally.span(), tally.cpus()) == ((10, 10), [])


@pytest.mark.parametrize("seed", range(5))
def test_seeing_in_blocks_or_at_once_is_the_same(seed: int) -> None:
    luck = np.random.default_rng(seed)
    cpus = luck.integers(-1, 5, 200).astype(np.int32)
    times = np.sort(luck.integers(0, 10**9, 200))
    times[:40] = times[:40][::-1]
    whole, parts = Tally(), Tally()
    whole.see(cpus, times)
    for at in range(0, 200, 7):
        parts.see(cpus[at : at + 7], times[at : at + 7])
    assert whole.span() == parts.span() == (times.min(), times.max())
    for cpu in whole.cpus():
        mine = times[cpus == cpu]
        assert whole.first_ns[cpu] == parts.first_ns[cpu] == mine.min()
        assert whole.last_ns[cpu] == parts.last_ns[cpu] == mine.max()


# Threads.


def test_threads_are_listed_with_every_name_and_their_process() -> None:
    tally = Tally()
    tally.threads = {(8, "b"): UNKNOWN, (7, "CPU 0/KVM"): 40, (7, "a"): 40, (UNKNOWN, "x"): 1}
    table = THREADS.check(tally.thread_table(2))
    assert table.rows() == [(2, 7, 40, "CPU 0/KVM"), (2, 7, 40, "a"), (2, 8, None, "b")]


def test_an_empty_tally_is_empty_tables() -> None:
    assert Tally().losses(0).equals(LOSSES.empty())
    assert Tally().thread_table(0).equals(THREADS.empty())
    assert Tally().losses(0).filter(pl.col("kind") == "noise").is_empty()
