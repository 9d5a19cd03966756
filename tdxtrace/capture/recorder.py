"""Recorder: adds probes and a private instance, copies its buffers to disk, removes both."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any, Final

from tdxtrace.capture import dynamic
from tdxtrace.capture.datwriter import VmObserver, provenance, write_dat
from tdxtrace.capture.drains import Drain, error_text
from tdxtrace.capture.host import Host
from tdxtrace.capture.instance import LOST, Instance
from tdxtrace.capture.recipe import Recipe
from tdxtrace.capture.recording import RecordingFolder, work_folders
from tdxtrace.errors import InputError
from tdxtrace.tables.files import rename_into_place
from tdxtrace.tables.text import one_line

_ENDINGS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_S: Final = 1.0
# Time that the command has to end after SIGTERM.
_TERMINATE_TIMEOUT_S: Final = 5.0
# Interval of searches for VMs, which read all of /proc.
_VM_SCAN_S: Final = 10.0


class OutputForm(StrEnum):
    """Format of the output."""

    dat = "trace.dat"
    text = "text"
    pages = "pages"


@dataclass(frozen=True, slots=True)
class RecordingPlan:
    """Recipe, output, duration and further options of a recording."""

    recipe: Recipe
    output: Path
    form: OutputForm
    buffer_kb: int
    duration_s: float | None = None
    command: Sequence[str] = ()
    pids: Sequence[int] = ()
    say: Callable[[str], None] = field(default=lambda _: None)
    """Called with a message when events are lost, and when something cannot be removed."""
    leftovers: Sequence[Path] = ()
    """Directories of incomplete recordings, removed when this one is complete."""
    report: Callable[[int, int], None] = field(default=lambda _recorded, _lost: None)
    """Called every second with the events recorded and lost so far."""


@dataclass(frozen=True, slots=True)
class RecordingResult:
    """Result of a recording."""

    provenance: dict[str, Any]
    n_bytes: int
    seconds: float
    status: int | None
    """Exit status of the command; None if no command was run, or the recorder stopped it."""

    def summary(self, output: Path) -> str:
        """Return one line with the numbers of events recorded and lost, and the output."""
        n, n_lost = self.provenance["read_events"], self.provenance["lost_events"]
        lost = f"{n_lost:,} lost" if n_lost else "none lost"
        sidecar = "" if output.is_dir() else f" and {output.name}.capture.json"
        hint = "" if n else "; no TD ran, or nothing was probed: see tdxtrace capture doctor"
        return (
            f"{n:,} events in {self.seconds:.1f} s, {lost}, {self.n_bytes / 1e6:.1f} MB; "
            f"wrote {output}{sidecar}{hint}"
        )


def record(host: Host, plan: RecordingPlan) -> RecordingResult:
    """Record until the command ends, the duration has passed, or SIGINT, SIGTERM or SIGHUP.

    Probes and instance are always removed, except after SIGKILL; see
    :func:`tdxtrace.capture.instance.clean`.  In tracefs only dynamic_events and the instance are
    written.

    Args:
        host: The machine.
        plan: Recipe, output, duration and further options.

    Raises:
        InputError: If something cannot be created, read or written.  Data recorded so far is kept
            in the directory that the message names.
    """
    tracefs = host.tracefs
    if tracefs is None:
        raise InputError("tracefs is not mounted; see: tdxtrace capture doctor")
    name = plan.recipe.options.group
    instance = Instance(tracefs, name)
    with stop_on_signals() as ended, temporary_instance(instance, plan):
        return _Session(host, plan, instance, ended).run()


@contextmanager
def stop_on_signals() -> Iterator[Event]:
    """Yield an event that SIGINT, SIGTERM and SIGHUP set."""
    ended = Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    previous_handlers = {number: signal.signal(number, end) for number in _ENDINGS}
    try:
        yield ended
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def temporary_instance(instance: Instance, plan: RecordingPlan) -> Iterator[None]:
    """Create the probes and the instance; remove the instance and then the probes on exit.

    Raises:
        InputError: If the kernel refuses a probe or the instance.
    """
    try:
        _add_probes(instance.tracefs, plan.recipe)
        instance.create()
        instance.set_up(plan.recipe, plan.buffer_kb, plan.pids)
        yield
    finally:
        left = instance.remove()
        kept = [left] if left else []
        kept += dynamic.remove(instance.tracefs, instance.name)
        if kept:
            plan.say(f"not removed: {'; '.join(kept)}; run: tdxtrace capture clean")


def _add_probes(tracefs: Path, recipe: Recipe) -> None:
    try:
        dynamic.add(tracefs, (probe.line for probe in recipe.probes))
    except OSError as error:
        line = one_line(str(error.filename or ""), 120)
        raise InputError(
            f"the kernel refuses the probe {line!r}: {error.strerror}; see: tdxtrace capture doctor"
        ) from None


@dataclass(slots=True)
class _Session:
    """One recording from start to end."""

    host: Host
    plan: RecordingPlan
    instance: Instance
    ended: Event
    drains: list[Drain] = field(default_factory=list)
    child: subprocess.Popen[bytes] | None = None
    vm_observer: VmObserver = field(default_factory=VmObserver)
    _lost: dict[int, int] = field(default_factory=dict)

    def run(self) -> RecordingResult:
        """Record as planned.

        Raises:
            InputError: If the kernel refuses a request, or the output cannot be written.
        """
        plan = self.plan
        _, folder = work_folders(plan.output)
        recording = RecordingFolder(folder, self.instance.tracefs, self.host.release)
        try:
            recording.begin(self.instance, plan.recipe)
            began = time.monotonic()
            self._start(recording)
            self._wait(recording)
            seconds = time.monotonic() - began
        except OSError as error:
            self._stop()
            raise InputError(
                f"cannot record: {error_text(error)}{_location_hint(folder)}"
            ) from None
        except BaseException:
            self._stop()
            raise
        self._stop()
        return self._finish(recording, seconds)

    def _start(self, recording: RecordingFolder) -> None:
        self.drains = list(self._drains(recording))
        for drain in self.drains:
            drain.start()
        self.instance.switch(on=True)
        if self.plan.command:
            self.child = subprocess.Popen(self.plan.command)

    def _drains(self, recording: RecordingFolder) -> Iterator[Drain]:
        per_cpu = self.instance.path
        if self.plan.form is OutputForm.text:
            head = f"# tracer: nop\n#\n# os release : {self.host.release}\n"
            head += f"# clockid: {self.plan.recipe.clock}\n"
            target = recording.folder / "trace.txt"
            source = per_cpu / "trace_pipe"
            yield Drain(source, target, 0, self.ended.set, head=head.encode())
            return
        size = recording.page_bytes
        for cpu in self.instance.cpus():
            source = per_cpu / f"per_cpu/cpu{cpu}/trace_pipe_raw"
            yield Drain(source, recording.pages_of(cpu), size, self.ended.set)

    def _wait(self, recording: RecordingFolder) -> None:
        begun = time.monotonic()
        last_scan = begun - _VM_SCAN_S
        while not self.ended.is_set():
            now = time.monotonic()
            if now - last_scan >= _VM_SCAN_S:
                self.vm_observer.observe()
                last_scan = now
            recording.record_threads()
            self._report_losses()
            left = _POLL_S
            if self.plan.duration_s is not None:
                left = min(left, begun + self.plan.duration_s - now)
            if left <= 0 or self._child_ended(left):
                return

    def _child_ended(self, seconds: float) -> bool:
        """Wait up to ``seconds``, or for a signal; return whether the command has ended."""
        if self.child is None:
            self.ended.wait(seconds)
            return False
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.ended.is_set():
            if self.child.poll() is not None:
                return True
            self.ended.wait(0.02)
        return False

    def _report_losses(self) -> None:
        """Report the events that each CPU lost since the last report."""
        recorded = 0
        for cpu in self.instance.cpus():
            stats = self.instance.stats(cpu)
            recorded += stats.get("entries", 0) + stats.get("read events", 0)
            lost = sum(stats.get(key, 0) for key in LOST)
            new = lost - self._lost.get(cpu, 0)
            if new > 0:
                self.plan.say(
                    f"CPU {cpu} lost {new:,} events: its buffer of {self.plan.buffer_kb} KiB is "
                    "full; record with a larger --buffer, or fewer events (--level minimal)"
                )
            self._lost[cpu] = lost
        self.plan.report(recorded, sum(self._lost.values()))

    def _stop(self) -> None:
        self.instance.switch(on=False)
        for drain in self.drains:
            drain.stop()
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(_TERMINATE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()

    def _finish(self, recording: RecordingFolder, seconds: float) -> RecordingResult:
        plan, folder = self.plan, recording.folder
        self._report_losses()
        self.vm_observer.observe()
        facts = provenance(self.host, plan.recipe, self.instance, plan.buffer_kb, self.vm_observer)
        facts["seconds"] = round(seconds, 3)
        n_bytes = sum(drain.n_bytes for drain in self.drains)
        try:
            recording.finish(self.instance, facts)
            failure = next((drain.error for drain in self.drains if drain.error), None)
            if failure is not None:
                raise InputError(
                    f"the recording ended early: {error_text(failure)}{_location_hint(folder)}"
                )
            _write_output(recording, plan, facts)
        except OSError as error:
            raise InputError(
                f"cannot write the recording: {error_text(error)}{_location_hint(folder)}"
            ) from None
        status = None if self.child is None else self.child.poll()
        return RecordingResult(facts, n_bytes, seconds, status)


def _write_output(recording: RecordingFolder, plan: RecordingPlan, facts: dict[str, Any]) -> None:
    """Convert the temporary directory to the requested output, and remove it."""
    folder = recording.folder
    if plan.form is OutputForm.pages:
        rename_into_place(folder, plan.output)
    else:
        if plan.form is OutputForm.text:
            rename_into_place(folder / "trace.txt", plan.output)
        else:
            name = os.uname()
            uname = f"{name.sysname} {name.nodename} {name.release} {name.machine}"
            write_dat(folder, plan.output, uname, f"tdxtrace {facts['tdxtrace']}")
        sidecar = plan.output.with_name(plan.output.name + ".capture.json")
        rename_into_place(folder / "capture.json", sidecar)
        recording.discard()
    for path in plan.leftovers:
        shutil.rmtree(path, ignore_errors=True)


def _location_hint(folder: Path) -> str:
    """Return the part of an error message that names the directory with the recorded data."""
    shown = one_line(str(folder))
    return f"; data recorded so far is in {shown}" if folder.exists() else ""
