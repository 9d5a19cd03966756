"""An instance that is looked at while it runs: what its buffers hold, taken page by page."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tdxtrace.capture.choose import order_of
from tdxtrace.capture.host import Host
from tdxtrace.capture.instance import Instance, page_bytes
from tdxtrace.capture.options import RecordOptions
from tdxtrace.capture.recorder import made_instance
from tdxtrace.capture.recording import comms_of
from tdxtrace.errors import InputError

# The reader's own page, and one that is half written: Linux kernel/trace/ring_buffer.c.
_SPARE_PAGES: Final = 2


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found."""

    pages: dict[int, bytes]
    until_ns: int
    """Events up to then are all here."""
    comms: dict[int, str]


@dataclass(slots=True)
class Live:
    """An instance that runs."""

    instance: Instance
    header_page: str
    formats: list[tuple[str, bytes]]
    """Group and format of each event."""
    page_bytes: int
    most_pages: int
    """Pages of a CPU's buffer: nothing from before a look can lie behind so many."""
    files: dict[int, int] = field(default_factory=dict)
    """The open buffer of each CPU."""

    def look(self) -> Look:
        """Take what the buffers hold now.

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
        return Look(pages, until, comms_of(self.instance.tracefs))

    def _pages(self, fd: int) -> Iterator[bytes]:
        for _ in range(self.most_pages):
            try:
                page = os.read(fd, self.page_bytes)
            except BlockingIOError:
                return
            if not page:
                return
            yield page


@contextmanager
def live(host: Host, wanted: RecordOptions) -> Iterator[Live]:
    """Trace in an instance of our own as long as the context lasts; remove it and the probes.

    Raises:
        InputError: If something cannot be made or read; says what to do.
    """
    order = order_of(host, wanted, lambda _: None, is_written=False)
    tracefs = host.tracefs
    assert tracefs is not None
    instance = Instance(tracefs, order.recipe.wish.group)
    with made_instance(instance, order), ExitStack() as files:
        events = tracefs / "events"
        header = (events / "header_page").read_text()
        names = [p.name for p in order.recipe.probes] + [e.name for e in order.recipe.events]
        formats = [
            (name.partition("/")[0], (events / name / "format").read_bytes()) for name in names
        ]
        size = page_bytes(header)
        made = Live(instance, header, formats, size, order.buffer_kb * 1024 // size + _SPARE_PAGES)
        for cpu in instance.cpus():
            made.files[cpu] = _open(instance.path / f"per_cpu/cpu{cpu}/trace_pipe_raw", files)
        instance.switch(on=True)
        yield made


def _open(path: Path, files: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    files.callback(os.close, fd)
    return fd
