"""Losses that no line of the input reports."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from support.texts import BUSY, aug, aug_ret, is_accounted_for, line, read_text

from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.errors import FormatError
from tdxtrace.tables.trace import Trace


def losses_of(trace: Trace, kind: str) -> list[dict[str, Any]]:
    assert is_accounted_for(trace)
    trace.check()
    return trace.losses.filter(pl.col("kind") == kind).to_dicts()


def outcomes(trace: Trace) -> list[tuple[int, int, str, str | None]]:
    chains = retry_chains(trace.seamcalls, trace.losses).sort("tid", "start_ns")
    return chains.select("tid", "n_attempts", "outcome", "cut_by").rows()


def call(stamp: int, tid: int = 7, cpu: int = 1, ret: int = 0, gpa: int = 0x1000) -> str:
    """An entry at ``stamp`` microseconds and its return one later."""
    place: dict[str, Any] = {"task": f"CPU/KVM-{tid}", "cpu": cpu}
    return aug(f"1.{stamp:06}", f"td=0x7d000 gpa={gpa:#x} level=0", **place) + aug_ret(
        f"1.{stamp + 1:06}", f"ret={ret:#x}", **place
    )


# The buffer was overwritten.

HEAD = "# tracer: nop\n#\n# entries-in-buffer/entries-written: {}/{}   #P:2\n#\n"
TWO_CPUS = call(10) + call(20, tid=8, cpu=2) + call(30)


def test_the_header_reveals_an_overwritten_buffer() -> None:
    trace = read_text(HEAD.format(6, 41484) + TWO_CPUS)
    rows = losses_of(trace, "overwritten")
    assert [row["n_events"] for row in rows if row["cpu"] is None] == [41478]
    windows = {row["cpu"]: (row["start_ns"], row["end_ns"]) for row in rows if row["cpu"]}
    assert windows == {1: (None, 1_000_010_000), 2: (None, 1_000_020_000)}


def test_an_overwritten_buffer_cuts_the_first_chain_of_each_thread() -> None:
    trace = read_text(HEAD.format(6, 41484) + TWO_CPUS)
    cut = (1, "cut", "lost_events")
    assert outcomes(trace) == [(7, *cut), (7, 1, "succeeded", None), (8, *cut)]


@pytest.mark.parametrize("written", [6, 5, 0])
def test_a_buffer_that_kept_all_lost_nothing(written: int) -> None:
    trace = read_text(HEAD.format(6, written) + TWO_CPUS)
    assert losses_of(trace, "overwritten") == []
    assert {row[2] for row in outcomes(trace)} == {"succeeded"}


@pytest.mark.parametrize("numbers", ["x/y", "/", "9" * 5000 + "/" + "9" * 5000])
def test_a_header_that_makes_no_sense_is_a_comment(numbers: str) -> None:
    head = f"# entries-in-buffer/entries-written: {numbers}   #P:2\n"
    assert read_text(head + TWO_CPUS).seamcalls.height == 3


# The trace was switched on while calls were going on.


def test_a_trace_that_begins_with_a_return_began_midway() -> None:
    text = aug_ret("1.000001", f"ret={BUSY:#x}") + call(10) + call(20)
    trace = read_text(text)
    assert len(losses_of(trace, "started_midway")) == 1
    result = outcomes(trace)
    assert result[0][2:] == ("cut", "trace_start")
    assert result[-1] == (7, 1, "succeeded", None)


def test_a_trace_that_began_midway_cuts_the_first_chain_of_every_thread() -> None:
    """Thread 8 may have been between two attempts."""
    text = aug_ret("1.000001", f"ret={BUSY:#x}") + call(10) + call(12, tid=8) + call(20, tid=8)
    result = {row[0]: row[2:] for row in reversed(outcomes(read_text(text)))}
    assert result[8] == ("cut", "trace_start")


def test_a_trace_that_begins_with_entries_did_not_begin_midway() -> None:
    trace = read_text(call(10) + call(12, tid=8) + call(20))
    assert losses_of(trace, "started_midway") == []
    assert {row[2] for row in outcomes(trace)} == {"succeeded"}


def test_a_one_line_probe_beside_others_with_entries_does_not_begin_midway() -> None:
    """Of TDH.PHYMEM.CACHE.WB such a line names nothing but the leaf: it has no operands."""
    written = "sc: (tdx_caller+0x4/0xb0 <- __seamcall) ret=0x0 fn=0x28"
    trace = read_text(call(10) + line("1.000030", written, task="<idle>-0", cpu=3))
    assert sorted(trace.seamcalls["leaf"]) == [6, 40]
    assert losses_of(trace, "started_midway") == []


def test_one_line_return_probes_have_no_entries_and_do_not_begin_midway() -> None:
    done = "aug_done: (tdx_x+0x9b/0x1a0 <- tdh_mem_page_aug) ret=0x0 td=0x1 gpa={:#x} level=0"
    text = "".join(line(f"1.{k:06}", done.format(k << 12)) for k in range(1, 5))
    trace = read_text(text)
    assert losses_of(trace, "started_midway") == []
    assert {row[2] for row in outcomes(trace)} == {"succeeded"}


def test_a_return_in_the_middle_says_nothing_about_the_start() -> None:
    text = call(1) + aug_ret("1.000005") + call(10)
    assert losses_of(read_text(text), "started_midway") == []


def block(stamp: int) -> str:
    """Thread 8 blocks the page 0x1000, from ``stamp`` microseconds to one later."""
    place: dict[str, Any] = {"task": "worker-8", "cpu": 2}
    caller = "tdx_sept_zap_private_spte+0x9b/0x1a0 [kvm_intel]"
    began, ended = f"1.{stamp:06}", f"1.{stamp + 1:06}"
    arguments = "td=0x7d000 gpa=0x1000 level=0"
    return line(began, f"block: (tdh_mem_range_block+0x4/0xb0) {arguments}", **place) + line(
        ended, f"block_ret: ({caller} <- tdh_mem_range_block) ret=0x0", **place
    )


def test_a_page_that_is_used_before_it_was_made_was_made_before_the_trace() -> None:
    assert len(losses_of(read_text(block(5) + call(10)), "started_midway")) == 1
    assert losses_of(read_text(call(10) + block(15)), "started_midway") == []


def test_a_thread_that_is_held_up_after_it_made_a_page_does_not_mean_midway() -> None:
    began, ended = call(10).splitlines(keepends=True)
    late = ended.replace("1.000011", "1.000030")
    assert losses_of(read_text(began + block(20) + late), "started_midway") == []


# Overwriting was off and a buffer ran full.


def test_calls_that_break_off_where_a_cpu_falls_silent_mean_a_full_buffer() -> None:
    """CPU 1 took nothing after 30 us, but thread 7 goes on elsewhere in the middle of a call."""
    text = "".join(
        [
            call(10, ret=BUSY),
            aug("1.000030", "td=0x7d000 gpa=0x1000 level=0", task="CPU/KVM-7", cpu=1),
            call(40, tid=8, cpu=2),
            call(50, tid=7, cpu=2),
            call(60, tid=8, cpu=2),
        ]
    )
    trace = read_text(text)
    rows = losses_of(trace, "buffer_full")
    assert [(row["cpu"], row["start_ns"], row["end_ns"]) for row in rows] == [
        (1, 1_000_030_000, None)
    ]
    result = outcomes(trace)
    assert [row[2] for row in result if row[0] == 7] == ["cut", "cut"]
    assert [row[2] for row in result if row[0] == 8] == ["succeeded", "succeeded"]


def test_a_missing_return_while_its_cpu_goes_on_is_a_missed_probe() -> None:
    text = call(10) + aug("1.000030", "td=0x7d000 gpa=0x5000 level=0", task="CPU/KVM-7")
    trace = read_text(text + call(40) + call(50))
    assert losses_of(trace, "buffer_full") == []
    assert losses_of(trace, "unpaired_entry")[0]["n_events"] == 1


def test_the_last_call_of_a_thread_may_be_unfinished() -> None:
    text = call(10) + aug("1.000030", "td=0x7d000 gpa=0x5000 level=0", task="CPU/KVM-7")
    trace = read_text(text + call(40, tid=8, cpu=2))
    assert losses_of(trace, "buffer_full") == []
    assert losses_of(trace, "unpaired_entry")[0]["n_events"] == 1


# What stayed unpaired, and how it is said.


def test_what_stayed_unpaired_is_counted_and_stands_for_no_line() -> None:
    text = aug_ret("1.000001") + call(10) + aug("1.000020") + aug("1.000030")
    trace = read_text(text)
    for kind, n in (("unpaired_return", 1), ("unpaired_entry", 2)):
        row = losses_of(trace, kind)[0]
        assert (row["n_events"], row["n_lines"], row["severity"]) == (n, 0, "info")


def test_complete_pairs_cause_no_loss() -> None:
    trace = read_text(call(10) + call(20))
    assert trace.losses.is_empty()


# A trace that holds nothing of ours.


def refusal(text: str) -> str:
    with pytest.raises(FormatError) as error:
        read_text(text)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 400
    return message


def test_a_trace_of_noise_says_what_it_has_and_what_to_record() -> None:
    names = [f"sched_event_{k}" for k in range(8)]
    message = refusal("".join(line("1.000001", f"{name}: x") for name in names))
    assert "no SEAMCALL and no KVM event" in message
    assert "sched_event_0" in message
    assert "3 more" in message
    assert "kvm:kvm_entry" in message
    assert "tdh_mem_page_aug" in message


def test_a_trace_of_unknown_probes_says_how_to_name_them() -> None:
    message = refusal(line("1.000001", "p_0x4240: (0x556e6d3ab240)"))
    assert "p_0x4240" in message
    assert "--map EVENT=FUNCTION" in message


def test_a_trace_of_headers_says_so() -> None:
    assert "only headers" in refusal("# tracer: nop\n#\n# entries-in-buffer/entries-written: 0/0\n")


def test_a_trace_of_losses_says_so() -> None:
    assert "has no known event" in refusal("CPU:0 [LOST 5 EVENTS]\n")


def test_names_of_events_are_shown_as_text() -> None:
    message = refusal(line("1.000001", "<\x1b[31mred>: x"))
    assert "\x1b" not in message
