"""Lines as the real tools print them: Linux 6.18, trace-cmd 3.1, perf 6.1.

Each expected line was printed by such a tool, with the values replaced by those of the run.
"""

import re
from functools import cache

import pytest

from tdxtrace.errors import QueryError
from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.record import faults, output
from tdxtrace.simulate.record.output import parse_format, render_lines
from tdxtrace.simulate.record.probes import Capture
from tdxtrace.simulate.record.recording import Recording


@cache
def _run(name: str, kernel: str = "6.18") -> Run:
    return engine.run(scenario.named(name).with_(duration_ms=6, kernel=kernel), 1)


def _record(name: str, probes: str = "wrappers", *fault: str, kernel: str = "6.18") -> Recording:
    faults_ = tuple(faults.parse_fault(text) for text in fault)
    return faults.record(_run(name, kernel), Capture(probes), faults_)


def _lines(recording: Recording, form: str, *options: str) -> list[str]:
    return [text for text, _ in render_lines(recording, parse_format(form, options))]


def _first(lines: list[str], word: str) -> str:
    return next(line for line in lines if word in line)


def test_the_header_of_trace_is_that_of_the_kernel() -> None:
    recording = _record("balloon")
    n = len(recording.events())
    assert _lines(recording, "tracefs")[:12] == [
        "# tracer: nop",
        "#",
        f"# entries-in-buffer/entries-written: {n}/{n}   #P:12",
        "#",
        "#                                _-----=> irqs-off/BH-disabled",
        "#                               / _----=> need-resched",
        "#                              | / _---=> hardirq/softirq",
        "#                              || / _--=> preempt-depth",
        "#                              ||| / _-=> migrate-disable",
        "#                              |||| /     delay",
        "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION",
        "#              | |         |   |||||     |         |",
    ]


def test_the_header_shifts_with_a_tgid_column() -> None:
    head = _lines(_record("balloon"), "tracefs", "tgid")[4:12]
    assert head[0] == "#                                          _-----=> irqs-off/BH-disabled"
    assert head[5] == "#                                        |||| /     delay"
    assert head[6] == "#           TASK-PID       TGID    CPU#  |||||  TIMESTAMP  FUNCTION"


