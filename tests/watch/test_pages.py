"""Pages of a running instance: a thread that moves between CPUs is followed."""

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


def back(when: int, ret: int = 0) -> bytes:
    return MACHINE.page(when, MACHINE.event(0, MACHINE.leave(7, ret)))


def calls(*ticks: Tick) -> list[tuple[int | None, int | None, int | None]]:
    rows = pl.concat([tick.seamcalls for tick in ticks])
    return list(rows.select("start_ns", "end_ns", "gpa").iter_rows())


def test_a_call_within_a_look() -> None:
    made = ticker().tick({0: entry(100) + back(200)}, 300, {7: "CPU 0/KVM"})
    assert calls(made) == [(100, 200, 0x1000)]
    assert made.comms == {7: "CPU 0/KVM"}
    assert made.n_events == 2


def test_a_call_over_two_looks() -> None:
    one = ticker()
    first = one.tick({0: entry(100)}, 150, {})
    second = one.tick({0: back(200)}, 250, {})
    assert (calls(first), calls(second)) == ([], [(100, 200, 0x1000)])


def test_a_thread_that_moved_to_a_cpu_that_was_read_later() -> None:
    """The look began at 50: CPU 0 was read before its entry came, CPU 1 after the return."""
    one = ticker()
    first = one.tick({0: b"", 1: back(200)}, 50, {})
    assert calls(first) == []
    second = one.tick({0: entry(100), 1: b""}, 300, {})
    assert calls(second) == [(100, 200, 0x1000)]


def test_the_last_look_holds_nothing_back() -> None:
    one = ticker()
    made = one.tick({0: entry(100) + back(200)}, 50, {}, is_last=True)
    assert calls(made) == [(100, 200, 0x1000)]


def test_a_call_that_has_not_returned_comes_out_at_the_end() -> None:
    one = ticker()
    assert calls(one.tick({0: entry(100)}, 300, {})) == []
    assert calls(one.tick({}, 400, {}, is_last=True)) == [(100, None, 0x1000)]


def test_losses_are_those_of_the_look() -> None:
    one = ticker()
    page = MACHINE.page(100, MACHINE.event(0, MACHINE.enter(7, 0x1000)), lost=5)
    first = one.tick({0: page}, 300, {})
    assert first.losses.filter(pl.col("kind") == "lost_events")["n_events"].to_list() == [5]
    assert one.tick({0: back(400)}, 500, {}).losses.is_empty()
