"""Which reader takes a binary recording, and what it gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

from tdxtrace.compiler import choose
from tdxtrace.ingest.batch import RecordBatch
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.provenance import Header
from tdxtrace.ingest.records.datafile import DataFile, open_file, spool
from tdxtrace.ingest.source import Stream
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.trace import RAW_PAGES


class BinaryReader(Protocol):
    """What reads a binary recording into raw events, and counts the rest in a stats."""

    def batches(self) -> Iterator[RecordBatch]:
        """Yield the events that may become rows, in the order of their time."""

    def header(self) -> Header:
        """Return what the recording says of itself, once it was read."""

    @property
    def position(self) -> int:
        """Bytes read so far, for progress."""


@contextmanager
def opened(
    name: str, stream: Stream, formats: Path | None, registry: EventRegistry, stats: SourceStats
) -> Iterator[BinaryReader]:
    """Open a recording of format ``name``; close it in the end.

    Args:
        name: One of BINARY_FORMATS.
        stream: The input.
        formats: Folder with the formats of events, for raw pages.
        registry: Where events are looked up, and added.
        stats: Where the rest is counted.

    Raises:
        InputError: If it cannot be read.
        FormatError: If its head cannot be read.
    """
    if name == RAW_PAGES:
        # A reader is imported with its first recording: most need only one.
        from tdxtrace.ingest.tracedat.raw_pages import PageReader, open_pages, read_formats  # noqa: PLC0415

        pages = open_pages(Path(stream.path))
        stream.size = stream.n_bytes = pages.size
        with closing(pages):
            folder = pages.beside / "events" if formats is None else formats
            yield PageReader(pages, read_formats(folder), registry, stats)
        return
    file = open_data(stream)
    with closing(file):
        yield open_reader(name, file, registry, stats, stream.path)


def open_data(stream: Stream) -> DataFile:
    """Give access to any place of an input: to the file, or to what it unpacks to.

    Raises:
        InputError: If it cannot be read, or unpacks to absurdly much.
    """
    if stream.compression == "none" and stream.size is not None:
        stream.close()
        stream.n_bytes = stream.size
        return open_file(stream.path)
    return spool(stream.chunks, stream.path, stream.size)


def open_reader(
    name: str,
    file: DataFile,
    registry: EventRegistry,
    stats: SourceStats,
    path: str | None = None,
) -> BinaryReader:
    """Return the reader of format ``name``; beside ``path`` there may be more about it.

    Raises:
        FormatError: If the file's head cannot be read.
    """
    if name == "perf.data":
        from tdxtrace.ingest.perfdata.reader import PerfReader  # noqa: PLC0415 - see opened

        return PerfReader(file, registry, stats, choose(file.size))
    from tdxtrace.ingest.tracedat.reader import DatReader  # noqa: PLC0415 - see opened
    from tdxtrace.ingest.tracedat.tracefs import tgids_beside  # noqa: PLC0415

    tgids = {} if path is None else tgids_beside(path)
    return DatReader(file, registry, stats, tgids)
