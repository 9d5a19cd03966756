"""How a command reads its traces: options to one call, with progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tdxtrace.analysis.selection import Selection
from tdxtrace.errors import InputError
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
    formats: Path | None = None
    cache: bool = False

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

        folder = self._cached() if self.cache else None
        if folder is not None:
            return read_trace(folder)
        with _progress(self.quiet) as report:
            return read_trace(
                *self.traces,
                input_format=self.input_format,
                mappings=self.mappings,
                level_base=self.level_base,
                formats=self.formats,
                progress=report,
            )

    def convert(self, folder: Path) -> None:
        """Read the traces into ``folder``.

        Raises:
            TdxtraceError: If they cannot be read, or the folder not be written.
        """
        from tdxtrace.ingest.read import convert, options_of

        with _progress(self.quiet) as report:
            options = options_of(
                self.input_format, self.mappings, self.level_base, self.formats, report
            )
            convert(self.traces, folder, options)

    def _cached(self) -> Path | None:
        """The folder with the converted traces, made if need be; None if they cannot be kept."""
        from tdxtrace import __version__
        from tdxtrace.tables.cache import cached
        from tdxtrace.tables.store import is_store

        how = (__version__, self.input_format, *self.mappings, self.level_base, self.formats)
        folder = cached(self.traces, how)
        if folder is None or is_store(folder):
            return folder
        try:
            self.convert(folder)
        except InputError:
            # Another tdxtrace may have made it in the meantime.
            if not is_store(folder):
                raise
        return folder


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
