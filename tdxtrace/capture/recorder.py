"""Recording: probes and an instance of our own, a thread per CPU, everything gone afterwards."""

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
from tdxtrace.capture.datwriter import write_dat
from tdxtrace.capture.drains import Drain, why
from tdxtrace.capture.host import Host
from tdxtrace.capture.instance import LOST, Instance
from tdxtrace.capture.provenance import Tellings, provenance
from tdxtrace.capture.recipe import Recipe
from tdxtrace.capture.recording import Recording, work_folders
from tdxtrace.errors import InputError
from tdxtrace.tables.files import give_name
from tdxtrace.tables.text import one_line

_ENDINGS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_S: Final = 1.0
# How long the command may take to end after SIGTERM.
_PATIENCE_S: Final = 5.0
# VMs come and go slowly; looking for them reads all of /proc.
_LOOK_FOR_VMS_S: Final = 10.0


class Form(StrEnum):
    """What is written."""

    dat = "trace.dat"
    text = "text"
    pages = "pages"


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be recorded, where to, and for how long."""

    recipe: Recipe
    output: Path
    form: Form
    buffer_kb: int
    duration_s: float | None = None
    command: Sequence[str] = ()
    pids: Sequence[int] = ()
    say: Callable[[str], None] = field(default=lambda _: None)
    """Told of losses while they happen."""
    leftovers: Sequence[Path] = ()
    """Folders of earlier recordings, removed when this one is whole."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a recording ended."""

    provenance: dict[str, Any]
    n_bytes: int
    seconds: float
    status: int | None
    """Of the command, if one was run and ended."""


def record(host: Host, order: Order) -> Outcome:
    """Record until the command ends, the time is over, or SIGINT, SIGTERM or SIGHUP comes.

    Whatever happens, the probes and the instance are removed; only a kill -9 leaves them,
    for :func:`tdxtrace.capture.clean.clean`.  Nothing is written but lines of ours in
    dynamic_events and files of the instance.

    Args:
        host: The machine.
        order: What to record.

    Raises:
        InputError: If something cannot be made, read or written.  What was recorded till
            then is kept in the folder that the message names.
    """
    tracefs = host.tracefs
    if tracefs is None:
        raise InputError("tracefs is not mounted; see: tdxtrace capture doctor")
    name = order.recipe.wish.group
    instance = Instance(tracefs, name)
    with ended_by_signals() as ended, made_instance(instance, order):
        return _Session(host, order, instance, ended).run()


