"""How a command reads its traces: options to one call, with progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdxtrace.cli import options
from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    from tdxtrace.analysis.selection import Selection
    from tdxtrace.tables.trace import Findings, Trace

# Inputs read faster than this need no progress bar.
_PATIENCE_S = 1.0

Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """Options that say how traces are to be read."""

    traces: options.Traces
    input_format: options.InputFormat = None
    mappings: options.Mappings = field(default_factory=list)
    level_base: options.LevelBase = None
    formats: options.Formats = None
    dmesg: options.Dmesg = field(default_factory=list)
    quiet: options.Quiet = False

    def say(self, line: str) -> None:
        """Tell on stderr what was done, unless nothing is to be told."""
        if not self.quiet:
            print(f"tdxtrace: {one_line(line)}", file=sys.stderr)

    @property
    def inputs(self) -> list[str | Path | None]:
        """Every file and folder that is read; None: one not given."""
        return [*self.traces, *self.dmesg, self.formats]

    def convert(self, folder: Path, force: bool = False) -> None:
        """Read the traces into ``folder``, and replace what has that name if ``force``.

        Raises:
            TdxtraceError: If they cannot be read, or the folder not be written.
        """
        from tdxtrace.ingest.read import convert, options_of

        with _progress(self.quiet) as report:
            how = options_of(
                self.input_format,
                self.mappings,
                self.level_base,
                self.formats,
                report,
                self.dmesg,
            )
            convert(self.traces, folder, how, force)

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
                formats=self.formats,
                dmesg=self.dmesg,
                progress=report,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryOptions(ReadOptions):
    """Options that say what is asked, and of which traces."""

    vm: options.Vms = field(default_factory=list)
    leaf: options.Leaves = field(default_factory=list)
    since: options.Since = None
    until: options.Until = None
    cache: options.Cache = False
    no_color: options.NoColor = False
    python: options.Python = False

    @property
    def selection(self) -> Selection:
        """What to keep of the answers."""
        from tdxtrace.analysis.selection import Selection

        return Selection(tuple(self.vm), tuple(self.leaf), self.since, self.until)

    def analyze(self) -> Findings:
        """Read the traces and answer what is asked.

        Raises:
            TdxtraceError: If they cannot be read or understood, or lack what is asked for.
        """
        from tdxtrace.pipeline import analyze

        return analyze(self.read(), self.selection)

    def read(self) -> Trace:
        """Read the traces, or what was kept of them if that is wanted.

        Raises:
            TdxtraceError: If they cannot be read or understood.
        """
        from tdxtrace.ingest.read import read_trace

        folder = self._cached() if self.cache else None
        return ReadOptions.read(self) if folder is None else read_trace(folder)

    def _cached(self) -> Path | None:
        """The folder with the converted traces, made if need be; None if they cannot be kept."""
        from tdxtrace import __version__
        from tdxtrace.tables.cache import cached
        from tdxtrace.tables.store import is_store

        how = (__version__, self.input_format, *self.mappings, self.level_base, self.formats)
        folder = cached([*self.traces, *self.dmesg], (*how, len(self.dmesg)))
        if folder is None or is_store(folder):
            return folder
        try:
            self.convert(folder)
        except InputError:
            # Another tdxtrace may have made it in the meantime.
            if not is_store(folder):
                raise
        return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleOptions:
    """The module, by its release or by its locks; the trace may tell, or leave it open."""

    module: Annotated[
        str | None,
        typer.Option(
            "--module",
            metavar="VERSION",
            help="Release of the TDX module, e.g. 1.5.16.",
        ),
    ] = None
    generation: Annotated[
        str | None,
        typer.Option(
            "--generation",
            metavar="LETTER",
            help="Or its locks: A 1.0, B 1.5.01, C from 1.5.20.",
        ),
    ] = None

    def read(self, query: QueryOptions) -> Trace:
        """Read the traces; wrong words are refused before a large one is.

        Raises:
            TdxtraceError: If they cannot be read or understood, or the module is not known.
        """
        from tdxtrace.analysis.causes.generation import chosen_generations

        chosen_generations(self.module, self.generation)
        return query.read()

    def analyze(self, trace: Trace, query: QueryOptions) -> Findings:
        """Answer what is asked of a trace, for this module.

        Raises:
            TdxtraceError: If the trace lacks what is asked for.
        """
        from tdxtrace.pipeline import analyze

        return analyze(trace, query.selection, module=self.module, generation=self.generation)


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
