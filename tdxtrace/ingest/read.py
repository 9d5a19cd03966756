"""The front door: a path, several paths or standard input become a Trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import polars as pl

from tdxtrace.errors import FormatError, InputError
from tdxtrace.ingest import doubts, levels
from tdxtrace.ingest.binary import BINARY_FORMATS, open_data, open_reader
from tdxtrace.ingest.clocks import TICK_CLOCKS
from tdxtrace.ingest.decode import Decoder
from tdxtrace.ingest.graph import GraphReader
from tdxtrace.ingest.headers import Header, read_header
from tdxtrace.ingest.lines import LineReader, Vocabulary
from tdxtrace.ingest.recognise import checked, recognise, recording
from tdxtrace.ingest.stream import MAX_LINE_BYTES, Stream, open_stream
from tdxtrace.ingest.tally import Tally
from tdxtrace.ingest.vocabulary import mapping_of
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Provenance, Source, Trace

Progress = Callable[[str, int, int | None], None]
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How inputs are to be read where they do not say it themselves."""

    input_format: str | None = None
    """One of recognise.FORMATS; None: told by the content."""
    mappings: Sequence[str] = ()
    """``EVENT=FUNCTION[:entry|:return]`` for probes whose name says nothing."""
    level_base: int | None = None
    """Number that the kernel gives a 4K page; None: told by kernel version and values."""
    progress: Progress = field(default=lambda _path, _done, _size: None)
    """Called with the path, the bytes read so far and the size of the input, if known."""


@dataclass(frozen=True, slots=True)
class _Heading:
    """What a source says of itself, and its clock where it does not say."""

    header: Header
    clock: str
    resolution_ns: int


@dataclass(slots=True)
class _Part:
    """What one source gave."""

    tables: dict[str, pl.DataFrame]
    source: Source


