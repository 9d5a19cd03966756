"""Private tracefs instance: create, set up, read statistics, remove; and remove leftovers."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tdxtrace.capture import dynamic
from tdxtrace.capture.recipe import Recipe
from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line

_CPU: Final = re.compile(r"cpu(\d{1,4})")
_STAT: Final = re.compile(r"^(?P<key>[a-z ]{3,20}): (?P<n>\d{1,18})\s*$", re.MULTILINE)
_DATA: Final = re.compile(r"field: char data;\s*offset:(\d+);\s*size:(\d+);")
# The kernel refuses removal while the buffer is being read; readers end within this time.
_REMOVE_TIMEOUT_S: Final = 5.0
_PAUSE_S: Final = 0.05
# Counters of per_cpu/cpuN/stats that count lost events: Linux
# Documentation/trace/ftrace.rst.
LOST: Final = ("overrun", "commit overrun", "dropped events")


def page_bytes(header_page: str) -> int:
    """Return the size of a ring-buffer page in bytes, header included."""
    found = _DATA.search(header_page)
    return int(found[1]) + int(found[2]) if found else 4096


@dataclass(frozen=True, slots=True)
class Instance:
    """The tracefs instance ``name``."""

    tracefs: Path
    name: str

    @property
    def path(self) -> Path:
        """Directory of the instance."""
        return self.tracefs / "instances" / self.name

    def create(self) -> None:
        """Create the instance.

        Raises:
            InputError: If the kernel refuses.
        """
        try:
            self.path.mkdir()
        except OSError as error:
            raise InputError(
                f"cannot make the instance {self.name}: {error.strerror}; see: tdxtrace capture "
                "doctor"
            ) from None

    def set_up(self, recipe: Recipe, buffer_kb: int, pids: Iterable[int]) -> None:
        """Set clock, buffer, options, filters and events; tracing stays off.

        Raises:
            InputError: If a write is refused; the message has the text and the file.
        """
        self.write("tracing_on", "0")
        self.write("trace_clock", recipe.clock)
        self.write("buffer_size_kb", str(buffer_kb))
        # Set the page size of the top-level buffer, which header_page describes (Linux 6.8).
        kib = page_bytes((self.tracefs / "events/header_page").read_text()) // 1024
        self.write("buffer_subbuf_size_kb", str(kib), optional=True)
        self.write("options/record-tgid", "1", optional=True)
        chosen = " ".join(map(str, pids))
        if chosen:
            self.write("options/event-fork", "1", optional=True)
            self.write("set_event_pid", chosen)
        for event in recipe.events:
            if event.filter:
                self.write(f"events/{event.name}/filter", event.filter)
        for name in [p.name for p in recipe.probes] + [e.name for e in recipe.events]:
            self.write(f"events/{name}/enable", "1")

    def write(self, file: str, text: str, *, optional: bool = False) -> None:
        """Write a file of the instance.

        Raises:
            InputError: If the kernel refuses and it is not ``optional``.
        """
        try:
            fd = os.open(self.path / file, os.O_WRONLY)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            if not optional:
                reason = f"cannot write {one_line(text, 60)!r} to {file}: {error.strerror}"
                raise InputError(reason) from None

    def cpus(self) -> list[int]:
        """Return the CPUs that have a buffer."""
        found = (_CPU.fullmatch(path.name) for path in (self.path / "per_cpu").iterdir())
        return sorted(int(match[1]) for match in found if match)

    def stats_text(self, cpu: int) -> str:
        """Return the kernel's statistics of a CPU's buffer as text."""
        try:
            return (self.path / f"per_cpu/cpu{cpu}/stats").read_text("ascii", "replace")
        except OSError:
            return ""

    def stats(self, cpu: int) -> dict[str, int]:
        """Return the kernel's statistics of a CPU's buffer as numbers."""
        return parse_stats(self.stats_text(cpu))

    def switch(self, *, on: bool) -> None:
        """Start or stop tracing."""
        self.write("tracing_on", "1" if on else "0", optional=not on)

    def remove(self) -> str:
        """Stop tracing and remove the instance; return "" or the reason it could not be removed."""
        until = time.monotonic() + _REMOVE_TIMEOUT_S
        while self.path.exists():
            self.switch(on=False)
            self.write("events/enable", "0", optional=True)
            try:
                self.path.rmdir()
            except OSError as error:
                if time.monotonic() > until:
                    return error.strerror or "refused"
                time.sleep(_PAUSE_S)
        return ""


def parse_stats(stats: str) -> dict[str, int]:
    """Parse per_cpu/cpuN/stats."""
    return {found["key"]: int(found["n"]) for found in _STAT.finditer(stats)}


@dataclass(frozen=True, slots=True)
class CleanResult:
    """Result of removing leftovers."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    """Names, with the reason they could not be removed."""


def clean(tracefs: Path) -> CleanResult:
    """Remove instances and probes of killed recorders, and nothing else.

    Their names contain the PID and start time of the recorder; if that process has ended, they are
    removed.  A running recorder in another PID namespace keeps its instance open, so that the
    kernel refuses to remove it; its probes are then kept too.
    """
    removed, kept = [], []
    for name in dynamic.leftovers(tracefs):
        left = Instance(tracefs, name).remove()
        why = [left] if left else dynamic.remove(tracefs, name)
        if why:
            kept.append(f"{name}: {'; '.join(why)}")
        else:
            removed.append(name)
    return CleanResult(tuple(removed), tuple(kept))
