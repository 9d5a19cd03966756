"""Decoding text tick by tick gives the rows of the whole text in bounded memory."""

from __future__ import annotations

import os
import threading
from functools import cache

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.running import SAMPLES

import tdxtrace
from tdxtrace.errors import FormatError, QueryError
from tdxtrace.watch.text import Pipe, TextTicker
from tdxtrace.watch.ticks import Tick, Ticker

NAME = "contended.txt"


@cache
def text() -> bytes:
    """The beginning of a real trace."""
    return b"".join((SAMPLES / NAME).read_bytes().splitlines(keepends=True)[:3000])


def calls_of(ticks: list[Tick]) -> pl.DataFrame:
    return pl.concat([tick.seamcalls for tick in ticks]).sort("seq")


@cache
def whole() -> pl.DataFrame:
    return calls_of([TextTicker("x").tick(text(), is_last=True)])


def test_calls_equal_those_read_from_a_file(tmp_path: object) -> None:
    path = f"{tmp_path}/trace.txt"
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(text())
    read = tdxtrace.read_trace(path).seamcalls.sort("seq")
    assert whole().equals(read)
    assert whole().height > 1000


@given(st.lists(st.integers(0, 3000), max_size=12))
@settings(max_examples=8)
def test_cutting_into_ticks_changes_no_row(cuts: list[int]) -> None:
    lines = text().splitlines(keepends=True)
    ticker, ticks, begin = TextTicker("x"), [], 0
    for end in [*sorted(cuts), len(lines)]:
        ticks.append(ticker.tick(b"".join(lines[begin:end])))
        begin = end
    ticks.append(ticker.tick(b"", is_last=True))
    assert calls_of(ticks).equals(whole())
    assert sum(tick.n_events for tick in ticks) == len(lines)


def test_a_tick_has_no_rows_of_the_previous_tick() -> None:
    ticker = TextTicker("x")
    first = ticker.tick(text())
    second = ticker.tick(b"")
    assert first.seamcalls.height > 0
    assert first.comms
    assert (second.seamcalls.height, second.n_events, second.comms) == (0, 0, {})
    assert second.losses.is_empty()


def test_an_open_call_is_dropped_after_300_s() -> None:
    def line(when: int, event: str, args: str) -> bytes:
        return f"  vcpu-7  [000] .....  {when}.000000: {event}: {args}\n".encode()

    ticker = TextTicker("x")
    entry = line(1000, "tdh_mem_track_entry", "(tdh_mem_track+0x0/0x70) td=0x1")
    ticker.tick(entry)
    ticker.tick(line(1400, "sched_switch", "x"))
    ticker.tick(line(1400, "tdh_mem_page_aug_entry", "(tdh_mem_page_aug+0x0/0x70) td=0x1"))
    last = ticker.tick(b"", is_last=True)
    assert last.seamcalls["leaf"].to_list() == [6]


def test_losses_are_those_of_the_tick() -> None:
    ticker = TextTicker("x")
    ticker.tick(text())
    lost = ticker.tick(b"CPU:1 [LOST 17 EVENTS]\n")
    assert lost.losses["n_events"].to_list() == [17]
    assert ticker.tick(b"").losses.is_empty()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "ended before any event"),
        (b"hello\n", "is not a trace"),
        (b"\0\1" * 99, "is not a trace"),
    ],
)
def test_input_that_is_no_trace_is_rejected(data: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        TextTicker("x").tick(data, is_last=True)


def test_a_malformed_mapping_is_rejected() -> None:
    with pytest.raises(QueryError):
        Ticker(["nonsense"])


def test_a_pipe_returns_complete_lines_and_the_rest_at_the_end() -> None:
    begin, end = os.pipe()
    pipe = Pipe(begin)
    pipe.start()
    got = b""
    with os.fdopen(end, "wb", buffering=0) as file:
        file.write(b"one\ntw")
        while not got:
            got = pipe.take()
        assert got == b"one\n"
        assert not pipe.has_ended
        file.write(b"o\nthree")
    while threading.active_count() > 1 and not pipe.has_ended:
        got += pipe.take()
    got += pipe.take()
    assert got == b"one\ntwo\nthree\n"
    os.close(begin)


def test_losses_of_a_silent_cpu_do_not_accumulate() -> None:
    ticker = TextTicker("x")
    ticker.tick(text())
    for n in range(5):
        made = ticker.tick(b"CPU:%d [LOST 7 EVENTS]\n" % (200 + n))
        assert made.losses.height == 1
        assert not ticker._ticker.stats.has_open_gaps
