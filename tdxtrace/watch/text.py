"""Decoding of trace text from a pipe (ftrace, trace-cmd report, perf script), tick by tick."""

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
from tdxtrace.tables.formats import BPFTRACE, FUNCTION_GRAPH
from tdxtrace.watch.ticks import Tick, Ticker

_READ_BYTES: Final = 1 << 20
# Buffered text that triggers an early tick, and the maximum buffered: then reading stops, the
# writer blocks, and its own buffer overruns, which it reports as lost events.
_EARLY_TICK_BYTES: Final = 8 << 20
_MAX_BUFFERED_BYTES: Final = 32 << 20
# Text read without recognising a format before the input is rejected.
_HEAD_BYTES: Final = 1 << 20


@dataclass(slots=True)
class Pipe:
    """Buffer filled from a file descriptor by a background thread."""

    fd: int
    error: OSError | None = None
    _chunks: list[bytes] = field(default_factory=list)
    _n_bytes: int = 0
    _partial_line: bytes = b""
    _has_ended: bool = False
    _changed: Condition = field(default_factory=Condition)

    def start(self) -> None:
        """Start the reading thread."""
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.fd, _READ_BYTES)
            except OSError as error:
                self.error, data = error, b""
            with self._changed:
                if not data:
                    self._has_ended = True
                    self._changed.notify_all()
                    return
                self._chunks.append(data)
                self._n_bytes += len(data)
                if self._n_bytes >= _EARLY_TICK_BYTES:
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._n_bytes < _MAX_BUFFERED_BYTES)

    @property
    def has_ended(self) -> bool:
        """Whether the input ended and all of it was taken."""
        with self._changed:
            return self._has_ended and not self._chunks

    def wait(self, seconds: float) -> bool:
        """Wait for the end of input or enough text for an early tick; False on timeout."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._has_ended or self._n_bytes >= _EARLY_TICK_BYTES, seconds
            )

    def take(self) -> bytes:
        """Remove and return the complete lines; at the end of input also an unterminated one."""
        with self._changed:
            data, self._chunks, self._n_bytes = b"".join(self._chunks), [], 0
            has_ended = self._has_ended
            self._changed.notify_all()
        text = self._partial_line + data
        end = len(text) if has_ended else text.rfind(b"\n") + 1
        self._partial_line = text[end:][-2 * KEPT_LINE_BYTES :]
        return text[:end] + (
            b"\n" if has_ended and text[:end] and not text.endswith(b"\n") else b""
        )


class TextTicker:
    """Decoder of text into ticks; the format is recognised from the first lines."""

    def __init__(self, shown: str, mappings: Iterable[str] = ()) -> None:
        """Set up a decoder; error messages name the input ``shown``."""
        self._ticker = Ticker(mappings)
        self._shown = shown
        self._head = b""
        self._reader: TextReader | None = None

    def tick(self, text: bytes, *, is_last: bool = False) -> Tick:
        """Decode complete lines.

        Raises:
            FormatError: If the text so far has no format that can be followed.
        """
        if self._reader is None:
            text = self._head + text
            self._reader = self._detect_format(text, is_last)
            if self._reader is None:
                self._head = text
                return self._ticker.tick(())
        return self._ticker.tick(self._events(text), is_last=is_last)

    def _detect_format(self, head: bytes, is_last: bool) -> TextReader | None:
        """Return a reader for the format recognised; None if more text is needed."""
        if most_likely(head) is None and len(head) < _HEAD_BYTES and not is_last:
            return None
        if not head and is_last:
            raise FormatError(f"{self._shown} ended before any event came")
        found = detect_text(head, self._shown)
        if found in (FUNCTION_GRAPH, BPFTRACE):
            raise FormatError(f"{self._shown} is {found.name} text, which cannot be followed")
        return TextReader(LineReader(found.name, self._ticker.registry, self._ticker.stats))

    def _events(self, text: bytes) -> Iterator[RecordBatch]:
        reader = self._reader
        if reader is not None and text:
            blocks = (block_of([piece]) for piece in _line_blocks(text))
            yield from reader.batches(blocks, self._ticker.run)
            reader.forget_threads()


def _line_blocks(text: bytes) -> Iterator[bytes]:
    """Split text into blocks of complete lines of about CHUNK_BYTES, which fit the CPU caches."""
    at = 0
    while at < len(text):
        end = at + CHUNK_BYTES
        if end < len(text):
            end = text.rfind(b"\n", at, end) + 1 or text.find(b"\n", end) + 1 or len(text)
        yield text[at:end]
        at = end
