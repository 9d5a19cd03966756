"""Text that comes through a pipe, followed: ftrace, trace-cmd report or perf script."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Final

from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import RecordBatch
from tdxtrace.ingest.formats import detect_text, most_likely
from tdxtrace.ingest.source import CHUNK_BYTES, KEPT_LINE_BYTES, block_of
from tdxtrace.ingest.text.reader import LineReader, TextReader
from tdxtrace.tables.formats import FUNCTION_GRAPH
from tdxtrace.watch.ticks import Tick, Ticker

_READ_BYTES: Final = 1 << 20
# Text that is worth a look before its time, and that may wait at most: then the writer has
# to wait, and its own buffer overruns, which it then tells.
_WORTH_A_LOOK: Final = 8 << 20
_MOST_WAITING: Final = 32 << 20
# Text that is looked at before it is called no trace.
_HEAD_BYTES: Final = 1 << 20


@dataclass(slots=True)
class Pipe:
    """A thread that reads a file descriptor, so that looking at it never waits for long."""

    fd: int
    error: OSError | None = None
    _chunks: list[bytes] = field(default_factory=list)
    _n_bytes: int = 0
    _rest: bytes = b""
    _is_over: bool = False
    _changed: Condition = field(default_factory=Condition)

    def start(self) -> None:
        """Begin to read."""
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.fd, _READ_BYTES)
            except OSError as error:
                self.error, data = error, b""
            with self._changed:
                if not data:
                    self._is_over = True
                    self._changed.notify_all()
                    return
                self._chunks.append(data)
                self._n_bytes += len(data)
                if self._n_bytes >= _WORTH_A_LOOK:
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._n_bytes < _MOST_WAITING)

    @property
    def is_over(self) -> bool:
        """Whether everything was read and taken."""
        with self._changed:
            return self._is_over and not self._chunks

    def wait(self, seconds: float) -> bool:
        """Wait so long; return True at once at the end, or when much has come."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_over or self._n_bytes >= _WORTH_A_LOOK, seconds
            )

    def take(self) -> bytes:
        """Take the whole lines that came; at the end also one without a newline."""
        with self._changed:
            came, self._chunks, self._n_bytes = b"".join(self._chunks), [], 0
            is_over = self._is_over
            self._changed.notify_all()
        text = self._rest + came
        end = len(text) if is_over else text.rfind(b"\n") + 1
        self._rest = text[end:][-2 * KEPT_LINE_BYTES :]
        return text[:end] + (b"\n" if is_over and text[:end] and not text.endswith(b"\n") else b"")


class TextTicker:
    """Reads lines as they come; the format is told by the first that look like one."""

    def __init__(self, shown: str, mappings: Iterable[str] = ()) -> None:
        """Begin, with what messages call the input."""
        self._ticker = Ticker(mappings)
        self._shown = shown
        self._head = b""
        self._reader: TextReader | None = None

    def tick(self, text: bytes, *, is_last: bool = False) -> Tick:
        """Decode whole lines.

        Raises:
            FormatError: If what came so far is no trace that can be followed.
        """
        if self._reader is None:
            text = self._head + text
            self._reader = self._recognised(text, is_last)
            if self._reader is None:
                self._head = text
                return self._ticker.tick(())
        return self._ticker.tick(self._events(text), is_last=is_last)

    def _recognised(self, head: bytes, is_last: bool) -> TextReader | None:
        """Tell the format; None while too little came."""
        if most_likely(head) is None and len(head) < _HEAD_BYTES and not is_last:
            return None
        if not head and is_last:
            raise FormatError(f"{self._shown} ended before any event came")
        found = detect_text(head, self._shown)
        if found == FUNCTION_GRAPH:
            raise FormatError(f"{self._shown} is function_graph text, which cannot be followed")
        return TextReader(LineReader(found.name, self._ticker.registry, self._ticker.stats))

    def _events(self, text: bytes) -> Iterator[RecordBatch]:
        reader = self._reader
        if reader is not None and text:
            yield from reader.batches(block_of([piece]) for piece in _pieces(text))
            reader.forget_threads()


def _pieces(text: bytes) -> Iterator[bytes]:
    """Cut text into blocks of whole lines that fit the caches."""
    at = 0
    while at < len(text):
        end = at + CHUNK_BYTES
        if end < len(text):
            end = text.rfind(b"\n", at, end) + 1 or text.find(b"\n", end) + 1 or len(text)
        yield text[at:end]
        at = end
