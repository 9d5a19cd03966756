"""Decoding of ring-buffer pages of a running tracefs instance, one tick at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from tdxtrace.compiler import choose
from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import RecordBatch, concatenate
from tdxtrace.ingest.records.formats import Formats, page_layout
from tdxtrace.ingest.records.layouts import EventCatalog
from tdxtrace.ingest.tracedat.merge import CpuPages, RingReader
from tdxtrace.ingest.tracedat.reader import printed_names
from tdxtrace.watch.ticks import Tick, Ticker


class PageTicker:
    """Decoder of ring-buffer pages into ticks."""

    def __init__(
        self,
        header_page: str,
        formats: Iterable[tuple[str, bytes]],
        page_bytes: int,
        mappings: Iterable[str] = (),
    ) -> None:
        """Set up a decoder for one tracefs instance.

        Args:
            header_page: Contents of ``events/header_page``: the layout of a page.
            formats: Group and format file of each event.
            page_bytes: Size of a page.
            mappings: ``EVENT=FUNCTION`` for probes that are not named after their function.

        Raises:
            FormatError: If the layout of a page is not understood.
            QueryError: If a mapping is malformed.
        """
        event_formats = Formats(header_page)
        for system, text in formats:
            event_formats.add(text, system)
        layout = page_layout(header_page, page_bytes)
        if layout is None:
            raise FormatError(f"header_page does not describe a page of {page_bytes} bytes")
        self._layout = layout
        self._ticker = Ticker(mappings)
        self._catalog = EventCatalog(
            event_formats.events,
            self._ticker.registry,
            self._ticker.stats,
            printed_names(event_formats.events),
        )
        self._later_events: RecordBatch | None = None

    def tick(
        self,
        pages: Mapping[int, bytes],
        until_ns: int | None,
        comms: Mapping[int, str],
        *,
        is_last: bool = False,
    ) -> Tick:
        """Decode the pages read since the last tick.

        Args:
            pages: Contents of each CPU's buffer.
            until_ns: Time at which reading of the first buffer started.  Later events are kept
                for the next tick, as their thread may have been on a CPU that was read
                earlier.  None: no more pages follow.
            comms: Thread names (comm) by thread ID.
            is_last: Whether this is the last tick.
        """
        batches = list(self._events(pages, comms))
        if self._later_events is not None:
            batches.insert(0, self._later_events)
            self._later_events = None
        if not batches:
            return self._ticker.tick((), is_last=is_last)
        events = concatenate(batches)
        events = events.take(np.argsort(events.ts_ns, kind="stable"))
        if until_ns is not None and not is_last:
            is_due = events.ts_ns <= until_ns
            self._later_events = events.take(~is_due).detached()
            events = events.take(is_due)
        return self._ticker.tick([events], is_last=is_last)

    def _events(
        self, pages: Mapping[int, bytes], comms: Mapping[int, str]
    ) -> Iterator[RecordBatch]:
        sources = [
            CpuPages(cpu, _MemoryReader(data)) for cpu, data in sorted(pages.items()) if data
        ]
        size = sum(map(len, pages.values()))
        stats = self._ticker.stats
        reader = RingReader(
            sources, self._layout, self._catalog, stats, comms=comms, run=choose(size)
        )
        yield from reader.batches()
        stats.record_damage(reader.n_damaged)


class _MemoryReader:
    """Reader of bytes in memory with the interface of a file's ``readinto``."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = np.frombuffer(data, np.uint8), 0

    def __call__(self, into: NDArray[np.uint8]) -> int:
        n = min(len(into), len(self._data) - self._position)
        into[:n] = self._data[self._position : self._position + n]
        self._position += n
        return n