@pytest.mark.parametrize(
    ("form", "options", "word", "shape"),
    [
        (
            "tracefs",
            [],
            "tdh_mem_track_enter",
            r"          worker-5242    \[\d{3}\] \.\.\.1\.  4189\.19\d{4}: tdh_mem_track_enter: "
            r"\(tdh_mem_track\+0x4/0xb0\) td=0xff1100018a0009a8",
        ),
        (
            "tracefs",
            [],
            "tdh_mem_page_aug_exit",
            r"       CPU \d/KVM-42\d\d    \[\d{3}\] \.\.\.1\.  4189\.19\d{4}: "
            r"tdh_mem_page_aug_exit: "
            r"\(tdx_sept_set_private_spte\+0x9b/0x1a0 \[kvm_intel\] <- tdh_mem_page_aug\) "
            r"ret=0x0",
        ),
        (
            "tracefs",
            ["tgid"],
            "kvm_entry",
            r"       CPU \d/KVM-42\d\d    \(   4242\) \[\d{3}\] d\.\.1\.  4189\.19\d{4}: "
            r"kvm_entry: "
            r"vcpu \d, rip 0x0 intr_info 0x00000000 error_code 0x00000000",
        ),
        (
            "tracefs",
            ["no-irq-info"],
            "kvm_page_fault",
            r"       CPU \d/KVM-42\d\d    \[\d{3}\]   4189\.19\d{4}: kvm_page_fault: "
            r"vcpu \d rip 0x0 address 0x00000001000\w{5} error_code 0x2",
        ),
        (
            "tracefs",
            ["latency"],
            "tdh_mem_page_aug_enter",
            r"CPU \d/KV-42\d\d     +\d+\.\.\.1\. +\d+us[ +!#]: tdh_mem_page_aug_enter: "
            r"\(tdh_mem_page_aug\+0x4/0xb0\) td=0x\w+ gpa=0x\w+ level=0 page=0xffd4\w+",
        ),
        (
            "tracefs",
            ["verbose", "latency"],
            "tdh_mem_track_exit",
            r"          worker    5242 +\d+ 0 00000001 \w{8} \[\w{8}\] \d+\.\d{3}ms "
            r"\(\+\d+\.\d{3}ms\): tdh_mem_track_exit: .*",
        ),
        (
            "tracefs",
            ["clock=x86-tsc"],
            "kvm_exit",
            r"       CPU \d/KVM-42\d\d    \[\d{3}\] d\.\.1\. 11310\d{9}: kvm_exit: .*",
        ),
        (
            "trace-cmd",
            [],
            "tdh_mem_page_aug_enter",
            r"       CPU \d/KVM-42\d\d  \[\d{3}\]  4189\.19\d{4}: tdh_mem_page_aug_enter: "
            r"\(ffffffff8129\w{4}\) td=0x\w+ gpa=0x\w+ level=0 page=0x\w+",
        ),
        (
            "trace-cmd",
            ["instance=rig", "ns"],
            "vpenter:",
            r"rig:        CPU \d/KVM-42\d\d  \[\d{3}\]  4189\.19\d{7}: vpenter:              "
            r"\(ffffffff\w{8} <- ffffffff\w{8}\) status=0x\w+ gpa=0x\w+ vp=0x\w+ fast=0",
        ),
        (
            "trace-cmd",
            ["flags"],
            "kvm_exit",
            r"       CPU \d/KVM-42\d\d  \[\d{3}\] d\.\.1\.  4189\.19\d{4}: kvm_exit:             "
            r"reason \w+(?: \(\d+\))? rip 0x0 info \w+ \w+",
        ),
        (
            "perf",
            [],
            "tdh_mem_track_exit",
            r"          worker  5242 \[\d{3}\]  4189\.19\d{4}: "
            r" +tdx:tdh_mem_track_exit: \(ffffffff8129\w{4} <- ffffffffc0a\w{5}\) ret=0x0",
        ),
        (
            "perf",
            ["ns", "process"],
            "kvm:kvm_entry",
            r"       CPU \d/KVM  4242/42\d\d  \[\d{3}\]  4189\.19\d{7}: +kvm:kvm_entry: vcpu .*",
        ),
        (
            "graph",
            [],
            "tdh_mem_page_aug",
            r" 4189\.19\d{4} \|   +\d+\)  CPU \d/K-42\d\d  \| [ +]? *\d+\.\d{3} us    \|  "
            r"tdh_mem_page_aug\(td=0x\w+, gpa=0x\w+, level=0, page=0x\w+\); /\* ret=0x0 \*/",
        ),
    ],
)
def test_a_line_has_the_format_of_the_tool(
    form: str, options: list[str], word: str, shape: str
) -> None:
    line = _first(_lines(_record("balloon"), form, *options), word)
    assert re.fullmatch(shape, line), line


def test_perf_aligns_events_to_the_longest_name() -> None:
    lines = _lines(_record("balloon"), "perf")
    assert len({line.index(": ", line.index(": ") + 2) for line in lines}) == 1


def test_a_busy_entry_shows_as_a_failed_one() -> None:
    line = _first(_lines(_record("zero_step_attack", "stock"), "tracefs"), "FAILED_VMENTRY")
    assert line.endswith(
        "reason 0xffff FAILED_VMENTRY 0x7fff0000 rip 0x0 info1 0x0000000000000000 "
        "info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000 "
        "requests 0x0000000000000000"
    )
    line = _first(_lines(_record("zero_step_attack", "stock"), "trace-cmd"), "4294967295")
    assert line.endswith("kvm_exit:             reason UNKNOWN (4294967295) rip 0x0 info 0 0")


def test_level_and_page_change_their_meaning_in_7_2() -> None:
    for kernel in ("6.18", "7.0"):
        old = _first(_lines(_record("balloon", kernel=kernel), "tracefs"), "tdh_mem_page_aug_enter")
        assert "level=0 page=0xffd4" in old
    new = _first(_lines(_record("balloon", kernel="7.2"), "tracefs"), "tdh_mem_page_aug_enter")
    assert re.search(r"level=1 page=0x1000\w{4}$", new)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("trace-pipe", r"CPU:\d+ \[LOST (\d+ )?EVENTS\]"),
        ("trace-cmd", r"CPU:\d+ \[(\d+ )?EVENTS DROPPED\]"),
        ("perf", r" +\S.* +\d+ \[\d{3}\]  4189\.\d{6}: PERF_RECORD_LOST lost \d+"),
        ("graph", r"CPU:\d+ \[LOST \d+ EVENTS\]"),
    ],
)
def test_losses_are_printed_as_by_the_tools(form: str, shape: str) -> None:
    recording = _record("balloon", "wrappers", "lost=0.1")
    printed = [line for line in _lines(recording, form) if re.fullmatch(shape, line)]
    gaps = [item for item in recording.items if not hasattr(item, "spec")]
    assert gaps
    assert len(printed) == len(gaps)


