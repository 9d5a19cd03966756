"""Threads that copy the ring buffers to disk: pages of one CPU, or text of all."""

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

# Pipe size for F_SETPIPE_SZ, fcntl(2).  The maximum for users is /proc/sys/fs/pipe-max-size, 1 MiB
# by default.
_PIPE_BYTES: Final = 1 << 20
_TEXT_BYTES: Final = 1 << 18
# The kernel wakes a reader when the buffer is half full (buffer_percent); polling writes the
# events of a quiet CPU to disk as well.
_POLL_MS: Final = 1000


@dataclass(slots=True)
class Drain:
    """Thread that copies a tracefs file to disk as it fills."""

    source: Path
    target: Path
    page_bytes: int
    """Size of a ring-buffer page in bytes; 0: the source is text."""
    failed: Callable[[], None]
    """Called when the thread ends with an error."""
    error: BaseException | None = None
    n_bytes: int = 0
    head: bytes = b""
    """Header, written to the target first."""
    _wake: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))
    _thread: Thread | None = None

    def start(self) -> None:
        """Open both files and start the thread.

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
        """Let the thread copy the remaining data, and wait for it; tracing must be off."""
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
        """Copy whole pages with splice(2), without passing them through this process."""
        end, begin = os.pipe()
        try:
            size = _grow(begin)
            while not self._is_over(source):
                self._splice(source, begin, end, target, size)
            self._splice(source, begin, end, target, size)
        finally:
            os.close(end)
            os.close(begin)
        # splice does not return pages that are not full yet (Linux kernel/trace/trace.c,
        # tracing_buffers_splice_read): read them.
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
        """Wait for data, ``stop`` or a timeout; return whether ``stop`` was called."""
        waiting = select.poll()
        waiting.register(source, select.POLLIN)
        waiting.register(self._wake, select.POLLIN)
        return any(fd == self._wake for fd, _ in waiting.poll(_POLL_MS))


def _grow(pipe: int) -> int:
    """Enlarge a pipe as far as allowed; return its size in bytes."""
    try:
        return fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)


def _read(source: int, size: int) -> bytes:
    """Read the available data, up to ``size`` bytes; empty if there is no data."""
    try:
        return os.read(source, size)
    except BlockingIOError:
        return b""


def error_text(error: BaseException) -> str:
    """Return the reason a copy ended, as text."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"{type(error).__name__}: {error}"
