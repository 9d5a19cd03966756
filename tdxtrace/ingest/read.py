"""The front door: a path, several paths or standard input become a Trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tdxtrace.compiler import choose
from tdxtrace.errors import FormatError, InputError
from tdxtrace.ingest.ahead import ahead
from tdxtrace.ingest.decode import implied_losses, levels
from tdxtrace.ingest.decode.decoder import Decoder
from tdxtrace.ingest.decode.sinks import MemorySink, Sink, SourceSink
from tdxtrace.ingest.events.registry import EventRegistry, mapping_of
from tdxtrace.ingest.provenance import RELATIVE, Heading, notes_on, read_header
from tdxtrace.ingest.recognise import checked, log_format, recognise, recording, voted
from tdxtrace.ingest.source import Block, Stream, block_of, open_stream
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.clocks import LOG_FORMATS
from tdxtrace.tables.files import refuse_overwriting
from tdxtrace.tables.store import StoreWriter, is_store, open_store
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import BINARY_FORMATS, RAW_PAGES, Provenance, Source, Trace

if TYPE_CHECKING:
    from tdxtrace.ingest.text.graph import GraphReader
    from tdxtrace.ingest.text.lines import LineReader

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
    formats: str | Path | None = None
    """Folder with the formats of events, for pages that come without."""
    dmesg: Sequence[str | Path] = ()
    """Logs of the kernel, read with the traces."""
    is_log: bool = False
    """Whether the input is one of these."""
    progress: Progress = field(default=lambda _path, _done, _size: None)
    """Called with the path, the bytes read so far and the size of the input, if known."""


def read_trace(
    *paths: str | Path,
    input_format: str | None = None,
    mappings: Sequence[str] = (),
    level_base: int | None = None,
    formats: str | Path | None = None,
    dmesg: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> Trace:
    """Read recordings of trace-cmd and perf, text of ftrace, trace-cmd, perf script, dmesg.

    Args:
        paths: Files, plain or compressed with gzip, zstd or xz; ``-`` is standard
            input.  Each is one source of the Trace.  Or one folder that ``tdxtrace
            convert`` made.
        input_format: Name of the format; told from the content if None.
        mappings: ``EVENT=FUNCTION`` for probes whose names say nothing, with
            ``:entry`` or ``:return`` where the text does not tell either.
        level_base: Number the traced kernel gives a 4K page (6.16 to 6.19: 0,
            7.x: 1); found out if None.
        formats: Folder with the kernel's ``events`` (formats, header_page), for raw pages.
        dmesg: Logs of the kernel, as dmesg or journalctl print them; each is a source
            more, that may hold nothing about TDX.
        progress: Called now and then with path, bytes read and size (None: unknown).

    Returns:
        A Trace whose tables are sorted by source; every line of every input is a
        header, part of a row, or counted in ``losses``.

    Raises:
        InputError: If an input is missing, empty or cannot be read.
        FormatError: If an input is no trace; the message says what it looks like.
        QueryError: If a format or mapping names something unknown.
    """
    stores = [path for path in paths if is_store(Path(path))]
    if stores and len(paths) == 1 and not dmesg:
        return open_store(Path(stores[0]))
    if stores:
        raise InputError(f"{one_line(str(stores[0]))} is a converted trace: read it alone")
    sink = MemorySink()
    options = options_of(input_format, mappings, level_base, formats, progress, dmesg)
    base, provenance = _read_all(paths, options, sink)
    tables = sink.whole()
    tables["seamcalls"] = levels.normalised(tables["seamcalls"], base)
    return Trace(**tables, provenance=provenance)


def convert(
    paths: Sequence[str | Path], folder: Path, options: ReadOptions, force: bool = False
) -> None:
    """Read traces into a folder that :func:`read_trace` opens at once.

    Memory does not grow with the input. ``force`` replaces a store once the new one is whole.

    Raises:
        InputError: If an input cannot be read, or the folder not be written, or is an input.
        FormatError: If an input is no trace.
        QueryError: If a format or mapping names something unknown.
    """
    refuse_overwriting(folder, [*paths, *options.dmesg, options.formats])
    store = StoreWriter(folder, force)
    try:
        base, provenance = _read_all(paths, options, store)
        change = {"seamcalls": partial(levels.normalised, base=base)} if base else {}
        store.finish(provenance, change)
    finally:
        store.discard()


def options_of(
    input_format: str | None,
    mappings: Sequence[str],
    level_base: int | None,
    formats: str | Path | None,
    progress: Progress | None,
    dmesg: Sequence[str | Path] = (),
) -> ReadOptions:
    """Put the options of :func:`read_trace` together."""
    made = ReadOptions(input_format, mappings, level_base, formats, dmesg)
    return made if progress is None else replace(made, progress=progress)


def _read_all(
    paths: Sequence[str | Path], options: ReadOptions, sink: Sink
) -> tuple[int, Provenance]:
    """Read every input into ``sink``; return the base of levels and the provenance."""
    from tdxtrace import __version__  # noqa: PLC0415 - the package imports this module

    if not paths:
        raise InputError("no trace named; give a file, or - for standard input")
    detector = levels.LevelBaseDetector()
    as_log = replace(options, input_format=None, is_log=True)
    inputs = [*((path, options) for path in paths), *((path, as_log) for path in options.dmesg)]
    sources = tuple(
        _read(str(path), number, how, SourceSink(sink, detector))
        for number, (path, how) in enumerate(inputs)
    )
    base, evidence = detector.base(options.level_base, [source.kernel for source in sources])
    return base, Provenance(sources, base, evidence, __version__, notes_on(sources))


def _read(path: str, number: int, options: ReadOptions, sink: SourceSink) -> Source:
    wanted = None if options.input_format is None else checked(options.input_format)
    mappings = {event: (name, role) for event, name, role in map(mapping_of, options.mappings)}
    stats, registry = SourceStats(), EventRegistry(mappings)
    stream, name = _open(path, wanted, options)
    sink.losses.run = run = choose(stream.size)
    decoder = Decoder(number, registry.events, stats, sink, run)
    with closing(stream):
        if name is not None and name in BINARY_FORMATS:
            heading = _read_binary(name, stream, registry, decoder, options)
        else:
            name, heading = _read_text(wanted, stream, registry, decoder, options)
        if name not in LOG_FORMATS:
            decoder.finish()
    if name not in LOG_FORMATS:
        implied_losses.note(sink.losses, stats, heading.header)
    if not sink.n_rows and not options.is_log:
        raise FormatError(implied_losses.nothing_in(one_line(path), stats))
    sink.add("losses", stats.losses(number))
    sink.add("threads", stats.thread_table(number))
    return _source(path, name, stream, stats, heading)


def _open(path: str, wanted: str | None, options: ReadOptions) -> tuple[Stream, str | None]:
    """Open an input; say which binary format it has, or is said to have."""
    is_folder = False
    if Path(path).is_dir():
        from tdxtrace.ingest.tracedat.raw_pages import find_pages  # noqa: PLC0415 - see _read_binary

        is_folder = bool(find_pages(Path(path)))
    if wanted != RAW_PAGES and not is_folder:
        stream = open_stream(path)
        name = wanted or recording(stream.peek())
        if name is not None or options.formats is None:
            return stream, name
        stream.close()
    return Stream(path, "none", iter(())), RAW_PAGES


def _read_binary(
    name: str, stream: Stream, registry: EventRegistry, decoder: Decoder, options: ReadOptions
) -> Heading:
    # To import every reader takes longer than to read a small input with one.
    from tdxtrace.ingest.binary import opened  # noqa: PLC0415

    formats = None if options.formats is None else Path(options.formats)
    with opened(name, stream, formats, registry, decoder.stats) as reader:
        for batch in ahead(reader.batches()):
            decoder.feed(batch)
            options.progress(stream.path, reader.position, stream.size)
        if stream.truncated:
            decoder.stats.record_loss("truncated", None, stream.truncated)
        return Heading(reader.header(), "unnamed", 1)


def _read_text(
    wanted: str | None,
    stream: Stream,
    registry: EventRegistry,
    decoder: Decoder,
    options: ReadOptions,
) -> tuple[str, Heading]:
    from tdxtrace.ingest.text.graph import GraphReader  # noqa: PLC0415 - see _read_binary
    from tdxtrace.ingest.text.lines import LineReader  # noqa: PLC0415
    from tdxtrace.ingest.text.reader import TextReader  # noqa: PLC0415

    path, stats = stream.path, decoder.stats
    blocks = stream.blocks()
    first = _head(blocks)
    if not first.strip():
        why = f": {stream.truncated}" if stream.truncated else ""
        raise InputError(f"{one_line(path)} holds no text{why}")
    tell = log_format if options.is_log else recognise
    name = wanted or tell(first, one_line(path))
    if name in LOG_FORMATS:
        return name, _read_log(name, _each(first, blocks), stream, decoder)
    lines: LineReader | GraphReader
    if name == "function-graph":
        lines = GraphReader(registry, stats)
        batches = lines.read_blocks(_each(first, blocks))
    else:
        lines = LineReader(name, registry, stats)
        batches = TextReader(lines, stream.size).read(_each(first, blocks))
    for batch in batches:
        decoder.feed(batch)
        options.progress(path, stream.n_bytes, stream.size)
    if stream.truncated:
        stats.record_loss("truncated", None, stream.truncated, line_no=stats.n_lines)
    looks = "integer" if lines.has_integer_clock else "unnamed"
    clock = "relative" if name in RELATIVE else looks
    return name, Heading(read_header(first[:_HEADER_BYTES]), clock, lines.resolution_ns or 1)


def _read_log(name: str, blocks: Iterator[Block], stream: Stream, decoder: Decoder) -> Heading:
    from tdxtrace.ingest.kernel_log.reader import MessageReader  # noqa: PLC0415 - see _read_binary

    log = MessageReader(name, decoder.source, decoder.stats)
    for rows in log.read(blocks):
        decoder.sink.add("kernel_messages", rows)
    if stream.truncated:
        decoder.stats.record_loss(
            "truncated", None, stream.truncated, line_no=decoder.stats.n_lines
        )
    return Heading(read_header(b""), log.clock_name, log.resolution_ns)


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


def _source(path: str, name: str, stream: Stream, stats: SourceStats, heading: Heading) -> Source:
    first_ns, last_ns = stats.span()
    return Source(
        path,
        name,
        stream.compression,
        stream.n_bytes,
        stats.n_lines,
        stats.n_headers,
        first_ns,
        last_ns,
        heading.header.clock or heading.clock,
        heading.resolution_ns,
        heading.header.kernel,
        heading.header.tool,
        dict(stats.events.most_common()),
    )
