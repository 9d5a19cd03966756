"""How a command reads its traces: options to one call, with progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tdxtrace.analysis.selection import Selection
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Trace

# Inputs read faster than this need no progress bar.
_PATIENCE_S = 1.0

Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What the shared options of a command say."""

    traces: Sequence[str]
    vms: Sequence[str] = ()
    leaves: Sequence[str] = ()
    since: str | None = None
    until: str | None = None
    input_format: str | None = None
    mappings: Sequence[str] = ()
    level_base: int | None = None
    quiet: bool = False

    @property
    def selection(self) -> Selection:
        """What to keep of the answers."""
        return Selection(tuple(self.vms), tuple(self.leaves), self.since, self.until)

    def read(self) -> Trace:
        """Read the traces.

        Raises:
            TdxtraceError: If they cannot be read or understood.
        """
        from tdxtrace.ingest.read import read_trace

        with _progress(self.quiet) as report:
            return read_trace(
                *self.traces,
                input_format=self.input_format,
                mappings=self.mappings,
                level_base=self.level_base,
                progress=report,
            )


@contextmanager
def _progress(quiet: bool) -> Iterator[Report | None]:
    """Give a callback that draws a bar on stderr once a second has passed."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, int] = {}
    started = time.monotonic()

    def report(path: str, done: int, size: int | None) -> None:
        if time.monotonic() - started < _PATIENCE_S:
            return
        if not bar.live.is_started:
            bar.start()
        if path not in tasks:
            tasks[path] = bar.add_task(one_line(path, 30), total=size)
        bar.update(tasks[path], completed=done)  # type: ignore[arg-type]

    try:
        yield report
    finally:
        bar.stop()
