"""Start times of entries that are probed on return only: the preceding kvm_entry."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.referee import referee
from support.running import answered
from support.texts import aug, aug_ret, is_accounted_for, line, read_text

from tdxtrace.compiler import interpreted
from tdxtrace.ingest.batch import FieldLayouts, RecordBatch
from tdxtrace.ingest.decode.entry_starts import EntryStarts
from tdxtrace.ingest.events.registry import Event
from tdxtrace.ingest.loops import pairing as loop
from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.record import faults, output
from tdxtrace.simulate.record.probes import Capture

FLUSH = "(smp_func_do_phymem_cache_wb+0x2b/0x60 [kvm_intel] <- tdh_phymem_cache_wb) ret=0x0"


def entry(us: int, vcpu: int = 0, **place: Any) -> str:  # noqa: ANN401 - as of line()
    """A kvm_entry."""
    return line(
        f"1.{us:06}", f"kvm_entry: vcpu {vcpu}, rip 0x0 intr_info 0x0 error_code 0", **place
    )


def exit_(us: int, vcpu: int = 0, **place: Any) -> str:  # noqa: ANN401
    """A kvm_exit."""
    said = f"kvm_exit: vcpu {vcpu} reason TDCALL rip 0x0 info1 0x0 info2 0x0 intr_info 0x0"
    return line(f"1.{us:06}", f"{said} error_code 0x0", **place)


def back(us: int, vcpu: int | None = 0, status: int = 77, **place: Any) -> str:  # noqa: ANN401
    """A return of tdx_vcpu_run."""
    result = "" if vcpu is None else f" vcpu={vcpu}"
    where = "(vt_vcpu_run+0x2e/0x60 [kvm_intel] <- tdx_vcpu_run [kvm_intel])"
    text = f"tdx_vcpu_run_return: {where} status={status:#x} gpa=0x0{result}"
    return line(f"1.{us:06}", text, **place)


def fault(us: int) -> str:
    """A kvm_page_fault."""
    said = "kvm_page_fault: vcpu 0 rip 0x0 address 0x80000000 error_code 0x2"
    return line(f"1.{us:06}", said)


def starts(*lines: str) -> list[int | None]:
    """When each entry of a vCPU in these lines began, in microseconds after second 1."""
    trace = read_text("".join(lines))
    assert is_accounted_for(trace)
    entries = sum(": kvm_entry" in text or ": kvm_exit" in text for text in lines)
    assert trace.vm_entries["n_lines"].sum() == entries
    rows = trace.seamcalls.filter(leaf=0)["start_ns"].to_list()
    return [None if ns is None else ns // 1000 - 1_000_000 for ns in rows]


def test_the_kvm_entry_is_the_start() -> None:
    assert starts(entry(10), exit_(20), back(21), entry(30), exit_(40), back(41)) == [10, 30]


def test_an_entry_without_kvm_exit_has_a_start() -> None:
    """A status made by the kernel (0x8000FF...) and an EPT misconfiguration give no kvm_exit."""
    assert starts(entry(10), back(21, status=0x8000_FF00_0000_0006)) == [10]


def test_a_return_while_a_zap_holds_vcpus_off_has_none() -> None:
    """It is no attempt at all if its status is that of the entry before."""
    stale = [back(us) for us in (12, 13)]
    refused = entry(10), exit_(11), back(12)
    assert starts(*refused, *stale) == [10]
    assert starts(*refused, *stale, entry(20), exit_(21), back(22)) == [10, 20]


def test_a_kvm_entry_whose_return_was_lost_is_nobody_elses_start() -> None:
    assert starts(entry(10), exit_(11), entry(20), exit_(21), back(22), back(23, status=1)) == [
        20,
        None,
    ]
    assert starts(entry(10), exit_(11), fault(12), back(23)) == [None]
    assert starts(entry(10), exit_(11), aug("1.000012"), aug_ret("1.000013"), back(23)) == [None]
    userspace = line("1.000012", "kvm_userspace_exit: reason KVM_EXIT_IO (2)")
    assert starts(entry(10), exit_(11), userspace, back(23)) == [None]
    assert starts(entry(10), exit_(11), exit_(22), back(23)) == [None]


def test_other_threads_and_other_vcpus_do_not_count() -> None:
    assert starts(entry(10, task="CPU 1/KVM-8"), exit_(20), back(21)) == [None]
    assert starts(entry(10, vcpu=1), exit_(20), back(21)) == [None]
    assert starts(entry(10, vcpu=1), exit_(20, 1), back(21, vcpu=None)) == [10]
    assert starts(entry(10, cpu=2), back(21)) == [None]
    other: dict[str, Any] = {"task": "CPU 1/KVM-8", "cpu": 2}
    both = (entry(10), entry(11, 1, **other), exit_(12, 1, **other), back(13, 1, **other))
    assert starts(*both, exit_(20), back(21)) == [11, 10]


def test_calls_of_an_interrupt_lie_in_between() -> None:
    """Interrupts are on before tdx_handle_exit, which may be probed in place of tdx_vcpu_run."""
    flush = line("1.000021", f"cachewb_ret: {FLUSH}").replace("] .....", "] d.h..")
    handle = line(
        "1.000022", "vpenter2: (tdx_handle_exit+0x4/0x90 [kvm_intel]) status=0x4d fast=0x0"
    )
    assert starts(entry(10), exit_(20), flush, handle) == [10]
    assert starts(entry(10), exit_(20), flush.replace("d.h..", "....."), handle) == [None]


def test_a_probe_on_the_entry_is_the_start_itself() -> None:
    probed = line("1.000009", "vpenter_in: (tdx_vcpu_run+0x4/0x230 [kvm_intel]) vp=0xff11")
    assert starts(probed, entry(10), exit_(20), back(21), back(22, status=1)) == [9, None]
    # Where one of these probes missed, the capture lost something: kvm_entry does not hide it.
    assert starts(probed, entry(10), back(21), entry(30), back(41)) == [9, None]


def test_a_start_is_not_after_the_end() -> None:
    assert starts(entry(30), exit_(20), back(21)) == [None]


def test_a_script_of_bpftrace_tells_the_start() -> None:
    """As the printed script writes it: fields by name, ns, the vCPU's return in one piece."""
    where = "        CPU 0/KVM-7 (      6) [001] 1.0000"
    text = f"{where}10500: kvm_entry: vcpu_id=0 rip=0x0\n{where}20500: kvm_exit: exit_reason=77 "
    text += "guest_rip=0x0 isa=1 info1=0x0 info2=0x0 intr_info=0x0 error_code=0x0 vcpu_id=0\n"
    text += f"{where}20900: tdx_vcpu_run_return: (0x0 <- tdx_vcpu_run) status=0x4d gpa=0x0 vcpu=0\n"
    (row,) = read_text(text).seamcalls.rows(named=True)
    assert (row["start_ns"], row["end_ns"], row["tgid"]) == (1_000_010_500, 1_000_020_900, 6)
    script = answered("capture", "plan", "--kernel", "6.18", "--dialect", "bpftrace").text
    assert "kvm_entry: vcpu_id=%u rip=0x%llx" in script


