"""The kernel's own locks: waited for, in turn, unlike the module's."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Protocol

import simpy

from tdxtrace.simulate.threads import Thread

Wait = Generator[simpy.Event, object, None]


class RwLock:
    """A fair reader-writer lock: who asks later than a waiting writer waits behind it.

    Linux rwlock_t on x86 is a queued lock (kernel/locking/qrwlock.c): readers join
    readers until a writer queues.
    """

    __slots__ = ("_env", "_queue", "n_readers", "writing")

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._queue: deque[tuple[bool, simpy.Event]] = deque()
        self.n_readers = 0
        self.writing = False

    def try_read(self) -> bool:
        """Take it shared if nobody has it alone or waits for that."""
        if self.writing or self._queue:
            return False
        self.n_readers += 1
        return True

    def read(self) -> Wait:
        """Take it shared, waiting if need be."""
        if not self.try_read():
            yield self._wait(False)

    def write(self) -> Wait:
        """Take it alone, waiting if need be."""
        if self.writing or self.n_readers or self._queue:
            yield self._wait(True)
        else:
            self.writing = True

    def release(self) -> None:
        """Give it back, and let in who is next."""
        if self.writing:
            self.writing = False
        else:
            self.n_readers -= 1
        while self._queue and not self.writing:
            wants_alone, event = self._queue[0]
            if wants_alone and self.n_readers:
                return
            self._queue.popleft()
            self.writing = wants_alone
            self.n_readers += not wants_alone
            event.succeed()

    def _wait(self, alone: bool) -> simpy.Event:
        event = self._env.event()
        self._queue.append((alone, event))
        return event


class Runner(Protocol):
    """What can have a processor: a vCPU's thread, or another of the VMM's."""

    thread: Thread
    inside: bool

    def kick(self, entry: int | None = None) -> None:
        """Be sent out of the guest, if in one."""


class Cpus:
    """The processors: a thread runs on one, keeps it while it can, and waits if there is none."""

    __slots__ = ("_env", "_free", "_waiting", "current")

    def __init__(self, env: simpy.Environment, n: int) -> None:
        self._env = env
        self._free = list(range(n))
        self._waiting: deque[simpy.Event] = deque()
        self.current: list[Runner | None] = [None] * n
        """Who runs on each."""

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for a processor."""
        return bool(self._waiting)

    def take(self, who: Runner, last: int) -> Generator[simpy.Event, int, int]:
        """Get a processor, the one named ``last`` if it is free; returns its number."""
        if self._free:
            cpu = last if last in self._free else self._free[0]
            self._free.remove(cpu)
        else:
            event = self._env.event()
            self._waiting.append(event)
            cpu = yield event
        self.current[cpu] = who
        return cpu

    def give(self, cpu: int) -> None:
        """Leave a processor to whoever waits longest."""
        self.current[cpu] = None
        if self._waiting:
            self._waiting.popleft().succeed(cpu)
        else:
            self._free.append(cpu)
            self._free.sort()
