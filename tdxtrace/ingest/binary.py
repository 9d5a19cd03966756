"""Which reader takes a binary recording, and what it gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from tdxtrace.ingest.datafile import DataFile, open_file, spool
from tdxtrace.ingest.headers import Header
from tdxtrace.ingest.lines import Vocabulary
from tdxtrace.ingest.perfdata import PerfReader
from tdxtrace.ingest.raw import RawEvents
from tdxtrace.ingest.stream import Stream
from tdxtrace.ingest.tally import Tally
from tdxtrace.ingest.tracedat import DatReader

BINARY_FORMATS: Final = ("trace.dat", "perf.data")


class BinaryReader(Protocol):
    """What reads a binary recording into raw events, and counts the rest in a tally."""

    def batches(self) -> Iterator[RawEvents]:
        """Yield the events that may become rows, in the order of their time."""

    def header(self) -> Header:
        """Return what the recording says of itself, once it was read."""

    @property
    def position(self) -> int:
        """Bytes read so far, for progress."""


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


def open_reader(name: str, file: DataFile, vocabulary: Vocabulary, tally: Tally) -> BinaryReader:
    """Return the reader of format ``name``.

    Raises:
        FormatError: If the file's head cannot be read.
    """
    if name == "perf.data":
        return PerfReader(file, vocabulary, tally)
    return DatReader(file, vocabulary, tally)