def test_overwritten_events_leave_no_marker() -> None:
    recording = _record("balloon", "wrappers", "overwritten=0.5")
    lines = _lines(recording, "tracefs")
    kept = len(recording.events())
    assert lines[2].startswith(f"# entries-in-buffer/entries-written: {kept}/")
    assert recording.n_written > kept
    assert not any("LOST" in line for line in lines)


def test_the_line_after_a_loss_has_no_instance() -> None:
    lines = _lines(_record("balloon", "wrappers", "lost=0.1"), "trace-cmd", "instance=rig")
    after = [lines[i + 1] for i, line in enumerate(lines[:-1]) if "DROPPED" in line]
    assert after
    assert not any(line.startswith("rig: ") for line in after if "DROPPED" not in line)


@pytest.mark.parametrize(
    ("form", "option", "message"),
    [
        ("tracfs", "", "nearest: tracefs"),
        ("tracefs", "ns", "has no option 'ns'; it has: tgid"),
        ("tracefs", "clock=sundial", "no clock 'sundial'"),
        ("trace-cmd", "ns=3", "not an option"),
        ("dmesg", "tgid", "it has: none"),
    ],
)
def test_an_invalid_format_or_option_is_refused(form: str, option: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        parse_format(form, [option] if option else [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lots=1", "no fault 'lots'; nearest: lost"),
        ("lost=all", "write lost=0.1"),
        ("lost=0.95", "not within"),
        ("clock=-3", "not within"),
    ],
)
def test_an_invalid_fault_is_refused(text: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        faults.parse_fault(text)


def test_dmesg_prints_what_6_18_and_6_19_print() -> None:
    for kernel, labels in (("6.18", ("rcx", "rdx")), ("6.19", ("entry", "level_state"))):
        chosen = scenario.named("hostile_guest").with_(policy="v1-series", kernel=kernel)
        run = engine.run(chosen, 1)
        text = output.render_bytes(
            run, faults.record(run, Capture(), ()), parse_format("dmesg")
        ).decode()
        failed = _first(text.splitlines(), "failed")
        shape = (
            r"\[ 4189\.\d{6}\] kvm_intel: SEAMCALL TDH_MEM_(RANGE_BLOCK|PAGE_REMOVE|PAGE_AUG) "
            rf"failed: 0x8000020000000001, {labels[0]} 0x\w+, {labels[1]} 0x\w+"
        )
        assert re.fullmatch(shape, failed), failed
        assert re.search(
            r"WARNING: CPU: \d+ PID: \d+ at arch/x86/kvm/vmx/tdx.c:\d+ tdx_\w+\+", text
        )


def test_dmesg_is_rate_limited() -> None:
    long_held = {"attr": [20_000, 40_000, 80_000, 100_000]}
    run = engine.run(scenario.named("host_gives_up").with_(times=long_held), 1)
    lines = output.render_bytes(
        run, faults.record(run, Capture(), ()), parse_format("dmesg")
    ).decode()
    printed = [line for line in lines.splitlines() if "vp_enter_ret 0x9000020500000000" in line]
    assert 1 <= len(printed) <= 10


def test_the_kernel_and_trace_cmd_round_to_microseconds_and_perf_cuts() -> None:
    recording = _record("balloon")
    event = next(s for s in recording.events() if s.ts_ns % 1000 > 500)
    only = Recording([event], 1, "6.18", 1)
    stamps = {
        form: re.findall(r"4189\.\d{6}", _lines(only, form)[-1])[0]
        for form in ("tracefs", "trace-cmd", "perf")
    }
    cut = f"4189.{event.ts_ns % 10**9 // 1000:06}"
    up = f"4189.{event.ts_ns % 10**9 // 1000 + 1:06}"
    assert stamps == {"tracefs": up, "trace-cmd": up, "perf": cut}
