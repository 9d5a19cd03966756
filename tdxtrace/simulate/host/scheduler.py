"""Kernel locks and CPUs, with queues of waiting threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Protocol, TypeVar

import simpy

from tdxtrace.simulate.thread import Thread

T = TypeVar("T")
SimProcess = Generator[simpy.Event, object, T]
"""A generator that simpy runs as a process; it ends with a value of type T."""


class RwLock:
    """A fair reader-writer lock.

    Linux rwlock_t on x86 is a queued lock (kernel/locking/qrwlock.c): readers join
    readers until a writer queues; later threads queue after a waiting writer.
    """

    __slots__ = ("_env", "_queue", "n_readers", "writing")

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._queue: deque[tuple[bool, simpy.Event]] = deque()
        self.n_readers = 0
        self.writing = False

    def try_read(self) -> bool:
        """Acquire the lock for reading unless a writer holds it or waits for it."""
        if self.writing or self._queue:
            return False
        self.n_readers += 1
        return True

    def read(self) -> SimProcess[None]:
        """Acquire the lock for reading, waiting if necessary."""
        if not self.try_read():
            yield self._wait(for_writing=False)

    def write(self) -> SimProcess[None]:
        """Acquire the lock for writing, waiting if necessary."""
        if self.writing or self.n_readers or self._queue:
            yield self._wait(for_writing=True)
        else:
            self.writing = True

    def release(self) -> None:
        """Release the lock, and wake the waiters that can acquire it now."""
        if self.writing:
            self.writing = False
        else:
            self.n_readers -= 1
        while self._queue and not self.writing:
            for_writing, event = self._queue[0]
            if for_writing and self.n_readers:
                return
            self._queue.popleft()
            self.writing = for_writing
            self.n_readers += not for_writing
            event.succeed()

    def _wait(self, for_writing: bool) -> simpy.Event:
        event = self._env.event()
        self._queue.append((for_writing, event))
        return event


class Task(Protocol):
    """A task that runs on a CPU: the thread of a vCPU, or another thread of the VMM."""

    thread: Thread
    inside: bool
    """Whether it runs a guest."""

    def kick(self, entry: int | None = None) -> None:
        """Deliver an IPI that ends a VM entry in progress."""


class CpuScheduler:
    """The CPUs: a thread keeps its CPU if possible, and queues if none is free."""

    __slots__ = ("_env", "_free", "_waiting", "current")

    def __init__(self, env: simpy.Environment, n: int) -> None:
        self._env = env
        self._free = list(range(n))
        self._waiting: deque[simpy.Event] = deque()
        self.current: list[Task | None] = [None] * n
        """The task that runs on each CPU."""

    @property
    def has_waiters(self) -> bool:
        """Return whether a task waits for a CPU."""
        return bool(self._waiting)

    def acquire(self, task: Task, last: int) -> Generator[simpy.Event, int, int]:
        """Wait for a CPU, preferably the one numbered ``last``; returns its number."""
        if self._free:
            cpu = last if last in self._free else self._free[0]
            self._free.remove(cpu)
        else:
            event = self._env.event()
            self._waiting.append(event)
            cpu = yield event
        self.current[cpu] = task
        return cpu

    def release(self, cpu: int) -> None:
        """Release a CPU; the task that has waited longest gets it."""
        self.current[cpu] = None
        if self._waiting:
            self._waiting.popleft().succeed(cpu)
        else:
            self._free.append(cpu)
            self._free.sort()
