"""``tdxtrace capture record``: recordings are complete, and the kernel is restored."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from support.running import refused
from support.testbed import Tracing, program, wrong_chains

import tdxtrace

PATIENCE_S = 120


def record(
    bench: Path, output: Path, csv: Path, *words: str, requests: int = 60
) -> subprocess.CompletedProcess[str]:
    """Record a run of the program."""
    run = [str(bench), str(csv), "4", "2", str(requests), "7"]
    command = program("capture", "record", "--program", bench, "-o", output, *words, "--", *run)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


@pytest.mark.parametrize("name", ["trace.dat", "trace.txt", "pages"])
def test_every_form_has_the_chains_that_were_made(
    name: str, tracing: Tracing, bench: Path, tmp_path: Path
) -> None:
    output, csv = tmp_path / name, tmp_path / "truth.csv"
    done = record(bench, output, csv)
    assert done.returncode == 0, done.stderr
    assert "none lost" in done.stderr
    assert wrong_chains(output, csv) == []
    (source,) = tdxtrace.read_trace(output).provenance.sources
    assert source.clock == "mono"
    assert source.kernel == Path("/proc/version").read_text().split()[2]
    result = output / "capture.json" if name == "pages" else tmp_path / f"{name}.capture.json"
    facts = json.loads(result.read_text())
    assert facts["level_base"] == 0
    assert facts["lost_events"] == 0
    assert len(facts["probes"]) == 12
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".part") == []


@pytest.mark.parametrize("name", ["trace.dat", "trace.txt", "pages"])
def test_threads_keep_their_names_and_processes(
    name: str, tracing: Tracing, bench: Path, tmp_path: Path
) -> None:
    done = record(bench, tmp_path / name, tmp_path / "truth.csv")
    assert done.returncode == 0, done.stderr
    threads = tdxtrace.read_trace(tmp_path / name).threads
    names = set(threads["comm"])
    assert {f"CPU {n}/KVM" for n in range(4)} | {"zap 4", "zap 5"} <= names
    assert threads["tgid"].drop_nulls().n_unique() == 1
    # A text has dashes for a thread that the kernel did not switch to or from while it
    # recorded (trace_sched_switch.c, tracing_record_taskinfo); mostly there is none.
    assert threads["tgid"].null_count() <= (2 if name == "trace.txt" else 0)


def test_trace_cmd_reads_what_we_write(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    if shutil.which("trace-cmd") is None:
        pytest.skip("no trace-cmd")
    output, csv = tmp_path / "trace.dat", tmp_path / "truth.csv"
    assert record(bench, output, csv).returncode == 0
    done = subprocess.run(
        ["trace-cmd", "report", "-t", str(output)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    (tmp_path / "report.txt").write_text(done.stdout)
    assert wrong_chains(tmp_path / "report.txt", csv) == []


def test_a_full_buffer_is_reported_during_the_recording(
    tracing: Tracing, bench: Path, tmp_path: Path
) -> None:
    """Two threads that only call fill a buffer of 64 KiB while its reader is kept from running."""
    command = program("capture", "record", "--program", bench, "-o", tmp_path / "pages")
    command += ["--buffer", "64K", "--", str(bench), "--flood", "2", "4"]
    recorder = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + PATIENCE_S
    while recorder.poll() is None and time.monotonic() < until:
        time.sleep(0.4)
        recorder.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        recorder.send_signal(signal.SIGCONT)
    said = recorder.communicate(timeout=PATIENCE_S)[1]
    assert recorder.returncode == 0, said
    result = [line for line in said.splitlines() if "its buffer of 64 KiB is full" in line]
    assert result, said
    summary = said.splitlines()[-1]
    facts = json.loads((tmp_path / "pages" / "capture.json").read_text())
    assert f"{facts['lost_events']:,} lost" in summary
    trace = tdxtrace.read_trace(tmp_path / "pages")
    assert trace.losses.filter(trace.losses["severity"] == "data_loss")["n_events"].sum() > 0


def test_the_duration_ends_the_recording_and_its_command(
    tracing: Tracing, bench: Path, tmp_path: Path
) -> None:
    command = program("capture", "record", "--program", bench, "-o", tmp_path / "pages")
    command += ["--duration", "500ms", "--", str(bench), "--flood", "1", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert tdxtrace.read_trace(tmp_path / "pages").seamcalls.height > 0


def test_the_stock_level_needs_no_probes(tracing: Tracing, tmp_path: Path) -> None:
    """KVM's own events; there may be none, and that is no failure of the recorder."""
    if not (tracing.path / "events/kvm/kvm_entry").exists():
        pytest.skip("this kernel has no KVM")
    output = tmp_path / "trace.dat"
    command = program("capture", "record", "--level", "stock", "-o", output, "--duration", "100ms")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "trace.dat.capture.json").read_text())
    assert facts["probes"] == []
    assert [event["name"] for event in facts["events"]][:2] == ["kvm/kvm_entry", "kvm/kvm_exit"]


