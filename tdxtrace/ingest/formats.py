"""Registry of input formats: detect the format of an input from its content, and open its reader.

The names of the formats and the kind of data that each holds are in ``tables.formats``, because
tables need them too.  A reader is imported when its first input is opened: importing all of
them takes longer than reading a small input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from tdxtrace.compiler import COMPILE_BYTES, Runner
from tdxtrace.errors import FormatError, InputError, QueryError
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.source import Block, Stream, block_of, matched_part, open_stream
from tdxtrace.ingest.stats import Header, SourceStats, read_comments
from tdxtrace.tables.formats import (
    BPFTRACE,
    FTRACE,
    FUNCTION_GRAPH,
    INPUT_FORMATS,
    JOURNAL_EXPORT,
    JOURNAL_JSON,
    KERNEL_LOG,
    PERF_DATA,
    PERF_SCRIPT,
    RAW_PAGES,
    TRACE_DAT,
    InputFormat,
)
from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    from tdxtrace.ingest.records.datafile import DataFile
    from tdxtrace.ingest.text.function_graph import GraphReader
    from tdxtrace.ingest.text.line_formats import LineFormat
    from tdxtrace.ingest.text.reader import LineReader

# Magic numbers of files that are passed by mistake, with the description in the error message.
_NO_TRACE: Final = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"BZh", "bzip2; recompress it with zstd, xz or gzip"),
    (b"\x04\x22\x4d\x18", "lz4; recompress it with zstd, xz or gzip"),
    (b"\x5d\x00\x00", "lzma; recompress it with zstd, xz or gzip"),
    (b"\x89LZO", "lzop; recompress it with zstd, xz or gzip"),
    (b"\x1f\x9d", "packed by compress; recompress it with zstd, xz or gzip"),
    (b"\x1f\x8b", "packed twice; unpack it once"),
    (b"\xfd7zXZ", "packed twice; unpack it once"),
    (b"\x28\xb5\x2f\xfd", "packed twice; unpack it once"),
    (b"{\\rtf", "a document (RTF); save it as plain text"),
    (b"SQLite format 3", "a database (SQLite)"),
    (b"PAR1", "a Parquet file"),
    (b"\x7fELF", "a program (ELF)"),
)
# The same, not at the beginning: POSIX ustar, and the zeros behind the name of its first file.
_IS_TAR: Final = re.compile(rb"[^\0]{1,100}\0[\s\S]{100,255}ustar")
_SAMPLE_LINES: Final = 2000
# Lines from which an unreadable text is identified.
_REFUSED_LINES: Final = 200
_MAGIC_BYTES: Final = 64
# Largest size of the comments at the head of a text: perf lists every event with its attributes.
_HEADER_BYTES: Final = 1 << 16
_BOM: Final = b"\xef\xbb\xbf"


class Reader(Protocol):
    """Reads one input to its end; counts in its stats whatever yields no event."""

    @property
    def n_bytes(self) -> int:
        """Decompressed size in bytes; exact only for small inputs, otherwise a large number."""

    def batches(self, run: Runner[Any]) -> Iterator[Any]:
        """Yield batches of events that may become rows, in order; for a kernel log, its rows.

        Args:
            run: Runs the loops, compiled or interpreted.
        """

    def header(self) -> Header:
        """Return the description of the recording; complete only after the input was read."""

    @property
    def position(self) -> int:
        """Bytes read so far, for progress."""


@dataclass(slots=True)
class Input:
    """One opened input whose format is detected, from which its reader is made."""

    stream: Stream
    format: InputFormat
    stack: ExitStack
    """Resources that are closed with the input."""
    number: int = 0
    """Index of the input among all inputs."""
    text: bytes = b""
    """Text only: its beginning, up to the first event line."""
    blocks: Iterator[Block] = field(default_factory=lambda: iter(()))
    """Text only: the whole text."""
    n_bytes: int = 0
    """Text only: its size; exact only below COMPILE_BYTES."""
    event_formats: str | Path | None = None
    """Raw pages only: the folder with the event formats, if it is not beside the pages."""

    @property
    def first_lines(self) -> list[str]:
        """The first lines of a text."""
        return [line.decode("utf-8", "replace") for line in _sample(self.text)[:_REFUSED_LINES]]

    @property
    def is_piped_text(self) -> bool:
        """Whether the input is text from a pipe, which may arrive slowly."""
        return self.format.unit == "line" and self.stream.size is None

    def reader(self, registry: EventRegistry, stats: SourceStats) -> Reader:
        """Return the reader of this input.

        Args:
            registry: Registry in which events are looked up and to which new ones are added.
            stats: Counts of the lines or records that yield no event.

        Raises:
            InputError: If the input cannot be read.
            FormatError: If its header cannot be read.
        """
        return FORMATS[self.format].open(self, registry, stats)


@contextmanager
def open_input(
    path: str,
    requested: InputFormat | None = None,
    *,
    is_log: bool = False,
    event_formats: str | Path | None = None,
    number: int = 0,
    unpacked: int | None = None,
) -> Iterator[Input]:
    """Open an input and detect its format; on exit close it and all that its reader opened.

    Args:
        path: A file, a folder of raw pages, or ``-`` for standard input.
        requested: The format; detected if None.
        is_log: Whether the user declares it a kernel log.
        event_formats: Folder with the event formats; an input that is no recording is then read as
            raw pages.
        number: Index of the input among all inputs.
        unpacked: Largest decompressed size in bytes; None: some hundred times the size of the file.

    Raises:
        InputError: If it is missing, empty or cannot be read.
        FormatError: If it is no trace; the message describes what it looks like.
    """
    with ExitStack() as stack:
        if requested != RAW_PAGES and not _is_folder_of_pages(path):
            stream = stack.enter_context(closing(open_stream(path, unpacked)))
            found = requested or detect_recording(stream.peek())
            if found is not None or event_formats is None:
                opened = Input(stream, found or FTRACE, stack, number)
                if found is None or found.unit == "line":
                    _begin_text(opened, found, is_log)
                yield opened
                return
        stream = Stream(path, "none", iter(()))
        yield Input(stream, RAW_PAGES, stack, number, event_formats=event_formats)


def _is_folder_of_pages(path: str) -> bool:
    if not Path(path).is_dir():
        return False
    from tdxtrace.ingest.tracedat.reader import find_pages

    return bool(find_pages(Path(path)))


def _begin_text(opened: Input, requested: InputFormat | None, is_log: bool) -> None:
    """Read the beginning of a text, and detect its format unless ``requested`` names it.

    Raises:
        InputError: If the input holds no text.
        FormatError: If it has no known format.
    """
    from tdxtrace.ingest.pasted import mend_text

    mend = mend_text(opened.stream.peek()[:_HEADER_BYTES])
    if mend is not None:
        opened.stream.chunks, opened.stream.fill = mend(opened.stream.chunks), None
    opened.n_bytes = opened.stream.size_up_to(COMPILE_BYTES)
    blocks, shown = opened.stream.blocks(), one_line(opened.stream.path)
    opened.text = _beginning(blocks)
    if not opened.text.strip():
        why = f": {opened.stream.truncated}" if opened.stream.truncated else ""
        raise InputError(f"{shown} contains no text{why}")
    detect = detect_log if is_log else detect_text
    opened.format = requested or detect(opened.text, shown)
    opened.blocks = chain([block_of([opened.text.removeprefix(_BOM)])], blocks)


def _beginning(blocks: Iterator[Block]) -> bytes:
    """Read blocks until one has an event line: a pipe may deliver one line at a time."""
    text = b""
    for block in blocks:
        text += block.tobytes()
        if len(text) >= _HEADER_BYTES or most_likely(text):
            break
    return text


# Functions that open a reader.


def _trace_dat(opened: Input, registry: EventRegistry, stats: SourceStats) -> Reader:
    from tdxtrace.ingest.tracedat.reader import DatReader, read_saved_tgids

    return DatReader(_data_file(opened), registry, stats, read_saved_tgids(opened.stream.path))


def _perf_data(opened: Input, registry: EventRegistry, stats: SourceStats) -> Reader:
    from tdxtrace.ingest.perfdata.reader import PerfReader

    return PerfReader(_data_file(opened), registry, stats)


def _raw_pages(opened: Input, registry: EventRegistry, stats: SourceStats) -> Reader:
    from tdxtrace.ingest.tracedat.reader import PageReader, open_pages, read_formats

    pages = opened.stack.enter_context(closing(open_pages(Path(opened.stream.path))))
    opened.stream.size = opened.stream.n_bytes = pages.size
    folder = opened.event_formats or pages.folder / "events"
    return PageReader(pages, read_formats(Path(folder)), registry, stats)


def _event_lines(opened: Input, registry: EventRegistry, stats: SourceStats) -> Reader:
    from tdxtrace.ingest.text.line_formats import count_instances
    from tdxtrace.ingest.text.reader import LineReader, TextReader, has_processes
    from tdxtrace.ingest.text.wrapping import mender_for

    stats.n_buffers = count_instances(opened.text[:_HEADER_BYTES].decode("latin-1"))
    lines = LineReader(opened.format.name, registry, stats)
    sample = _sample(opened.text)
    if opened.format == PERF_SCRIPT and has_processes(line.decode("latin-1") for line in sample):
        raise FormatError(
            f"{one_line(opened.stream.path)} has process IDs but no thread IDs; print them "
            "with perf script -F +tid"
        )
    mender = mender_for(sample, lines)
    reader = TextReader(lines, one_line(opened.stream.path), mender)
    return _TextReader(
        opened,
        lambda run: reader.batches(opened.blocks, run),
        lambda: _clock_of(opened.format, lines),
    )


def _function_graph(opened: Input, registry: EventRegistry, stats: SourceStats) -> Reader:
    from tdxtrace.ingest.text.function_graph import GraphReader

    lines = GraphReader(registry, stats)
    return _TextReader(
        opened, lambda _run: lines.batches(opened.blocks), lambda: _clock_of(opened.format, lines)
    )


def _bpftrace(opened: Input, registry: EventRegistry, stats: SourceStats) -> Reader:
    from tdxtrace.ingest.text.bpftrace import BpftraceReader

    lines = BpftraceReader(registry, stats)
    return _TextReader(
        opened,
        lambda _run: lines.batches(opened.blocks),
        lambda: (lines.clock, lines.resolution_ns),
    )


def _clock_of(form: InputFormat, lines: LineReader | GraphReader) -> tuple[str, int]:
    """Return the kind of clock and its resolution in ns, as the timestamps show them."""
    kind = "integer" if lines.has_integer_clock else "unnamed"
    # perf script --reltime and trace-cmd report --align-ts print the first event at 0; no host
    # records an event at the moment it is switched on.
    is_relative = form.times != "absolute" or lines.stats.span()[0] == 0
    return "relative" if is_relative else kind, lines.resolution_ns or 1


def _kernel_log(opened: Input, registry: EventRegistry, stats: SourceStats) -> Reader:
    from tdxtrace.ingest.kernel_log import prefixes
    from tdxtrace.ingest.kernel_log.reader import MessageReader

    log = MessageReader(opened.format.name, opened.number, stats)
    return _TextReader(
        opened,
        lambda _run: log.batches(opened.blocks),
        lambda: (log.clock_name, prefixes.resolution_ns(log.clock)),
    )


def _data_file(opened: Input) -> DataFile:
    """Return random access to an input: to the file itself, or to its decompressed content.

    Raises:
        InputError: If it cannot be read, or its decompressed size is absurdly large.
    """
    from tdxtrace.ingest.records.datafile import open_file, spool

    stream = opened.stream
    if stream.compression == "none" and stream.size is not None:
        stream.close()
        stream.n_bytes = stream.size
        file = open_file(stream.path)
    else:
        file = spool(stream.chunks, stream.path)
    return opened.stack.enter_context(closing(file))


@dataclass(slots=True)
class _TextReader:
    """Reader of a text input."""

    opened: Input
    batches: Callable[[Runner[Any]], Iterator[Any]]
    clock: Callable[[], tuple[str, int]]
    """Returns the kind of clock and its resolution in ns, after the text was read."""

    @property
    def n_bytes(self) -> int:
        """Size of the text in bytes."""
        return self.opened.n_bytes

    @property
    def position(self) -> int:
        """Bytes read so far, for progress."""
        return self.opened.stream.n_bytes

    def header(self) -> Header:
        """Return what comments and timestamps show of the recording; a log has no comments."""
        has_comments = self.opened.format.holds == "events"
        header = read_comments(self.opened.text[:_HEADER_BYTES] if has_comments else b"")
        kind, resolution_ns = self.clock()
        return replace(header, kind_of_clock=kind, resolution_ns=resolution_ns)


@dataclass(frozen=True, slots=True)
class FormatRow:
    """How to open inputs of one format, and by which magic number binary ones are detected."""

    open: Callable[[Input, EventRegistry, SourceStats], Reader]
    magic: tuple[bytes, ...] = ()
    """First bytes of a binary recording, one entry for each version."""


FORMATS: Final = {
    **{form: FormatRow(_event_lines) for form in INPUT_FORMATS.values() if form.unit == "line"},
    FUNCTION_GRAPH: FormatRow(_function_graph),
    BPFTRACE: FormatRow(_bpftrace),
    TRACE_DAT: FormatRow(_trace_dat, magic=(b"\x17\x08\x44tracing",)),
    PERF_DATA: FormatRow(_perf_data, magic=(b"PERFILE2", b"2ELIFREP")),
    RAW_PAGES: FormatRow(_raw_pages),
    KERNEL_LOG: FormatRow(_kernel_log),
    JOURNAL_JSON: FormatRow(_kernel_log),
    JOURNAL_EXPORT: FormatRow(_kernel_log),
}
"""The registry: one row for each format.  Text is detected line by line: see _line_tests."""


@cache
def _line_tests() -> tuple[tuple[InputFormat, Callable[[str], object]], ...]:
    """Return a test of a line for each text format; the first test that passes wins."""
    from tdxtrace.ingest.kernel_log import prefixes
    from tdxtrace.ingest.text import function_graph, line_formats

    return (
        (KERNEL_LOG, prefixes.has_log_prefix),
        *((INPUT_FORMATS[row.name], partial(_matches, row)) for row in line_formats.LINE_FORMATS),
        (FUNCTION_GRAPH, function_graph.LINE.match),
        (BPFTRACE, _is_bpftrace),
        (JOURNAL_JSON, _is_journal_json),
        (JOURNAL_EXPORT, _is_journal_export),
        (KERNEL_LOG, _is_message),
    )


# Each test imports its module for the first line that all tests before it reject: most texts
# have no such line.


def _is_bpftrace(line: str) -> object:
    from tdxtrace.ingest.text import bpftrace

    # A line with a name alone belongs to a stack trace.
    return ("=" in line or ":" in line) and bpftrace.is_line(line)


def _is_journal_json(line: str) -> object:
    from tdxtrace.ingest.kernel_log import entries

    return entries.IN_JSON.match(line) or entries.is_entry(line)


def _is_journal_export(line: str) -> object:
    from tdxtrace.ingest.kernel_log import entries

    return entries.IN_EXPORT.match(line)


def _is_message(line: str) -> object:
    from tdxtrace.ingest.kernel_log import messages, prefixes

    return messages.parse_message(prefixes.split_prefix(line).text)


def _matches(row: LineFormat, line: str) -> bool:
    return any(pattern.match(line) for pattern in row.patterns)


# Detection.


def format_named_by_user(name: str | None) -> InputFormat | None:
    """Return the format of a name that the user gave; None if the user gave none.

    Raises:
        QueryError: If no format has that name; the message lists all names.
    """
    if name is not None and name not in INPUT_FORMATS:
        raise QueryError(f"unknown format {name!r}; there are: {', '.join(INPUT_FORMATS)}")
    return None if name is None else INPUT_FORMATS[name]


def detect_recording(head: bytes) -> InputFormat | None:
    """Return the format of a binary recording that begins with ``head``; None for other content."""
    return next(
        (input_format for input_format, row in FORMATS.items() if head.startswith(row.magic)), None
    )


def detect_text(head: bytes, shown: str) -> InputFormat:
    """Return the format of a text that begins with ``head``.

    Raises:
        FormatError: If no line matches any format; the message describes what it looks like.
    """
    for magic, description in _NO_TRACE:
        if head.startswith(magic):
            raise FormatError(f"{shown} is {description}")
    if _IS_TAR.match(head):
        raise FormatError(f"{shown} is a tar archive; unpack it first")
    found = most_likely(head)
    if found is not None:
        return found
    from tdxtrace.ingest import refusals
    from tdxtrace.ingest.text import line_formats

    texts = [text for line in _sample(head) if (text := line.decode("utf-8", "replace")).strip()]
    found = most_likely(_joined_pairs(texts))
    if found is not None and found.holds == "events":
        return found
    others = line_formats.WITHOUT_EVENT
    if any(pattern.match(text) for pattern in others for text in texts):
        return FTRACE
    raise FormatError(f"{shown} is {refusals.refusal_of(texts) or _describe(head)}")


def _joined_pairs(lines: list[str]) -> bytes:
    """Join each line with the next one: a mailer may have wrapped one line into two."""
    plain = [line.lstrip("> \t") for line in lines]
    return "\n".join(f"{one.rstrip()} {other}" for one, other in pairwise(plain)).encode()


def detect_log(head: bytes, shown: str) -> InputFormat:
    """Return the format of a text that the user declares a kernel log.

    Raises:
        FormatError: If it is something else.
    """
    found = most_likely(head) or KERNEL_LOG
    if found.holds != "messages" or b"\0" in head[:_MAGIC_BYTES]:
        raise FormatError(f"{shown} is not a kernel log: it looks like {found.name}; see dmesg(1)")
    return found


def most_likely(head: bytes) -> InputFormat | None:
    """Return the most frequent format among the event lines in ``head``; None if no line matches.

    A text is a kernel log only if it has no event line: people put both into one file, and an
    event carries more information than a message.
    """
    lines, votes = _sample(head), Counter[InputFormat]()
    for found in filter(None, map(_format_of, lines)):
        votes[found] += 1
        if found.holds == "events" and 2 * votes[found] > len(lines):
            return found  # no other format can have more lines
    events = Counter({found: n for found, n in votes.items() if found.holds == "events"})
    return next((found for found, _ in (events or votes).most_common(1)), None)


def _sample(head: bytes) -> list[bytes]:
    head = head.removeprefix(_BOM)
    end = 0
    for _ in range(_SAMPLE_LINES):
        end = head.find(b"\n", end) + 1
        if not end:
            end = len(head)
            break
    return [matched_part(line) for line in head[:end].splitlines()[:_SAMPLE_LINES]]


def _format_of(line: bytes) -> InputFormat | None:
    from tdxtrace.ingest.text import line_formats

    text = line_formats.QUOTE.sub("", line.decode("utf-8", "replace").rstrip("\r"))
    if text.startswith("#"):
        return None
    return next((found for found, passes in _line_tests() if passes(text)), None)


def _describe(head: bytes) -> str:
    if b"\0" in head:
        return "not a trace: it is binary data of an unknown format"
    first = next((line for line in head.splitlines() if line.strip()), b"")
    text = one_line(first.decode("utf-8", "replace"), 60)
    return (
        f"not a trace: its first line is {text!r}; expected ftrace, trace-cmd report, perf script "
        "or dmesg text"
    )
