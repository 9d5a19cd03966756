"""Engines that run independent tasks in processes of this machine or of a Dask cluster.

An engine does not retry a task whose worker died; the caller may submit it again.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from typing import Any, Final, Protocol

from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line

Run = Callable[[Any], Any]
LOCAL: Final = "local"


class Engine(Protocol):
    """Runs tasks; the caller has at most ``n_workers`` of them in flight."""

    n_workers: int
    dashboard: str | None
    """Address of a web page that shows the running tasks; None: no such page."""

    def submit(self, run: Run, task: Any, *, is_big: bool = False) -> None:  # noqa: ANN401
        """Start ``run(task)`` on a worker; a big task on a worker with the resource ``big``."""

    def as_completed(self) -> Iterator[tuple[Any, Any]]:
        """Yield each task with its result as it completes, until no task is in flight.

        The result is None if the worker died. Tasks may be submitted meanwhile.
        """

    def close(self) -> None:
        """End the workers."""


def use_one_thread() -> None:
    """Limit polars and OpenBLAS to one thread; must be called before they are imported."""
    os.environ |= {"POLARS_MAX_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class LocalEngine:
    """Processes of this machine, each in its own pool, so that a crash ends only one task."""

    dashboard: str | None = None

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        self._idle = [self._pool() for _ in range(n_workers)]
        self._running: dict[Future[Any], tuple[ProcessPoolExecutor, Any]] = {}

    def _pool(self) -> ProcessPoolExecutor:
        # spawn, as threads of polars and numba do not survive a fork.
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=spawn, initializer=use_one_thread)

    def submit(self, run: Run, task: Any, *, is_big: bool = False) -> None:  # noqa: ANN401
        """Start ``run(task)`` in an idle process."""
        pool = self._idle.pop()
        self._running[pool.submit(run, task)] = (pool, task)

    def as_completed(self) -> Iterator[tuple[Any, Any]]:
        """Yield tasks with their results; see :class:`Engine`."""
        while self._running:
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                pool, task = self._running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    pool.shutdown(wait=False)
                    pool, result = self._pool(), None
                self._idle.append(pool)
                yield task, result

    def close(self) -> None:
        """End the processes."""
        for pool in [*self._idle, *(pool for pool, _ in self._running.values())]:
            pool.shutdown(cancel_futures=True)


class DaskEngine:
    """Workers of a Dask cluster, which may be started on this machine.

    Args:
        address: Address of the scheduler, tcp://…; ``local``: start a cluster.
        n_workers: Number of workers of a local cluster.
        memory: Memory limit of each of these in bytes; None: Dask's default.

    Raises:
        InputError: If Dask is not installed, or no scheduler answers.
    """

    def __init__(self, address: str, n_workers: int, memory: int | None = None) -> None:
        try:
            # An optional dependency, and without types.
            dask: Any = import_module("dask")
            distributed: Any = import_module("distributed")
        except ImportError:
            raise InputError("--cluster needs Dask; pip install 'tdxtrace[fleet]'") from None
        # Dask must not retry tasks: the caller counts the tries of each task.
        dask.config.set({"distributed.scheduler.allowed-failures": 0})
        self._distributed = distributed
        self._cluster = None
        try:
            if address == LOCAL:
                self._cluster = distributed.LocalCluster(
                    n_workers=n_workers,
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address=None,
                    memory_limit=memory or "auto",
                    resources={"big": 1},
                    env={"POLARS_MAX_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            self._client = distributed.Client(self._cluster or address, timeout="10s")
        except (OSError, ValueError) as error:
            words = one_line(str(error), 80)
            raise InputError(f"no Dask cluster at {one_line(address)}: {words}") from None
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        self.n_workers = max(sum(worker["nthreads"] for worker in workers.values()), 1)
        self.dashboard = self._client.dashboard_link if self._cluster is None else None
        self._tasks: dict[Any, Any] = {}
        self._waiting = distributed.as_completed()

    def submit(self, run: Run, task: Any, *, is_big: bool = False) -> None:  # noqa: ANN401
        """Run ``run(task)`` on a worker."""
        needs = {"big": 1} if is_big else None
        future = self._client.submit(run, task, pure=False, resources=needs)
        self._tasks[future.key] = task
        self._waiting.add(future)

    def as_completed(self) -> Iterator[tuple[Any, Any]]:
        """Yield tasks with their results; see :class:`Engine`."""
        while self._tasks:
            future = next(self._waiting)
            task = self._tasks.pop(future.key)
            try:
                result = future.result()
            except (self._distributed.KilledWorker, self._distributed.CancelledError):
                result = None
            yield task, result

    def close(self) -> None:
        """Disconnect from the cluster; end it if it was started here."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def open_engine(cluster: str | None, n_workers: int, memory: int | None = None) -> Engine:
    """Return the engine for ``--cluster``; None: processes of this machine.

    Raises:
        InputError: As :class:`DaskEngine`.
    """
    if cluster is None:
        return LocalEngine(n_workers)
    return DaskEngine(cluster, n_workers, memory)