FORMATS = (
    *(("tracefs", ()), ("tracefs", ("tgid",)), ("trace-pipe", ())),
    *(("trace-cmd", ()), ("trace-cmd", ("raw", "ns")), ("trace-cmd", ("no-plugin",))),
    *(("perf", ()), ("perf", ("ns",)), ("trace.dat", ()), ("trace.dat-v6", ())),
)


@pytest.mark.parametrize("probes", ["capture", "capture-minimal", "capture-seamcalls"])
@pytest.mark.parametrize(("form", "options"), FORMATS)
def test_every_entry_of_a_whole_capture_has_its_start(
    form: str, options: tuple[str, ...], probes: str, tmp_path: Path
) -> None:
    run = engine.run(scenario.named("hostile_guest").with_(duration_ms=2), 3)
    recording = faults.record(run, Capture(probes), ())
    data = output.render_bytes(run, recording, output.parse_format(form, options))
    trace = read_text(data, name="trace.dat" if "dat" in form else "trace.txt")
    rows = trace.seamcalls.filter(leaf=0)
    assert rows.height > 50
    assert rows["start_ns"].null_count() == 0
    assert rows["start_cpu"].to_list() == rows["cpu"].to_list()
    result = zip(rows["tid"], rows["start_ns"], strict=True)
    assert set(result) <= set(trace.vm_entries.select("tid", "start_ns").iter_rows())
    assert len(set(rows.select("tid", "start_ns", "seq").iter_rows())) == rows.height


