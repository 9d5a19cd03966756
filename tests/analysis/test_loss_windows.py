"""Windows of loss, against a test of every pair."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.analysis.threads import NO_CPU, LossWindows, start_windows
from tdxtrace.tables.events import LOSSES

Window = tuple[int | None, int | None, int | None]


def losses_of(windows: list[Window], kind: str = "lost_events", source: int = 0) -> pl.DataFrame:
    rows = [
        {
            "source": source,
            "kind": kind,
            "severity": "data_loss",
            "cpu": cpu,
            "start_ns": start,
            "end_ns": end,
            "n_lines": 1,
            "detail": "",
            "advice": "",
        }
        for cpu, start, end in windows
    ]
    return pl.DataFrame(rows, schema=LOSSES.schema)


def hit(windows: LossWindows, cpu: int, start: int, end: int) -> bool:
    found = windows.overlap(np.array([cpu]), np.array([start]), np.array([end]))
    return bool(found[0])


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 10, False),
        (0, 11, True),
        (12, 15, True),
        (19, 30, True),
        (20, 30, False),
        (0, 100, True),
        (15, 15, False),
    ],
)
def test_an_interval_overlaps_a_window_if_they_share_time(
    start: int, end: int, expected: bool
) -> None:
    assert hit(LossWindows(losses_of([(1, 10, 20)]), 0), 1, start, end) is expected


@pytest.mark.parametrize(
    ("of_window", "of_interval", "expected"),
    [(1, 1, True), (1, 2, False), (None, 2, True), (1, NO_CPU, True), (None, NO_CPU, True)],
)
def test_a_window_applies_to_its_cpu_or_to_all(
    of_window: int | None, of_interval: int, expected: bool
) -> None:
    windows = LossWindows(losses_of([(of_window, 10, 20)]), 0)
    assert hit(windows, of_interval, 12, 13) is expected


def test_a_window_without_start_or_end_reaches_to_the_traces_edge() -> None:
    assert hit(LossWindows(losses_of([(1, None, 20)]), 0), 1, -(10**18), -(10**17))
    assert hit(LossWindows(losses_of([(1, 10, None)]), 0), 1, 10**17, 10**18)


def test_a_loss_without_any_time_is_no_window() -> None:
    windows = LossWindows(losses_of([(1, None, None)]), 0)
    assert not windows.any
    assert not hit(windows, 1, -(10**18), 10**18)


@pytest.mark.parametrize(
    "windows",
    [
        [(1, 0, 100), (1, 10, 20)],
        [(1, 0, 50), (1, 20, 100), (1, 60, 70)],
        [(1, None, None), (1, 10, 20), (1, 0, 100), (1, 15, 16)],
        [(1, None, 100), (1, 10, 20)],
        [(1, 10, None), (1, 15, 20)],
    ],
)
def test_a_window_within_another_does_not_shorten_it(windows: list[Window]) -> None:
    found = LossWindows(losses_of(windows), 0)
    assert hit(found, 1, 80, 90)
    assert hit(found, 1, 30, 40)


@pytest.mark.parametrize("kind", ["lost_events", "overwritten", "buffer_full"])
def test_kinds_that_hide_events_are_windows(kind: str) -> None:
    losses = losses_of([(1, 10, 20)], kind)
    assert LossWindows(losses, 0).any
    assert not start_windows(losses, 0).any


@pytest.mark.parametrize("kind", ["noise", "unparsed", "callchain", "merged", "unpaired_entry"])
def test_other_kinds_are_no_windows(kind: str) -> None:
    assert not LossWindows(losses_of([(1, 10, 20)], kind), 0).any


def test_a_trace_that_started_midway_has_a_start_window_only() -> None:
    losses = losses_of([(None, None, 20)], "started_midway")
    assert start_windows(losses, 0).any
    assert not LossWindows(losses, 0).any


def test_windows_of_another_source_do_not_count() -> None:
    assert not LossWindows(losses_of([(1, 10, 20)], source=1), 0).any


times = st.integers(-5, 25)
cpus = st.sampled_from([None, 0, 1])
spans = st.tuples(times, times).filter(lambda pair: pair[0] < pair[1])
open_spans = st.one_of(
    spans, st.tuples(st.none(), times), st.tuples(times, st.none()), st.just((None, None))
)


def covers(window: Window, cpu: int, start: int, end: int) -> bool:
    of_cpu, begins, ends = window
    return (
        (of_cpu is None or cpu in (of_cpu, NO_CPU))
        and (begins, ends) != (None, None)
        and (begins is None or begins < end)
        and (ends is None or ends > start)
    )


@given(
    st.lists(st.tuples(cpus, open_spans).map(lambda w: (w[0], *w[1])), max_size=8),
    st.lists(st.tuples(st.sampled_from([NO_CPU, 0, 1, 2]), spans), max_size=12),
)
def test_the_result_equals_that_of_testing_every_pair(
    windows: list[Window], asked: list[tuple[int, tuple[int, int]]]
) -> None:
    columns = zip(*((cpu, *span) for cpu, span in asked), strict=True) if asked else ((), (), ())
    found = LossWindows(losses_of(windows), 0).overlap(*(np.array(c, np.int64) for c in columns))
    assert found.tolist() == [any(covers(w, cpu, *span) for w in windows) for cpu, span in asked]