def read_trace(
    *paths: str | Path,
    input_format: str | None = None,
    mappings: Sequence[str] = (),
    level_base: int | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Read text of ftrace, trace-cmd report, perf script or function_graph.

    Args:
        paths: Files, plain or compressed with gzip, zstd or xz; ``-`` is standard
            input.  Each is one source of the Trace.
        input_format: Name of the format; told from the content if None.
        mappings: ``EVENT=FUNCTION`` for probes whose names say nothing, with
            ``:entry`` or ``:return`` where the text does not tell either.
        level_base: Number the traced kernel gives a 4K page (6.16 to 6.19: 0,
            7.x: 1); found out if None.
        progress: Called now and then with path, bytes read and size (None: unknown).

    Returns:
        A Trace whose tables are sorted by source; every line of every input is a
        header, part of a row, or counted in ``losses``.

    Raises:
        InputError: If an input is missing, empty or cannot be read.
        FormatError: If an input is no trace; the message says what it looks like.
        QueryError: If a format or mapping names something unknown.
    """
    from tdxtrace import __version__  # noqa: PLC0415 - the package imports this module

    if not paths:
        raise InputError("no trace named; give a file, or - for standard input")
    options = ReadOptions(input_format, mappings, level_base)
    if progress is not None:
        options = ReadOptions(input_format, mappings, level_base, progress)
    parts = [_read(str(path), number, options) for number, path in enumerate(paths)]
    tables = {
        table.name: pl.concat([part.tables[table.name] for part in parts], rechunk=False)
        for table in EVENT_TABLES
    }
    kernels = [part.source.kernel for part in parts]
    base, evidence = levels.base_of(tables["seamcalls"], level_base, kernels)
    tables["seamcalls"] = levels.normalised(tables["seamcalls"], base)
    sources = tuple(part.source for part in parts)
    provenance = Provenance(sources, base, evidence, __version__, _notes(sources))
    return Trace(**tables, provenance=provenance)


def _read(path: str, number: int, options: ReadOptions) -> _Part:
    wanted = None if options.input_format is None else checked(options.input_format)
    mappings = {event: (name, role) for event, name, role in map(mapping_of, options.mappings)}
    stream = open_stream(path)
    name = wanted or recording(stream.peek())
    tally, vocabulary = Tally(), Vocabulary(mappings)
    decoder = Decoder(number, vocabulary.events, tally)
    if name in BINARY_FORMATS:
        clock = _read_binary(name, stream, vocabulary, decoder, options)
    else:
        name, clock = _read_text(wanted, stream, vocabulary, decoder, options)
    tables = decoder.finish()
    doubts.note(tables["seamcalls"], tally, clock.header)
    if not any(table.height for table in tables.values()):
        raise FormatError(doubts.nothing_in(one_line(path), tally))
    tables["losses"] = tally.losses(number)
    tables["threads"] = tally.thread_table(number)
    return _Part(tables, _source(path, name, stream, tally, clock))


def _read_binary(
    name: str, stream: Stream, vocabulary: Vocabulary, decoder: Decoder, options: ReadOptions
) -> _Heading:
    file = open_data(stream)
    try:
        reader = open_reader(name, file, vocabulary, decoder.tally)
        for batch in reader.batches():
            decoder.feed(batch)
            options.progress(stream.path, reader.position, file.size)
        if stream.truncated:
            decoder.tally.note("truncated", None, stream.truncated)
        return _Heading(reader.header(), "unnamed", 1)
    finally:
        file.close()


def _read_text(
    wanted: str | None,
    stream: Stream,
    vocabulary: Vocabulary,
    decoder: Decoder,
    options: ReadOptions,
) -> tuple[str, _Heading]:
    path, tally = stream.path, decoder.tally
    blocks = stream.blocks()
    first = next(blocks, b"")
    if not first.strip():
        raise InputError(f"{one_line(path)} holds no text{_because(stream)}")
    name = wanted or recognise(first, one_line(path))
    reader: LineReader | GraphReader
    if name == "function-graph":
        reader = GraphReader(vocabulary, tally)
    else:
        reader = LineReader(name, vocabulary, tally)
    for block in _each(first.removeprefix(_BOM), blocks):
        decoder.feed(reader.read(_numbered(block, tally)))
        options.progress(path, stream.n_bytes, stream.size)
    if stream.truncated:
        tally.note("truncated", None, stream.truncated, line_no=tally.n_lines)
    looks = "integer" if reader.has_integer_clock else "unnamed"
    clock = "relative" if name in _RELATIVE else looks
    return name, _Heading(read_header(first), clock, reader.resolution_ns or 1)


def _each(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _numbered(block: bytes, tally: Tally) -> list[tuple[int, bytes]]:
    start = tally.n_lines + 1
    lines = block.split(b"\n")[:-1]
    tally.n_lines += len(lines)
    return [
        (number, line if len(line) <= MAX_LINE_BYTES else line[:80])
        for number, line in enumerate(lines, start)
    ]


def _because(stream: Stream) -> str:
    return f": {stream.truncated}" if stream.truncated else ""


def _source(path: str, name: str, stream: Stream, tally: Tally, heading: _Heading) -> Source:
    first_ns, last_ns = tally.span()
    return Source(
        path,
        name,
        stream.compression,
        stream.n_bytes,
        tally.n_lines,
        tally.n_headers,
        first_ns,
        last_ns,
        heading.header.clock or heading.clock,
        heading.resolution_ns,
        heading.header.kernel,
        heading.header.tool,
        dict(tally.events.most_common()),
    )


_RELATIVE: Final = ("ftrace-latency", "ftrace-verbose")


def _notes(sources: Sequence[Source]) -> tuple[str, ...]:
    notes = []
    for source in sources:
        where = one_line(source.path)
        if source.clock in ("integer", *TICK_CLOCKS):
            notes.append(f"{where}: {source.clock} clock; times are in its ticks, shown as ns")
        if source.clock == "local":
            notes.append(f"{where}: clock 'local' differs between CPUs; record with mono (-C mono)")
        if source.format in _RELATIVE:
            notes.append(f"{where}: times count from the first event; cannot be merged by time")
    return tuple(notes)
