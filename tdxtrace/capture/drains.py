"""Threads that take what the kernel's buffers hold: pages of one CPU, or text of all."""

from __future__ import annotations

import errno
import fcntl
import os
import select
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Final

# F_SETPIPE_SZ: fcntl(2); Python has it from 3.10 on.  What a user may have at most is
# /proc/sys/fs/pipe-max-size, 1 MiB by default.
_PIPE_BYTES: Final = 1 << 20
_TEXT_BYTES: Final = 1 << 18
# The kernel wakes a reader when the buffer is half full (buffer_percent); this is how often
# it looks by itself, so that a quiet CPU's events get to the disk.
_LOOK_MS: Final = 1000


@dataclass(slots=True)
class Drain:
    """One thread that moves data from a file of tracefs to a file of ours."""

    source: Path
    target: Path
    page_bytes: int
    """Size of a page of the buffer; 0: the source gives text."""
    failed: Callable[[], None]
    """Called when the thread ends by an error."""
    error: BaseException | None = None
    n_bytes: int = 0
    head: bytes = b""
    """What the target begins with."""
    _wake: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))
    _thread: Thread | None = None

    def start(self) -> None:
        """Open both files and begin.

        Raises:
            OSError: If one cannot be opened.
        """
        source = os.open(self.source, os.O_RDONLY | os.O_NONBLOCK)
        try:
            target = os.open(self.target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError:
            os.close(source)
            raise
        self._thread = Thread(target=self._run, args=(source, target), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let it take what is left, now that nothing more is written; wait for its end."""
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            os.close(self._wake)

    def _run(self, source: int, target: int) -> None:
        try:
            if self.head:
                self._write(target, self.head)
            (self._pages if self.page_bytes else self._text)(source, target)
        except BaseException as error:
            self.error = error
            self.failed()
        finally:
            os.close(source)
            os.close(target)

    def _pages(self, source: int, target: int) -> None:
        """Move whole pages by splice(2), which copies none of them into this process."""
        end, begin = os.pipe()
        try:
            size = _grow(begin)
            while not self._is_over(source):
                self._splice(source, begin, end, target, size)
            self._splice(source, begin, end, target, size)
        finally:
            os.close(end)
            os.close(begin)
        # What is left are pages that were not yet full: those splice does not give (Linux
        # kernel/trace/trace.c, tracing_buffers_splice_read).
        while page := _read(source, self.page_bytes):
            self._write(target, page)

    def _splice(self, source: int, begin: int, end: int, target: int, size: int) -> None:
        while True:
            try:
                taken = os.splice(source, begin, size, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return
            if not taken:
                return
            self.n_bytes += taken
            while taken:
                taken -= os.splice(end, target, taken, flags=os.SPLICE_F_MOVE)

    def _text(self, source: int, target: int) -> None:
        while not self._is_over(source):
            self._copy(source, target)
        self._copy(source, target)

    def _copy(self, source: int, target: int) -> None:
        while data := _read(source, _TEXT_BYTES):
            self._write(target, data)

    def _write(self, target: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(target, rest) :]
        self.n_bytes += len(data)

    def _is_over(self, source: int) -> bool:
        """Wait until there is enough to take, or a while; tell whether to end."""
        waiting = select.poll()
        waiting.register(source, select.POLLIN)
        waiting.register(self._wake, select.POLLIN)
        return any(fd == self._wake for fd, _ in waiting.poll(_LOOK_MS))


def _grow(pipe: int) -> int:
    """Make a pipe as large as is allowed; return its size."""
    try:
        return fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)


def _read(source: int, size: int) -> bytes:
    """Read what there is; empty if there is nothing now."""
    try:
        return os.read(source, size)
    except BlockingIOError:
        return b""


def why(error: BaseException) -> str:
    """Say what ended a drain."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"{type(error).__name__}: {error}"
