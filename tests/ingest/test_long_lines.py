"""Lines that no kernel writes: blanks, repeated words, longer than the kernel's limit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import pytest
from support.texts import ONE_CALL, aug, aug_ret, is_accounted_for, line, lost, read_text
from support.ways import same

from tdxtrace.ingest.source import KEPT_LINE_BYTES, MAX_LINE_BYTES
from tdxtrace.ingest.stats import SourceStats

GRAPH = (
    "# tracer: function_graph\n 1.000001 |  1) vcpu-7 | 2.500 us | tdh_mem_track{}; /* ret=0x0 */\n"
)
KERNEL = "[    1.500000] tdx: module initialized\n"
MOST_S = 2.0
"""Of this process, for what takes some milliseconds; minutes if it takes the square of it."""


@pytest.fixture(scope="module", autouse=True)
def compiled_before() -> None:
    """Compile the loop over lines, as a large text does where nothing is kept: in seconds."""
    read_text(ONE_CALL * 10_000)


def at_once(text: str) -> tuple[dict[str, int], int]:
    """What is lost of a text, and its calls and messages."""
    begun = time.process_time()
    trace = read_text(text)
    took = time.process_time() - begun
    assert is_accounted_for(trace)
    assert took < MOST_S
    return lost(trace), trace.seamcalls.height + trace.kernel_messages.height


@pytest.mark.parametrize(
    "repeated", [" ", "\t", "-1 ", "x-1 [000] ", "a:", "0 ", "0 1 2 ", "é", "("]
)
@pytest.mark.parametrize("text", [ONE_CALL, GRAPH.format("()")])
def test_a_line_that_repeats_something_is_unparsed_at_once(repeated: str, text: str) -> None:
    for n_bytes in (3_000, MAX_LINE_BYTES - 8, 1_000_000):
        odd = repeated * (n_bytes // len(repeated)) + "x\n"
        assert at_once(text + odd) == ({"unparsed": 1}, 1)


def test_blanks_behind_the_cpu_of_a_graph_take_no_time() -> None:
    assert at_once(GRAPH.format("()") + " 1)" + " " * 8_000 + "x\n") == ({"unparsed": 1}, 1)


def test_what_a_user_logs_takes_no_time() -> None:
    for words in (
        "tdx: module ",
        "tdx: ",
        "TDX module: ",
        "tdh_mng_",
        "WARNING: a:1 at b, CPU#1: ",
    ):
        text = "Jan  1 00:00:01 host {}: " + words * (48_000 // len(words)) + "\n"
        assert at_once(KERNEL + text.format("me[12]")) == ({"noise": 1}, 1)
        assert at_once(KERNEL + text.format("kernel")) == ({"overlong": 1}, 1)


def long_string(n_bytes: int) -> str:
    return ' s="' + "x" * n_bytes + '"'


@pytest.mark.parametrize(
    "make",
    [
        lambda rest: (
            aug("1.000001", "td=0x7d000 gpa=0x80000000 level=0" + rest) + aug_ret("1.000003")
        ),
        lambda rest: GRAPH.format("(td=0x1" + rest + ")"),
        lambda rest: KERNEL.replace("\n", rest + "\n"),
        lambda rest: (
            json.dumps({"MESSAGE": "tdx: module initialized" + rest, "_TRANSPORT": "kernel"}) + "\n"
        ),
    ],
    ids=["ftrace", "function-graph", "kernel-log", "journal-json"],
)
def test_an_event_on_a_line_that_is_too_long_is_lost_and_told(make: Callable[[str], str]) -> None:
    short = make(long_string(5))
    to_spare = MAX_LINE_BYTES - max(map(len, short.splitlines())) - 64
    assert at_once(make(long_string(to_spare))) == ({}, 1)
    for n_bytes in (MAX_LINE_BYTES, 10 * MAX_LINE_BYTES, 3_000_000):
        kinds, _ = at_once(short * 3 + make(long_string(n_bytes)))
        # What a journal's line is, is not known where it is cut.
        is_cut = n_bytes > KEPT_LINE_BYTES and "MESSAGE" in short
        kinds.pop("unpaired_return", 0)
        assert kinds == {"unparsed" if is_cut else "overlong": 1}


def test_other_events_on_lines_that_are_too_long_are_noise() -> None:
    text = line("1.000002", "sched_switch: prev_comm=" + "x" * MAX_LINE_BYTES)
    assert at_once(ONE_CALL + text) == ({"noise": 1}, 1)
    entry = json.dumps({"MESSAGE": "x" * MAX_LINE_BYTES, "_TRANSPORT": "syslog"})
    own = json.dumps({"MESSAGE": "tdx: module initialized", "_TRANSPORT": "kernel"})
    assert at_once(f"{own}\n{entry}\n") == ({"noise": 1}, 1)


def test_long_lines_are_the_same_in_every_way() -> None:
    lengths = (10, MAX_LINE_BYTES - 200, MAX_LINE_BYTES, MAX_LINE_BYTES + 1, 3 * MAX_LINE_BYTES)
    events = (
        "aug: (tdh_mem_page_aug+0x4/0xb0) td=0x7 s=",
        "sched_switch: s=",
        "kvm_entry: vcpu 0, s=",
    )
    lines = [
        line(f"1.{k:06}", event + "x" * length).encode().rstrip(b"\n")
        for k, (event, length) in enumerate((e, n) for n in lengths for e in events)
    ]
    same(lines * 40, "ftrace")


def test_markers_of_losses_on_a_silent_cpu_take_time_in_proportion() -> None:
    stats = SourceStats()
    begun = time.process_time()
    for number in range(20_000):
        stats.record_lost_events(number % 8 + 1, 1, number)
        stats.observe_timestamps(np.zeros(1, np.int32), np.array([number]))
    assert time.process_time() - begun < 5
    stats.observe_timestamps(np.array([5, 5, 3], np.int32), np.array([20_001, 20_000, 20_007]))
    ends = {(gap.cpu, gap.end_ns) for gap in stats.gaps}
    assert ends == {(c, {5: 20_001, 3: 20_007}.get(c)) for c in range(1, 9)}
