"""However a recording ends, its instance and probes are removed from the kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.running import answered, refused, tdxtrace
from support.testbed import Tracing, program

import tdxtrace as library
from tdxtrace.capture.drains import Drain

PATIENCE_S = 120.0


def until(what: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


STARTED: list[Running] = []


@pytest.fixture(autouse=True)
def _nothing_goes_on(tracing: Tracing) -> Iterator[None]:
    """End recorders that a failed test left, before it is seen what they leave."""
    yield
    for running in STARTED:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGINT)
            running.end()
    STARTED.clear()


class Running:
    """A recorder that records, in a process of its own."""

    def __init__(self, tracing: Tracing, bench: Path, output: Path, *words: str) -> None:
        self.tracing, self.output = tracing, output
        command = program("capture", "record", "--program", bench, "-o", output)
        command += [*words, "--", str(bench), "--flood", "1", "600"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        STARTED.append(self)
        until(self._records)

    @property
    def instance(self) -> Path | None:
        """Its instance."""
        found = sorted((self.tracing.path / "instances").glob(f"tdxtrace_{self.process.pid}_*"))
        return found[0] if found else None

    def _records(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1]
        where = self.instance
        try:
            on = where is not None and (where / "tracing_on").read_text().strip() == "1"
            stats = [] if where is None else sorted(where.glob("per_cpu/*/stats"))
            return on and any("entries: 0" not in path.read_text() for path in stats)
        except OSError:
            return False

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its status and what it said."""
        said = self.process.communicate(timeout=PATIENCE_S)[1]
        return self.process.returncode, said

    def kill(self, bench: Path) -> None:
        """End it so that it can do nothing more, and then the program that it started."""
        self.process.kill()
        self.process.wait()
        end_flood(bench)
        self.end()


def append(path: Path, line: str) -> None:
    """Append a line as a shell does: Python's own append mode seeks, which tracefs refuses."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


def end_flood(bench: Path) -> None:
    """End a program whose recorder could not: those of ours, by their ids."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == str(bench).encode():
            with suppress(ProcessLookupError):
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal(number: int, tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    """What was recorded till then is whole."""
    running = Running(tracing, bench, tmp_path / "trace.dat")
    running.process.send_signal(number)
    status, said = running.end()
    assert status == 0, said
    assert library.read_trace(tmp_path / "trace.dat").seamcalls.height > 0


def test_two_signals(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    """Impatience does not cut the tidying short."""
    running = Running(tracing, bench, tmp_path / "trace.dat")
    for _ in range(3):
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert running.end()[0] == 0


def test_kill_9_and_clean(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    before = tracing.state()
    running = Running(tracing, bench, tmp_path / "trace.dat")
    pages = tmp_path / "trace.dat.part" / "per_cpu"
    until(lambda: any(path.stat().st_size for path in pages.glob("*/trace_pipe_raw")))
    running.kill(bench)
    assert running.instance is not None
    name = running.instance.name
    assert tracing.state() != before
    assert "leftovers" in answered("capture", "doctor").text
    assert answered("capture", "clean").lines == [f"removed {name}"]
    assert answered("capture", "clean").lines == ["nothing to clean"]
    assert library.read_trace(tmp_path / "trace.dat.part").seamcalls.height > 0


@pytest.mark.parametrize("name", ["pages", "trace.dat"])
def test_the_old_recording_outlives_a_killed_one(
    name: str, tracing: Tracing, bench: Path, tmp_path: Path
) -> None:
    """Also what an earlier recorder left; both go when the new recording is whole."""
    for old in (tmp_path / name, tmp_path / f"{name}.part"):
        old.mkdir()
        (old / "capture.json").write_text("old")
    running = Running(tracing, bench, tmp_path / name, "--force")
    running.kill(bench)
    for old in (tmp_path / name, tmp_path / f"{name}.part"):
        assert (old / "capture.json").read_text() == "old"
    assert (tmp_path / f"{name}.1.part").is_dir()
    assert answered("capture", "clean").text.startswith("removed ")
    running = Running(tracing, bench, tmp_path / name, "--force")
    running.process.send_signal(signal.SIGINT)
    assert running.end()[0] == 0
    assert library.read_trace(tmp_path / name).seamcalls.height > 0
    assert list(tmp_path.glob("*.part")) == []


def test_clean_keeps_instances_in_use(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    running = Running(tracing, bench, tmp_path / "trace.dat")
    state = tracing.state()
    assert answered("capture", "clean").lines == ["nothing to clean"]
    assert tracing.state() == state
    running.process.send_signal(signal.SIGINT)
    assert running.end()[0] == 0


def test_clean_keeps_instances_of_other_tools(tracing: Tracing, bench: Path) -> None:
    """Also what merely looks like ours."""
    spot = f"{bench}:0x1000"
    names = ("tdxtrace/mine_entry", "tdxtrace_x/mine_entry", "others/mine_entry")
    instances = [tracing.path / "instances" / name for name in ("tdxtrace", "tdxtrace_x", "mine")]
    lists = tracing.path / "dynamic_events"
    try:
        for instance in instances:
            instance.mkdir()
        for name in names:
            append(lists, f"p:{name} {spot}")
        state = tracing.state()
        assert answered("capture", "clean").lines == ["nothing to clean"]
        assert tracing.state() == state
    finally:
        for name in names:
            append(lists, f"-:{name}")
        for instance in instances:
            instance.rmdir()


def test_a_second_run_beside_the_first(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    """And one after a run that was killed: neither disturbs the other."""
    first = Running(tracing, bench, tmp_path / "first")
    second = Running(tracing, bench, tmp_path / "second")
    second.process.send_signal(signal.SIGTERM)
    assert second.end()[0] == 0
    first.kill(bench)
    third = Running(tracing, bench, tmp_path / "third")
    third.process.send_signal(signal.SIGTERM)
    assert third.end()[0] == 0
    assert answered("capture", "clean").text.startswith("removed ")
    for name in ("second", "third"):
        assert library.read_trace(tmp_path / name).seamcalls.height > 0


def test_a_full_disk(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted")
    try:
        command = program("capture", "record", "--program", bench, "-o", small / "trace.dat")
        command += ["--", str(bench), "--flood", "1", "600"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
        assert done.returncode == 1
        said = done.stderr.splitlines()[-1]
        assert "the disk is full" in said
        assert f"is in {small}/trace.dat.part" in said
        assert "Traceback" not in done.stderr
        assert library.read_trace(small / "trace.dat.part").seamcalls.height > 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_reader_that_crashes(
    tracing: Tracing, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Drain, "_splice", crash)
    done = tdxtrace(
        *("capture", "record", "--program", bench, "-o", tmp_path / "x"),
        *("--", bench, "--flood", "1", "600"),
    )
    assert done.status == 1
    assert "the recording ended early: RuntimeError: a bug" in done.stderr


def test_a_probe_that_the_kernel_refuses(
    tracing: Tracing, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those before it are gone too."""
    from tdxtrace.capture.probes import Fetch

    monkeypatch.setattr(Fetch, "words", lambda *_: "x=%nonsense:x64")
    said = refused(
        1, *("capture", "record", "--program", bench, "-o", tmp_path / "x", "--duration", "1s")
    )
    assert "the kernel refuses the probe" in said