@contextmanager
def ended_by_signals() -> Iterator[Event]:
    """Give an event that is set when the user, or the system, wants the end."""
    ended = Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in _ENDINGS}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def made_instance(instance: Instance, order: Order) -> Iterator[None]:
    """Make the probes and the instance; remove both, in the other order, in the end.

    Raises:
        InputError: If the kernel refuses one.
    """
    try:
        _add_probes(instance.tracefs, order.recipe)
        instance.create()
        instance.set_up(order.recipe, order.buffer_kb, order.pids)
        yield
    finally:
        left = instance.remove()
        kept = [left] if left else []
        kept += dynamic.remove(instance.tracefs, instance.name)
        if kept:
            order.say(f"not removed: {'; '.join(kept)}; run: tdxtrace capture clean")


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
    """The time between the first event and the last."""

    host: Host
    order: Order
    instance: Instance
    ended: Event
    drains: list[Drain] = field(default_factory=list)
    child: subprocess.Popen[bytes] | None = None
    tellings: Tellings = field(default_factory=Tellings)
    _lost: dict[int, int] = field(default_factory=dict)

    def run(self) -> Outcome:
        """Record until the order says so, and say what came of it.

        Raises:
            InputError: If the kernel refuses something, or the output cannot be written.
        """
        order = self.order
        _, folder = work_folders(order.output)
        recording = Recording(folder, self.instance.tracefs, self.host.release)
        try:
            recording.begin(self.instance, order.recipe)
            began = time.monotonic()
            self._start(recording)
            self._wait(recording)
            seconds = time.monotonic() - began
        except OSError as error:
            self._stop()
            raise InputError(f"cannot record: {why(error)}{_kept(folder)}") from None
        except BaseException:
            self._stop()
            raise
        self._stop()
        return self._finish(recording, seconds)

    def _start(self, recording: Recording) -> None:
        self.drains = list(self._drains(recording))
        for drain in self.drains:
            drain.start()
        self.instance.switch(on=True)
        if self.order.command:
            self.child = subprocess.Popen(self.order.command)

    def _drains(self, recording: Recording) -> Iterator[Drain]:
        per_cpu = self.instance.path
        if self.order.form is Form.text:
            head = f"# tracer: nop\n#\n# os release : {self.host.release}\n"
            head += f"# clockid: {self.order.recipe.clock}\n"
            target = recording.folder / "trace.txt"
            source = per_cpu / "trace_pipe"
            yield Drain(source, target, 0, self.ended.set, head=head.encode())
            return
        size = recording.page_bytes
        for cpu in self.instance.cpus():
            source = per_cpu / f"per_cpu/cpu{cpu}/trace_pipe_raw"
            yield Drain(source, recording.pages_of(cpu), size, self.ended.set)

    def _wait(self, recording: Recording) -> None:
        begun = time.monotonic()
        looked = begun - _LOOK_FOR_VMS_S
        while not self.ended.is_set():
            now = time.monotonic()
            if now - looked >= _LOOK_FOR_VMS_S:
                self.tellings.look()
                looked = now
            recording.meet_threads()
            self._report()
            left = _LOOK_S
            if self.order.duration_s is not None:
                left = min(left, begun + self.order.duration_s - now)
            if left <= 0 or self._child_ended(left):
                return

    def _child_ended(self, seconds: float) -> bool:
        """Wait for the end of the command, or of all; a signal cuts the waiting short."""
        if self.child is None:
            self.ended.wait(seconds)
            return False
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.ended.is_set():
            if self.child.poll() is not None:
                return True
            self.ended.wait(0.02)
        return False

    def _report(self) -> None:
        """Say of each CPU what it lost since the last look."""
        for cpu in self.instance.cpus():
            stats = self.instance.stats(cpu)
            lost = sum(stats.get(key, 0) for key in LOST)
            new = lost - self._lost.get(cpu, 0)
            if new > 0:
                self.order.say(
                    f"CPU {cpu} lost {new:,} events: its buffer of {self.order.buffer_kb} KiB is "
                    "full; record with a larger --buffer, or fewer events (--level minimal)"
                )
            self._lost[cpu] = lost

    def _stop(self) -> None:
        self.instance.switch(on=False)
        for drain in self.drains:
            drain.stop()
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()

    def _finish(self, recording: Recording, seconds: float) -> Outcome:
        order, folder = self.order, recording.folder
        self._report()
        self.tellings.look()
        told = provenance(self.host, order.recipe, self.instance, order.buffer_kb, self.tellings)
        told["seconds"] = round(seconds, 3)
        n_bytes = sum(drain.n_bytes for drain in self.drains)
        try:
            recording.finish(self.instance, told)
            broken = next((drain.error for drain in self.drains if drain.error), None)
            if broken is not None:
                raise InputError(f"the recording ended early: {why(broken)}{_kept(folder)}")
            _deliver(recording, order, told)
        except OSError as error:
            raise InputError(f"cannot write the recording: {why(error)}{_kept(folder)}") from None
        status = None if self.child is None else self.child.poll()
        return Outcome(told, n_bytes, seconds, status)


def _deliver(recording: Recording, order: Order, told: dict[str, Any]) -> None:
    """Give the user what was asked for, in place of the folder."""
    folder = recording.folder
    if order.form is Form.pages:
        give_name(folder, order.output)
    else:
        if order.form is Form.text:
            give_name(folder / "trace.txt", order.output)
        else:
            name = os.uname()
            uname = f"{name.sysname} {name.nodename} {name.release} {name.machine}"
            write_dat(folder, order.output, uname, f"tdxtrace {told['tdxtrace']}")
        beside = order.output.with_name(order.output.name + ".capture.json")
        give_name(folder / "capture.json", beside)
        recording.discard()
    for path in order.leftovers:
        shutil.rmtree(path, ignore_errors=True)


def _kept(folder: Path) -> str:
    """Where what was recorded till then is."""
    shown = one_line(str(folder))
    return f"; what was recorded till then is in {shown}" if folder.exists() else ""
