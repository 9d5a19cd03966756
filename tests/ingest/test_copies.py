"""Events recorded by several trace instances."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.recorder import Machine, Recording
from support.texts import is_accounted_for, lost, read_text

from tdxtrace.ingest.decode import decoder
from tdxtrace.ingest.read import read_trace
from tdxtrace.tables.trace import Trace

BUSY = "0x8000020000000092"


def report(*events: tuple[int, str, str, int], tid: int = 7) -> str:
    """``trace-cmd report`` of instances: microseconds, instance, event, and what it names."""
    texts = ["cpus=2\n"]
    for at, instance, event, word in events:
        args = {
            "in": f"(tdh_mem_page_aug+0x4/0xb0) td=0x7d000 gpa={word:#x} level=0",
            "out": f"(tdx_caller+0x9b/0x1a0 [kvm_intel] <- tdh_mem_page_aug) ret={word:#x}",
            "run": "(vt_vcpu_run+0x2e/0x60 [kvm_intel] <- tdx_vcpu_run [kvm_intel]) "
            f"status={word:#x}",
            "kvm_entry": f"vcpu {word}, rip 0x0",
            "kvm_exit": f"vcpu {word} reason HLT rip 0x0 info 0 0",
            "kvm_page_fault": f"vcpu 0 rip 0x0 address {word:#x} error_code 0x2",
        }[event]
        name = event if event.startswith("kvm") else f"aug_{event}"
        head = f"{instance + ':' if instance else '':<5}{'CPU 0/KVM':>16}-{tid:<7}"
        texts.append(f"{head}[001] d..1. 1.{at:06}: {name}: {args}\n")
    return "".join(texts)


def both(*events: tuple[int, str, int], names: tuple[str, ...] = ("one", "two")) -> str:
    return report(*((at, name, event, word) for at, event, word in events for name in names))


def read(text: str) -> Trace:
    trace = read_text(text)
    trace.check()
    assert is_accounted_for(trace)
    return trace


@pytest.mark.parametrize("names", [("one", "two"), ("", "one"), ("", "one", "two")])
def test_each_event_is_taken_once(names: tuple[str, ...]) -> None:
    busy = int(BUSY, 16)
    trace = read(
        both(
            *((10, "in", 0x1000), (12, "out", busy), (13, "in", 0x1000), (15, "out", 0)),
            *((20, "kvm_entry", 0), (29, "kvm_exit", 0), (30, "run", 12)),
            *((40, "kvm_page_fault", 0x2000), (41, "kvm_page_fault", 0x3000)),
            names=names,
        )
    )
    assert trace.seamcalls.select("leaf", "status").rows() == [(6, busy), (6, 0), (0, 12)]
    assert trace.vm_entries.select("exit_reason", "n_lines").rows() == [(12, 2)]
    assert trace.page_faults["gpa"].to_list() == [0x2000, 0x3000]
    assert lost(trace) == {"noise": 9 * (len(names) - 1)}


def test_what_one_instance_lost_is_taken_from_the_other() -> None:
    events = [(n, "one", "in" if n % 10 == 0 else "out", 0) for n in range(100, 600, 5)]
    copies = [(at, "two", event, word) for at, event, word in [(e[0], *e[2:]) for e in events]]
    del events[20], copies[61]
    merged = sorted([*events, *copies], key=lambda event: event[:2])
    assert read(report(*merged)).seamcalls.select("status", "n_lines").rows() == [(0, 2)] * 50


@pytest.mark.parametrize("names", ["", "one", "two"])
def test_calls_of_one_instance_are_never_taken_for_copies(names: str) -> None:
    """Returns alone, in the same microsecond, with the same status: a clock of a coarse step."""
    calls = [(10 + n // 3, names, "run", 12) for n in range(12)]
    other = [(at, "far", "kvm_page_fault", 0x1000 * at) for at in (10, 30, 50)]
    assert read(report(*sorted([*calls, *other]))).seamcalls.height == 12


def test_instances_that_record_different_threads_are_both_taken() -> None:
    one = report((10, "one", "in", 0x1000), (12, "one", "out", 0))
    two = report((10, "two", "in", 0x1000), (12, "two", "out", 0), tid=8)
    assert read(one + two.partition("\n")[2]).seamcalls["tid"].sort().to_list() == [7, 8]


def test_without_instances_nothing_is_a_copy() -> None:
    text = both((10, "run", 12), (10, "kvm_page_fault", 0), names=("", ""))
    trace = read(text)
    assert (trace.seamcalls.height, trace.page_faults.height) == (2, 2)


def test_copies_may_come_in_another_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "BATCH_EVENTS", 1)
    assert read(both((10, "in", 0x1000), (12, "out", 0))).seamcalls.height == 1


@pytest.mark.parametrize("version", ["6", "7"])
@pytest.mark.parametrize("later_ns", [0, 300, 1500])
def test_buffers_of_one_file(version: str, later_ns: int, tmp_path: Path) -> None:
    m = Machine()
    start = 1_000_000_000_000

    def call(begins: int) -> bytes:
        entry, leave = m.enter(7, 0x1000), m.leave(7, 0)
        return m.event(begins, entry) + m.event(5_000, leave)

    cpus = [m.page(start + later, call(10) + call(8_000)) for later in (0, later_ns)]
    recording = Recording(m, [cpus[0]], {"rig": (cpus[1],)})
    path = tmp_path / "trace.dat"
    path.write_bytes(recording.v6() if version == "6" else recording.v7())
    trace = read_trace(path)
    assert is_accounted_for(trace)
    assert trace.seamcalls.select("gpa", "n_lines").rows() == [(0x1000, 2)] * 2
