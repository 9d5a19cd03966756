"""Option groups for reading, selecting and printing; reading with progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tdxtrace.cli import options
from tdxtrace.cli.options import OutputFormat
from tdxtrace.cli.progress import ReadProgress, Steps, reading
from tdxtrace.errors import InputError
from tdxtrace.tables.text import encoded, one_line

if TYPE_CHECKING:
    import polars as pl
    from rich.console import RenderableType

    from tdxtrace.analysis.selection import Selection
    from tdxtrace.ingest.read import ReadOptions
    from tdxtrace.tables.trace import Findings, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadArguments:
    """Options that control how traces are read."""

    traces: options.Traces
    input_format: options.InputFormat = None
    mappings: options.Mappings = field(default_factory=list)
    level_base: options.LevelBase = None
    formats: options.Formats = None
    dmesg: options.Dmesg = field(default_factory=list)
    memory: options.Memory = None
    max_unpacked: options.MaxUnpacked = None
    quiet: options.Quiet = False
    verbose: options.Verbose = False

    def __post_init__(self) -> None:
        # Before importing libraries that hang if the address space is too small.
        from tdxtrace.tables.memory import check_address_space

        check_address_space()

    def notify(self, line: str) -> None:
        """Print a message to stderr, unless --quiet was given."""
        if not self.quiet:
            print(f"tdxtrace: {one_line(line)}", file=sys.stderr)

    @property
    def inputs(self) -> list[str | Path | None]:
        """Input files and directories; None for an option that was not given."""
        return [*self.traces, *self.dmesg, self.formats]

    @property
    def memory_bytes(self) -> int | None:
        """Maximum memory in bytes; None: all free memory.

        Raises:
            QueryError: If the option is not a size.
        """
        from tdxtrace.tables.memory import parse_size

        return None if self.memory is None else parse_size(self.memory)

    @property
    def _unpacked_bytes(self) -> int | None:
        from tdxtrace.tables.memory import parse_size

        return None if self.max_unpacked is None else parse_size(self.max_unpacked)

    def convert(self, folder: Path, force: bool = False) -> None:
        """Convert the traces into the store ``folder``; ``force`` replaces an existing one.

        Raises:
            TdxtraceError: If they cannot be read, or the folder cannot be written.
        """
        from tdxtrace.ingest.read import convert

        with reading(self.quiet) as report:
            convert(self.traces, folder, self._read_options(report), force)

    def _read_options(self, report: ReadProgress | None) -> ReadOptions:
        from tdxtrace.ingest.read import ReadOptions

        return ReadOptions(
            self.input_format,
            self.mappings,
            self.level_base,
            self.formats,
            self.dmesg,
            self.memory_bytes,
            self._unpacked_bytes,
            report,
        )

    def read(self) -> Trace:
        """Read the traces.

        Raises:
            TdxtraceError: If they cannot be read or understood.
        """
        from tdxtrace.ingest.read import read

        began = time.monotonic()
        with reading(self.quiet) as report:
            trace = read(self.traces, self._read_options(report))
        if self.verbose:
            for line in _read_summary(trace, time.monotonic() - began):
                print(f"tdxtrace: {line}", file=sys.stderr)
        return trace


def _read_summary(trace: Trace, seconds: float) -> Iterator[str]:
    """Yield lines for --verbose: each input, and its number of lines or records by event."""
    for source in trace.provenance.sources:
        name = one_line(source.path.rpartition("/")[2], 80)
        size = f"{source.n_bytes:,} bytes, {source.n_lines:,} {source.unit}s"
        yield f"{name}: {source.format}, {size}, clock {one_line(source.clock, 40)}"
        for event, n in sorted(source.events.items(), key=lambda item: -item[1]):
            yield f"  {n:>12,} {one_line(event, 80)}"
    yield f"read in {seconds:.2f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryOptions(ReadArguments):
    """Options that name traces and select the part of them to analyze."""

    vm: options.Vms = field(default_factory=list)
    leaf: options.Leaves = field(default_factory=list)
    since: options.Since = None
    until: options.Until = None
    cache: options.Cache = False
    color: options.Coloring = options.Color.auto
    no_color: options.NoColor = False
    python: options.Python = False

    @property
    def coloring(self) -> options.Color:
        """Value of --color, or never with --no-color."""
        return options.chosen_color(self.color, self.no_color)

    @property
    def selection(self) -> Selection:
        """Filters to apply."""
        from tdxtrace.analysis.selection import Selection

        return Selection(tuple(self.vm), tuple(self.leaf), self.since, self.until)

    def analyze(self) -> Findings:
        """Read and analyze the traces.

        Raises:
            TdxtraceError: If they cannot be read or understood, or the selection is empty.
        """
        from tdxtrace.pipeline import analyze

        return analyze(
            self.read(),
            self.selection,
            memory=self.memory_bytes,
            step=Steps(self.quiet, self.verbose).step,
        )

    def read(self) -> Trace:
        """Read the traces; with --cache from the store of an earlier run, if it exists.

        Raises:
            TdxtraceError: If they cannot be read or understood.
        """
        from tdxtrace.ingest.read import read_trace

        folder = self._cached() if self.cache else None
        return ReadArguments.read(self) if folder is None else read_trace(folder)

    def _cached(self) -> Path | None:
        """Return the cached store, converting if needed; None if the traces cannot be cached."""
        from tdxtrace import __version__
        from tdxtrace.tables.store import cache_path, is_store

        how = (__version__, self.input_format, *self.mappings, self.level_base, self.formats)
        folder = cache_path([*self.traces, *self.dmesg], (*how, len(self.dmesg)))
        if folder is None or is_store(folder):
            return folder
        try:
            self.convert(folder)
        except InputError:
            # Another process may have written it meanwhile.
            if not is_store(folder):
                raise
        return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleOptions:
    """TDX module release or lock generation; by default derived from the trace."""

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
        """Check the options, then read the traces.

        Raises:
            TdxtraceError: If they cannot be read or understood, or the module is unknown.
        """
        from tdxtrace.analysis.causes.generation import chosen_generations

        chosen_generations(self.module, self.generation)
        return query.read()

    def analyze(self, trace: Trace, query: QueryOptions) -> Findings:
        """Analyze a trace, assuming this module.

        Raises:
            TdxtraceError: If the selection is empty.
        """
        from tdxtrace.pipeline import analyze

        return analyze(
            trace,
            query.selection,
            module=self.module,
            generation=self.generation,
            memory=query.memory_bytes,
            step=Steps(query.quiet, query.verbose).step,
        )


# Default maximum of rows on a terminal: one and a half screens.  A choice.
_ON_TERMINAL: Final = 40
# Default maximum of rows as text in a file or pipe; takes some 7 s (csv: 0.1 s).  A choice.
_IN_PIPE: Final = 100_000
# Rows that are aligned and printed together: each takes some 4 KB of memory.
_BLOCK_ROWS: Final = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PrintOptions:
    """Options for the format and destination of a table."""

    limit: options.Limit = None
    form: options.Format = OutputFormat.table
    output: options.Output = None
    force: options.Force = False

    @property
    def max_rows(self) -> int:
        """Maximum number of rows to print; 0: all."""
        from tdxtrace.cli import screen

        if self.limit is not None:
            return self.limit
        is_cut = self.output is None and screen.is_terminal()
        return _ON_TERMINAL if is_cut else _IN_PIPE

    def show(
        self,
        rows: pl.DataFrame,
        query: QueryOptions,
        *others: Path | None,
        clocks: Mapping[int, str] | None = None,
    ) -> None:
        """Print a table, or write it to the output.

        Args:
            rows: The table.
            query: Options of the command; its inputs are never overwritten.
            others: Further inputs, which are not overwritten either.
            clocks: Name of the clock by source, for times of wall clocks.

        Raises:
            InputError: If the output exists and --force is not given, is an input, or cannot be
                written.
            QueryError: If the format is Parquet and stdout is a terminal.
        """
        from tdxtrace.cli import outputs, screen

        if self.form is not OutputFormat.table:
            inputs = [*query.inputs, *others]
            rows = rows.head(self.limit) if self.limit else rows
            outputs.write_table(rows, self.form, self.output, force=self.force, inputs=inputs)
            return
        from tdxtrace.report.columns import more_rows
        from tdxtrace.report.listing import listing

        max_rows = self.max_rows or rows.height
        if self.output is not None or max_rows <= _BLOCK_ROWS or rows.height <= _BLOCK_ROWS:
            self.draw(listing(rows, max_rows, clocks), query, *others)
            return
        for block in rows.head(max_rows).iter_slices(_BLOCK_ROWS):
            screen.print_screen(listing(block, 0, clocks), query.coloring)
        if rows.height > max_rows:
            typer.echo(more_rows(rows.height - max_rows))

    def draw(self, shown: RenderableType, query: QueryOptions, *others: Path | None) -> None:
        """Print a rich renderable, or write it as plain text; arguments as in :meth:`show`.

        Raises:
            InputError: If the output exists and --force is not given, is an input, or cannot be
                written.
        """
        from tdxtrace.cli import outputs, screen

        if self.output is None:
            screen.print_screen(shown, query.coloring)
            return
        inputs = [*query.inputs, *others]
        text = screen.plain_text(shown)
        outputs.write_file(self.output, encoded(text), force=self.force, inputs=inputs)

    def write_text(self, text: str, query: QueryOptions) -> None:
        """Print text without wrapping it to the terminal, or write it to the output.

        Raises:
            InputError: If the output exists and --force is not given, is an input, or cannot be
                written.
        """
        from tdxtrace.cli import outputs

        if self.output is None:
            typer.echo(text, nl=False)
        else:
            outputs.write_file(self.output, encoded(text), force=self.force, inputs=query.inputs)