def test_nothing_is_overwritten_unasked(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    output = tmp_path / "trace.dat"
    output.write_text("mine")
    words = ("capture", "record", "--program", bench, "-o", output, "--duration", "1s")
    assert "exists; use --force" in refused(1, *words)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter").write_text("mine")
    other = ("capture", "record", "--program", bench, "-o", tmp_path / "folder", "--force")
    assert "did not create" in refused(1, *other)
    assert (tmp_path / "folder" / "letter").read_text() == "mine"
    assert output.read_text() == "mine"


def test_a_program_is_not_overwritten_by_its_recording(
    tracing: Tracing, bench: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link.dat"
    link.symlink_to(bench)
    before = bench.read_bytes()
    for output in (bench, link):
        words = ("capture", "record", "--program", bench, "-o", output, "--duration", "100ms")
        assert "would overwrite the input" in refused(1, *words, "--force")
    assert (bench.read_bytes(), link.is_symlink()) == (before, True)


def test_a_device_is_not_replaced(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    device = tmp_path / "null.dat"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no device can be made here")
    words = ("capture", "record", "--program", bench, "-o", device, "--duration", "100ms")
    assert "is neither a file" in refused(1, *words, "--force")
    assert device.is_char_device()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--duration", "soon"), 2, "not a time: 'soon'"),
        (("--duration", "0s"), 2, "not a time: '0s'"),
        (("--buffer", "much"), 2, "not a size: 'much'"),
        (("--program", "absent"), 1, "cannot read"),
        (("-o", "/absent/trace.dat"), 1, "cannot write"),
    ],
)
def test_wrong_arguments_are_refused(
    words: tuple[str, ...], status: int, said: str, tracing: Tracing, tmp_path: Path
) -> None:
    assert said in refused(status, "capture", "record", "-o", tmp_path / "x", *words)
    assert not (tmp_path / "x").exists()


def test_a_command_that_cannot_be_started(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    words = ("capture", "record", "--program", bench, "-o", tmp_path / "x", "--", "/absent/program")
    assert "cannot record: No such file" in refused(1, *words)


def test_a_kernel_without_wrappers_is_refused(tracing: Tracing, tmp_path: Path) -> None:
    if " tdh_mem_page_aug" in Path("/proc/kallsyms").read_text():
        pytest.skip("this kernel has TDX host code")
    said = refused(1, "capture", "record", "-o", tmp_path / "x")
    assert "no SEAMCALL wrapper to probe" in said or "no kprobes" in said


def test_without_tracefs_or_rights_one_line_says_what_to_do(tmp_path: Path) -> None:
    where = tmp_path / "nothing"
    said = refused(1, "capture", "record", "--tracefs", where, "-o", tmp_path / "x")
    assert "use sudo" in said
    assert "use sudo" in refused(1, "capture", "clean", "--tracefs", where)
