"""Live instance: read the pages of the ring buffers while tracing continues."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tdxtrace.capture.choose import plan_recording
from tdxtrace.capture.host import Host
from tdxtrace.capture.instance import Instance, page_bytes
from tdxtrace.capture.options import RecordOptions
from tdxtrace.capture.recorder import temporary_instance
from tdxtrace.capture.recording import comms_of
from tdxtrace.errors import InputError

# The reader page, and one being written: Linux kernel/trace/ring_buffer.c.
_MARGIN_PAGES: Final = 2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Contents of the buffers at one time."""

    pages: dict[int, bytes]
    until_ns: int
    """All events up to this time (CLOCK_MONOTONIC, ns) are in ``pages`` or an earlier snapshot."""
    comms: dict[int, str]


@dataclass(slots=True)
class LiveInstance:
    """Instance that is tracing."""

    instance: Instance
    header_page: str
    formats: list[tuple[str, bytes]]
    """Group and format of each event."""
    page_bytes: int
    max_pages: int
    """Maximum number of pages per CPU and snapshot: the size of its buffer."""
    files: dict[int, int] = field(default_factory=dict)
    """File descriptor of trace_pipe_raw, by CPU."""

    def read_buffers(self) -> Snapshot:
        """Read the current contents of all buffers.

        Raises:
            InputError: If a buffer cannot be read.
        """
        until = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        pages = {}
        try:
            for cpu, fd in self.files.items():
                pages[cpu] = b"".join(self._pages(fd))
        except OSError as error:
            raise InputError(f"cannot read the buffer of a CPU: {error.strerror}") from None
        return Snapshot(pages, until, comms_of(self.instance.tracefs))

    def _pages(self, fd: int) -> Iterator[bytes]:
        for _ in range(self.max_pages):
            try:
                page = os.read(fd, self.page_bytes)
            except BlockingIOError:
                return
            if not page:
                return
            yield page


@contextmanager
def live_instance(host: Host, options: RecordOptions) -> Iterator[LiveInstance]:
    """Trace in a private instance within the context; on exit remove it and its probes.

    Raises:
        InputError: If something cannot be created or read; the message has the remedy.
    """
    plan = plan_recording(host, options, lambda _: None, is_written=False)
    tracefs = host.tracefs
    assert tracefs is not None
    instance = Instance(tracefs, plan.recipe.options.group)
    with temporary_instance(instance, plan), ExitStack() as files:
        events = tracefs / "events"
        header = (events / "header_page").read_text()
        names = [p.name for p in plan.recipe.probes] + [e.name for e in plan.recipe.events]
        formats = [
            (name.partition("/")[0], (events / name / "format").read_bytes()) for name in names
        ]
        size = page_bytes(header)
        made = LiveInstance(
            instance, header, formats, size, plan.buffer_kb * 1024 // size + _MARGIN_PAGES
        )
        for cpu in instance.cpus():
            made.files[cpu] = _open(instance.path / f"per_cpu/cpu{cpu}/trace_pipe_raw", files)
        instance.switch(on=True)
        yield made


def _open(path: Path, files: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    files.callback(os.close, fd)
    return fd