# The rule as a plain reading: one event after the other, back from the return.

Happening = tuple[int, int, int, int]
HAPPENINGS = st.tuples(
    st.integers(1, 2), st.integers(0, 4), st.sampled_from([-1, 0, 0, 1]), st.integers(-1, 1)
)


def by_search(events: list[Happening]) -> list[int]:
    """Place of the kvm_entry of each event, -1 where it has none."""
    found = []
    for at, (thread, role, cpu, vcpu) in enumerate(events):
        mine = [i for i in range(at) if events[i][0] == thread and events[i][1] != loop.IGNORED]
        exits = 0
        while mine and events[mine[-1]][1] == loop.KVM_EXIT:
            exits += 1
            mine.pop()
        start = mine[-1] if mine and exits < 2 else -1
        is_entry = start >= 0 and role == loop.RUN_RETURN and events[start][1] == loop.KVM_ENTRY
        same = is_entry and all(
            min(one, other) < 0 or one == other
            for one, other in zip((cpu, vcpu), events[start][2:], strict=True)
        )
        found.append(start if same else -1)
    return found


@given(st.lists(HAPPENINGS, max_size=30))
def test_the_loop_does_what_the_rule_says(events: list[Happening]) -> None:
    thread, role, cpu, vcpu = (np.array([event[i] for event in events], np.int64) for i in range(4))
    entered, exited = np.full(3, -1, np.int64), np.full(3, -1, np.int64)
    start = np.full(len(events), -1, np.int64)
    result = thread.astype(np.int32), role, cpu, vcpu
    referee(loop.find_entry_starts)(*result, entered, exited, start)
    assert start.tolist() == by_search(events)


EVENTS = [
    Event("noise", "noise"),
    Event("kvm_entry", "vm_entry", "entry", "vm"),
    Event("kvm_exit", "vm_entry", "return", "vm"),
    Event("run", "call", "return", "tdh_vp_enter", 0, "vcpu_run"),
    Event("aug", "call", "entry", "tdh_mem_page_aug", 6),
]


def batch(events: list[Happening], first: int, layouts: FieldLayouts) -> RecordBatch:
    """Events of a source from line ``first`` on, 10 ns apart; thread 2 was not printed."""
    line = first + np.arange(len(events))
    thread, role, cpu, vcpu = (np.array([event[i] for event in events], np.int32) for i in range(4))
    tid = np.where(thread == 2, -1, thread).astype(np.int32)
    slots = [("vcpu_id",) if n >= 0 else () for n in vcpu]
    layout = np.array([layouts.intern(names) for names in slots], np.int32)
    heads = line, 10 * line, tid, np.full(len(events), -1, np.int32), cpu
    no_flags = np.full(len(events), -1, np.int8)
    words = np.maximum(vcpu, 0).astype(np.uint64)
    return RecordBatch(*heads, no_flags, role, layout, line - first, words, layouts)


# A second kvm_exit, in another batch than the first.
@example([(1, role, 0, 0) for role in (loop.KVM_ENTRY, *2 * [loop.KVM_EXIT], loop.RUN_RETURN)], [2])
@given(st.lists(HAPPENINGS, max_size=20), st.lists(st.integers(0, 20)))
def test_batches_may_end_anywhere(events: list[Happening], ends: list[int]) -> None:
    """Threads without a number go by CPU, also those that are still inside at the end."""
    layouts = FieldLayouts()
    cuts = sorted({0, len(events), *(end for end in ends if end < len(events))})
    parts = [
        batch(events[since:until], since, layouts) for since, until in itertools.pairwise(cuts)
    ]
    whole, cut = EntryStarts(interpreted), EntryStarts(interpreted)
    at_once = whole.feed(parts, EVENTS)
    found = [cut.feed([part], EVENTS) for part in parts]
    assert at_once.rows() == [row for rows in found for row in rows.rows()]
    by_cpu = [(-2 - c if t == 2 else t, r, c, v) for t, r, c, v in events]
    pairs = [(at, start) for at, start in enumerate(by_search(by_cpu)) if start >= 0]
    assert at_once.select("seq", "start_ns").rows() == [(at, 10 * at0) for at, at0 in pairs]
