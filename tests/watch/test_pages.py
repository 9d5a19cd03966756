"""Decoding of ring-buffer pages tick by tick, also of threads that migrate between CPUs."""

from __future__ import annotations

import polars as pl
from support.recorder import FORMATS, Machine

from tdxtrace.watch.pages import PageTicker
from tdxtrace.watch.ticks import Tick

MACHINE = Machine()
BUSY = 0x8000_0200_0000_0092


def ticker() -> PageTicker:
    formats = [(system, text) for system, texts in FORMATS.items() for text in texts]
    return PageTicker(MACHINE.header_page.decode(), formats, MACHINE.page_size)


def entry(when: int, gpa: int = 0x1000) -> bytes:
    return MACHINE.page(when, MACHINE.event(0, MACHINE.enter(7, gpa)))


def leave(when: int, ret: int = 0) -> bytes:
    return MACHINE.page(when, MACHINE.event(0, MACHINE.leave(7, ret)))


def calls(*ticks: Tick) -> list[tuple[int | None, int | None, int | None]]:
    rows = pl.concat([tick.seamcalls for tick in ticks])
    return list(rows.select("start_ns", "end_ns", "gpa").iter_rows())


def test_a_call_within_one_tick() -> None:
    made = ticker().tick({0: entry(100) + leave(200)}, 300, {7: "CPU 0/KVM"})
    assert calls(made) == [(100, 200, 0x1000)]
    assert made.comms == {7: "CPU 0/KVM"}
    assert made.n_events == 2


def test_a_call_over_two_ticks() -> None:
    one = ticker()
    first = one.tick({0: entry(100)}, 150, {})
    second = one.tick({0: leave(200)}, 250, {})
    assert (calls(first), calls(second)) == ([], [(100, 200, 0x1000)])


def test_a_thread_that_migrated_to_a_cpu_read_later() -> None:
    """Reading started at 50: CPU 0 was read before the entry, CPU 1 after the return."""
    one = ticker()
    first = one.tick({0: b"", 1: leave(200)}, 50, {})
    assert calls(first) == []
    second = one.tick({0: entry(100), 1: b""}, 300, {})
    assert calls(second) == [(100, 200, 0x1000)]


def test_the_last_tick_returns_all_events() -> None:
    one = ticker()
    made = one.tick({0: entry(100) + leave(200)}, 50, {}, is_last=True)
    assert calls(made) == [(100, 200, 0x1000)]


def test_a_call_without_return_is_in_the_last_tick() -> None:
    one = ticker()
    assert calls(one.tick({0: entry(100)}, 300, {})) == []
    assert calls(one.tick({}, 400, {}, is_last=True)) == [(100, None, 0x1000)]


def test_losses_are_those_of_the_tick() -> None:
    one = ticker()
    page = MACHINE.page(100, MACHINE.event(0, MACHINE.enter(7, 0x1000)), lost=5)
    first = one.tick({0: page}, 300, {})
    assert first.losses.filter(pl.col("kind") == "lost_events")["n_events"].to_list() == [5]
    assert one.tick({0: leave(400)}, 500, {}).losses.is_empty()
