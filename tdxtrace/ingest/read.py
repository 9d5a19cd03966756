"""The front door: a path, several paths or standard input become a Trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import polars as pl

from tdxtrace.errors import FormatError, InputError
from tdxtrace.ingest import doubts, levels
from tdxtrace.ingest.decode import Decoder
from tdxtrace.ingest.graph import GraphReader
from tdxtrace.ingest.headers import Header, read_header
from tdxtrace.ingest.lines import LineReader, Vocabulary
from tdxtrace.ingest.recognise import checked, recognise, voted
from tdxtrace.ingest.stream import Block, Stream, block_of, open_stream
from tdxtrace.ingest.tally import Tally
from tdxtrace.ingest.text import TextReader
from tdxtrace.ingest.vocabulary import mapping_of
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Provenance, Source, Trace

Progress = Callable[[str, int, int | None], None]
# Comments at the head of a file: perf's name every event, with all its attributes.
_HEADER_BYTES: Final = 1 << 16
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
    stream = open_stream(path)
    try:
        return _read_stream(stream, number, options)
    finally:
        stream.close()


def _read_stream(stream: Stream, number: int, options: ReadOptions) -> _Part:
    path = stream.path
    wanted = None if options.input_format is None else checked(options.input_format)
    mappings = {event: (name, role) for event, name, role in map(mapping_of, options.mappings)}
    blocks = stream.blocks()
    first = _head(blocks)
    if not first.strip():
        raise InputError(f"{one_line(path)} holds no text{_because(stream)}")
    name = wanted or recognise(first, one_line(path))
    tally, vocabulary = Tally(), Vocabulary(mappings)
    lines: LineReader | GraphReader
    if name == "function-graph":
        lines = GraphReader(vocabulary, tally)
        batches = lines.read_blocks(_each(first, blocks))
    else:
        lines = LineReader(name, vocabulary, tally)
        batches = TextReader(lines).read(_each(first, blocks))
    decoder = Decoder(number, vocabulary.events, tally)
    for batch in batches:
        decoder.feed(batch)
        options.progress(path, stream.n_bytes, stream.size)
    header = read_header(first[:_HEADER_BYTES])
    if stream.truncated:
        tally.note("truncated", None, stream.truncated, line_no=tally.n_lines)
    tables = decoder.finish()
    doubts.note(tables["seamcalls"], tables["vm_entries"], tally, header)
    if not any(table.height for table in tables.values()):
        raise FormatError(doubts.nothing_in(one_line(path), tally))
    tables["losses"] = tally.losses(number)
    tables["threads"] = tally.thread_table(number)
    return _Part(tables, _source(path, name, stream, lines, tally, header))


def _head(blocks: Iterator[Block]) -> bytes:
    """Take blocks until there is an event line in them: a pipe may give one line at a time."""
    head = b""
    for block in blocks:
        head += block.tobytes()
        if len(head) >= _HEADER_BYTES or voted(head):
            break
    return head


def _each(first: bytes, rest: Iterator[Block]) -> Iterator[Block]:
    yield block_of([first.removeprefix(_BOM)])
    yield from rest


def _because(stream: Stream) -> str:
    return f": {stream.truncated}" if stream.truncated else ""


def _source(
    path: str,
    name: str,
    stream: Stream,
    reader: LineReader | GraphReader,
    tally: Tally,
    header: Header,
) -> Source:
    first_ns, last_ns = tally.span()
    looks = "integer" if reader.has_integer_clock else "unnamed"
    return Source(
        path,
        name,
        stream.compression,
        stream.n_bytes,
        tally.n_lines,
        tally.n_headers,
        first_ns,
        last_ns,
        header.clock or ("relative" if name in _RELATIVE else looks),
        reader.resolution_ns or 1,
        header.kernel,
        header.tool,
        dict(tally.events.most_common()),
    )


_RELATIVE: Final = ("ftrace-latency", "ftrace-verbose")


def _notes(sources: Sequence[Source]) -> tuple[str, ...]:
    notes = []
    for source in sources:
        where = one_line(source.path)
        if source.clock == "integer":
            notes.append(f"{where}: integer clock; times are in its ticks, shown as ns")
        if source.format in _RELATIVE:
            notes.append(f"{where}: times count from the first event; cannot be merged by time")
    return tuple(notes)
