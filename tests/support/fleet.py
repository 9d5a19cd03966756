"""Engines and tasks with faults for the tests of fleets, and facts read in this process."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from tdxtrace.fleet.engine import Run
from tdxtrace.fleet.mapping import MapOptions, MapSummary, MapTask, map_one, map_traces
from tdxtrace.fleet.merge import Facts, open_facts
from tdxtrace.fleet.storage import open_storage, trace_inputs


class HereEngine:
    """Runs each task in this process when its result is asked for."""

    dashboard: str | None = None
    n_workers = 2

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.tasks: deque[tuple[Run, Any]] = deque()
        self.in_flight: list[int] = []

    def submit(self, run: Run, task: Any, *, is_big: bool = False) -> None:  # noqa: ANN401
        self.tasks.append((run, task))
        self.in_flight.append(len(self.tasks))

    def as_completed(self) -> Iterator[tuple[Any, Any]]:
        while self.tasks:
            if self.most == 0:
                raise KeyboardInterrupt
            run, task = self.tasks.popleft()
            self.most = None if self.most is None else self.most - 1
            yield task, run(task)

    def close(self) -> None:
        """Nothing to end."""


def mapped(to: Path, *traces: Path, **options: Any) -> MapSummary:  # noqa: ANN401
    """Count traces into facts in this process."""
    inputs = trace_inputs([str(trace) for trace in traces])
    return map_traces(inputs, open_storage(str(to)), HereEngine(), MapOptions(**options))


def facts_at(place: Path) -> Facts:
    """The facts in a folder."""
    return open_facts(open_storage(str(place)))


def digest_of(place: Path) -> dict[str, bytes]:
    """Every file of facts and its content, but for failures."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and "failures" not in path.parts
    }


def counted_tasks(place: Path) -> pl.Series:
    """Parts of facts."""
    return facts_at(place).parts["part"]


def die_first(task: MapTask) -> dict[str, str]:
    """Count a trace after this worker was killed once for it."""
    mark = Path(task.to).parent / f"died-{task.origin}"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return map_one(task)


def die_before_answer(task: MapTask) -> dict[str, str]:
    """Count a trace; the first time the worker is killed when all is written."""
    done = map_one(task)
    mark = Path(task.to).parent / f"died-{task.origin}"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return done


def die_of_poison(task: MapTask) -> dict[str, str]:
    """Count a trace, unless it is named poison: that kills its worker each time."""
    if "poison" in task.url:
        os.kill(os.getpid(), signal.SIGKILL)
    return map_one(task)
