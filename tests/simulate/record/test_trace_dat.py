"""trace.dat of both versions, read by the real trace-cmd where it is installed."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.record import faults, trace_dat
from tdxtrace.simulate.record.event_formats import EventFormats
from tdxtrace.simulate.record.output import parse_format, render_lines
from tdxtrace.simulate.record.probes import Capture
from tdxtrace.simulate.record.recording import Recording

TRACE_CMD = shutil.which("trace-cmd")
needs_trace_cmd = pytest.mark.skipif(
    TRACE_CMD is None, reason="trace-cmd is not installed: NOTHING READ OUR trace.dat"
)
REPORTS = {(): (), ("-t",): ("ns",), ("-R",): ("raw",), ("-N",): ("no-plugin",)}


def _record(name: str, *fault: str) -> Recording:
    run = engine.run(scenario.named(name).with_(duration_ms=4), 2)
    return faults.record(run, Capture(), tuple(faults.parse_fault(text) for text in fault))


def _report(path: Path, *args: str) -> list[str]:
    assert TRACE_CMD is not None
    done = subprocess.run(
        [TRACE_CMD, "report", *args, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@needs_trace_cmd
@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("args", list(REPORTS))
@pytest.mark.parametrize(
    ("name", "fault"),
    [("balloon", ()), ("balloon", ("lost=0.1",)), ("crowd", ()), ("memory_fault_ignored", ())],
)
def test_trace_cmd_reads_it_as_we_print_it(
    tmp_path: Path, name: str, fault: tuple[str, ...], args: tuple[str, ...], version: int
) -> None:
    recording = _record(name, *fault)
    path = tmp_path / "trace.dat"
    path.write_bytes(trace_dat.render(recording, version))
    ours = [text for text, _ in render_lines(recording, parse_format("trace-cmd", REPORTS[args]))]
    assert len(ours) > 300
    assert _report(path, *args) == ours


@needs_trace_cmd
def test_a_loss_without_a_count_is_printed(tmp_path: Path) -> None:
    recording = _record("balloon", "lost=0.3")
    path = tmp_path / "trace.dat"
    path.write_bytes(trace_dat.render(recording, 7))
    assert any(line.endswith(" [EVENTS DROPPED]") for line in _report(path))


def test_pages_are_those_of_the_ring_buffer() -> None:
    recording = _record("balloon")
    data = trace_dat.cpu_pages(recording, 0, EventFormats.of(recording.events()))
    assert len(data) % 4096 == 0
    stamps = []
    for at in range(0, len(data), 4096):
        ts, commit = struct.unpack_from("<QQ", data, at)
        assert 0 < commit <= 4080
        stamps.append(ts)
    mine = [event.ts_ns for event in recording.events() if event.cpu == 0]
    assert stamps[0] == mine[0]
    assert stamps == sorted(stamps)


def test_a_long_gap_takes_a_time_extension() -> None:
    recording = _record("balloon")
    events = [event for event in recording.events() if event.cpu == 0][:2]
    events[1].ts_ns = events[0].ts_ns + (1 << 27) + 5
    kinds = EventFormats.of(events)
    data = trace_dat.cpu_pages(Recording(list(events), 1, "6.18"), 0, kinds)
    first = len(kinds.layouts[events[0].spec].record(events[0])) + 4
    word, high = struct.unpack_from("<II", data, 16 + first)
    assert (word & 31, word >> 5, high) == (30, 5, 1)
