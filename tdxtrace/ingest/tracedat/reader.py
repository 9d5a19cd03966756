"""A trace.dat of trace-cmd as batches of events: of all its buffers, in order of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tdxtrace.compiler import Runner
from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import RecordBatch
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.provenance import TICK_CLOCKS, Header
from tdxtrace.ingest.records.catalog import EventCatalog
from tdxtrace.ingest.records.datafile import DataFile
from tdxtrace.ingest.records.formats import PageLayout, common_of, page_layout
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.tracedat.file import (
    DatFile,
    is_compressed,
    kallsyms_of,
    read_dat,
    symbol_finder,
)
from tdxtrace.ingest.tracedat.merge import CpuPages, RingReader
from tdxtrace.ingest.tracedat.options import Buffer, Clock
from tdxtrace.ingest.tracedat.pages import CompressedPages, PlainPages
from tdxtrace.ingest.tracedat.tracefs import comms_of, cpu_stats, note_stats, printed_names

Pages = PlainPages | CompressedPages


@dataclass(slots=True)
class DatReader:
    """Reads one trace.dat into batches of events, and counts the rest."""

    file: DataFile
    registry: EventRegistry
    stats: SourceStats
    tgids: Mapping[int, int] = field(default_factory=dict)
    """The process of each thread, where something beside the file tells."""
    dat: DatFile = field(init=False)
    _sources: list[CpuPages] = field(init=False)
    _pages: list[Pages] = field(default_factory=list)
    _owners: list[tuple[str, int]] = field(default_factory=list)
    _ring: RingReader | None = None

    def __post_init__(self) -> None:
        self.dat = read_dat(self.file)
        buffers = self.dat.options.buffers
        self._sources = [source for buffer in buffers for source in self._pages_of(buffer)]
        if not self._sources:
            raise FormatError(self._nothing())

    def batches(self, run: Runner[Any]) -> Iterator[RecordBatch]:
        """Yield the events that may become rows, in the order of their time.

        Raises:
            FormatError: If the file holds no trace data that can be read.
        """
        dat = self.dat
        catalog = EventCatalog(
            dat.formats.events,
            common_of(dat.formats.events.values()),
            self.registry,
            self.stats,
            printed_names(dat.formats.events),
            symbol_finder(partial(kallsyms_of, dat)),
        )
        self._ring = RingReader(
            self._sources,
            self._layout(dat.page_size),
            catalog,
            self.stats,
            Clock.of(dat.options),
            comms_of(dat.cmdlines),
            self.tgids,
            run,
        )
        yield from self._ring.batches()
        if dat.cut_short and not self.stats.n_lines:
            raise FormatError(self._nothing())
        self._losses()

    @property
    def n_bytes(self) -> int:
        """Bytes of all pages, once they are unpacked."""
        return sum(pages.n_bytes for pages in self._pages)

    @property
    def position(self) -> int:
        """Bytes of the file that were read, for progress."""
        return sum(pages.at for pages in self._pages[-1:])

    def header(self) -> Header:
        """What the file says of the recording."""
        options = self.dat.options
        words = options.uname.split()
        version = options.version.split()
        clock = options.clock or next((b.clock for b in options.buffers if b.clock), "")
        if clock in TICK_CLOCKS and options.tsc_mult:
            clock = f"{clock} in ns"
        return Header(
            words[2] if len(words) > 2 else None,
            _tool(version),
            clock or None,
            None,
            None,
            bool(options.cpu_stats),
        )

    def _layout(self, page_size: int) -> PageLayout:
        dat = self.dat
        made = page_layout(dat.formats.header_page, page_size)
        if made is None:
            raise FormatError(
                f"{self.file.shown} is a damaged trace.dat: its header_page does not describe "
                f"a page of {page_size} bytes"
            )
        return made

    def _pages_of(self, buffer: Buffer) -> Iterator[CpuPages]:
        dat = self.dat
        if buffer.is_text:
            return
        if buffer.page_size not in (0, dat.page_size):
            self._page_size(buffer)
        layout = self._layout(dat.page_size)
        in_chunks = is_compressed(dat, buffer)
        for data in buffer.cpus:
            if not data.size:
                continue
            if in_chunks and dat.unpack is not None:
                pages: Pages = CompressedPages(self.file, layout, data.at, dat.unpack)
            else:
                pages = PlainPages(self.file, layout, data.at, data.size)
            self._pages.append(pages)
            self._owners.append((buffer.name, data.cpu))
            shifts = dat.options.shifts
            shift = shifts[data.cpu] if 0 <= data.cpu < len(shifts) else None
            yield CpuPages(data.cpu, pages.read, shift)

    def _page_size(self, buffer: Buffer) -> None:
        """Version 7 gives each buffer its page size: the sub-buffer's, since Linux 6.8."""
        if self._pages:
            raise FormatError(f"{self.file.shown} has buffers with pages of several sizes")
        self.dat.page_size = buffer.page_size

    def _nothing(self) -> str:
        dat, shown = self.dat, self.file.shown
        if any(buffer.is_text for buffer in dat.options.buffers):
            return f"{shown} holds text of a latency tracer; print it: trace-cmd report {shown}"
        if dat.cut_short:
            return f"{shown} is cut short or damaged: {dat.cut_short}"
        return f"{shown} holds no trace data: all its buffers are empty"

    def _losses(self) -> None:
        """Add what the file as a whole lost."""
        self.stats.record_damage(0 if self._ring is None else self._ring.n_damaged, "pages")
        for detail in sorted({p.cut_short for p in self._pages if p.cut_short}):
            self.stats.record_loss("truncated", None, detail)
        if self.dat.cut_short:
            self.stats.record_loss("truncated", None, self.dat.cut_short)
        name = ""
        for text in self.dat.options.cpu_stats:
            if "Buffer:" in text:
                name = text.partition("Buffer:")[2].strip()
            for cpu, counters in cpu_stats(text):
                where = f"buffer {name}, " if name else ""
                note_stats(self.stats, cpu, counters, where, self._n_events(name, cpu))

    def _n_events(self, name: str, cpu: int) -> int | None:
        """Events that were read of a CPU in the buffer ``name``; None if it has no pages."""
        if self._ring is None or (name, cpu) not in self._owners:
            return None
        return self._ring.n_events()[self._owners.index((name, cpu))]


def _tool(version: list[str]) -> str:
    """What recorded: trace-cmd gives its version alone, tdxtrace capture its name too."""
    if version[:1] == ["tdxtrace"]:
        return " ".join(version[:2])
    return f"trace-cmd {version[0]}" if version else "trace-cmd"
