"""Readers of ring buffers: a trace.dat of trace-cmd, or a file of pages for each CPU."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from tdxtrace.compiler import Runner
from tdxtrace.errors import FormatError, InputError
from tdxtrace.ingest.batch import RecordBatch
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.loops.pages import page_start
from tdxtrace.ingest.records.datafile import DataFile, open_file
from tdxtrace.ingest.records.formats import (
    EventFormat,
    Formats,
    PageLayout,
    fields_of,
    foreign_machine,
    page_layout,
)
from tdxtrace.ingest.records.layouts import PADDING, EventCatalog, int64_at
from tdxtrace.ingest.stats import TICK_CLOCKS, Header, Loss, SourceStats
from tdxtrace.ingest.tracedat.file import (
    DatFile,
    is_compressed,
    kallsyms_of,
    read_dat,
    symbol_finder,
)
from tdxtrace.ingest.tracedat.merge import CompressedPages, CpuPages, PlainPages, RingReader
from tdxtrace.ingest.tracedat.options import Buffer, Clock, clock_of
from tdxtrace.tables.text import one_line

Pages = PlainPages | CompressedPages


@dataclass(slots=True)
class DatReader:
    """Reads one trace.dat into batches of events, and counts all other records."""

    file: DataFile
    registry: EventRegistry
    stats: SourceStats
    tgids: Mapping[int, int] = field(default_factory=dict)
    """Process ID by thread ID, if recorded in a file next to the trace.dat."""
    dat: DatFile = field(init=False)
    _sources: list[CpuPages] = field(init=False)
    _pages: list[Pages] = field(default_factory=list)
    _buffer_cpus: list[tuple[str, int]] = field(default_factory=list)
    _ring: RingReader | None = None

    def __post_init__(self) -> None:
        self.dat = read_dat(self.file)
        buffers = self.dat.options.buffers
        self._sources = [source for buffer in buffers for source in self._pages_of(buffer)]
        if not self._sources:
            raise FormatError(self._no_data_message())
        self.stats.n_buffers = len({name for name, _ in self._buffer_cpus})

    def batches(self, run: Runner[Any]) -> Iterator[RecordBatch]:
        """Yield the events that may become rows, in time order.

        Raises:
            FormatError: If the file has no readable trace data.
        """
        dat = self.dat
        catalog = EventCatalog(
            dat.formats.events,
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
            raise FormatError(self._no_data_message())
        self._losses()

    @property
    def n_bytes(self) -> int:
        """Number of bytes of all pages after decompression."""
        return sum(pages.n_bytes for pages in self._pages)

    @property
    def position(self) -> int:
        """Number of bytes of the file read so far, for progress."""
        return sum(pages.at for pages in self._pages[-1:])

    def header(self) -> Header:
        """Return the metadata of the recording, from the file."""
        options = self.dat.options
        words = options.uname.split()
        version = options.version.split()
        clock = options.clock or next((b.clock for b in options.buffers if b.clock), "")
        if clock in TICK_CLOCKS and options.tsc_mult:
            clock = f"{clock} in ns"
        kernel = words[2] if len(words) > 2 else None
        counts_losses = bool(options.cpu_stats)
        return Header(kernel, _tool(version), clock or None, counts_losses=counts_losses)

    def _layout(self, page_size: int) -> PageLayout:
        dat = self.dat
        found = page_layout(dat.formats.header_page, page_size)
        if found is None:
            raise FormatError(
                f"{self.file.shown} is a damaged trace.dat: its header_page does not describe "
                f"a page of {page_size} bytes"
            )
        return found

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
                end = data.at + data.size
                pages: Pages = CompressedPages(self.file, layout, data.at, dat.unpack, end)
            else:
                pages = PlainPages(self.file, layout, data.at, data.size)
            self._pages.append(pages)
            self._buffer_cpus.append((buffer.name, data.cpu))
            shifts = dat.options.shifts
            shift = shifts[data.cpu] if 0 <= data.cpu < len(shifts) else None
            yield CpuPages(data.cpu, pages.read, shift)

    def _page_size(self, buffer: Buffer) -> None:
        """Use the page size of a version 7 buffer: the size of its sub-buffers, since Linux 6.8.

        Raises:
            FormatError: If buffers have pages of different sizes.
        """
        if self._pages:
            raise FormatError(f"{self.file.shown} has buffers with pages of several sizes")
        self.dat.page_size = buffer.page_size

    def _no_data_message(self) -> str:
        dat, shown = self.dat, self.file.shown
        if any(buffer.is_text for buffer in dat.options.buffers):
            return f"{shown} has text of a latency tracer; print it with trace-cmd report {shown}"
        if dat.cut_short:
            return f"{shown} is cut short or damaged: {dat.cut_short}"
        return f"{shown} has no trace data: all its buffers are empty"

    def _losses(self) -> None:
        """Record losses of the file as a whole, and those that the kernel's counters report."""
        self.stats.record_damage(0 if self._ring is None else self._ring.n_damaged)
        for detail in sorted({p.cut_short for p in self._pages if p.cut_short}):
            self.stats.record_loss("truncated", None, detail)
        if self.dat.cut_short:
            self.stats.record_loss("truncated", None, self.dat.cut_short)
        name, reported = "", ReportedLosses.of(self.stats)
        n_events = (
            dict(zip(self._buffer_cpus, self._ring.n_events(), strict=True)) if self._ring else {}
        )
        for text in self.dat.options.cpu_stats:
            if "Buffer:" in text:
                name = text.partition("Buffer:")[2].strip()
            for cpu, counters in cpu_stats(text):
                where = f"buffer {name}, " if name else ""
                record_counter_losses(reported, cpu, counters, where, n_events.get((name, cpu)))


def _tool(version: list[str]) -> str:
    """Return name and version of the recorder; trace-cmd writes its version without a name."""
    if version[:1] == ["tdxtrace"]:
        return " ".join(version[:2])
    return f"trace-cmd {version[0]}" if version else "trace-cmd"


_CPU: Final = re.compile(r"cpu(?P<cpu>\d{1,4})(?!\d)")
_PAGES: Final = "trace_pipe_raw"
_ADVICE: Final = "save the text of tracefs' file trace instead"
_PAGE_BYTES: Final = 4096
_MAX_TEXT: Final = 16 << 20


@dataclass(slots=True)
class RawPages:
    """Files of pages, one for each CPU, and the folder with further files of the recording."""

    files: dict[int, DataFile]
    shown: str
    folder: Path
    """Folder that may contain saved_cmdlines, saved_tgids, trace_clock, osrelease, events."""

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.size for file in self.files.values())

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


def find_pages(path: Path) -> dict[int, Path]:
    """Return the files of pages by CPU, from a folder or a single file.

    The folder is like ``/sys/kernel/tracing`` or its ``per_cpu``, or has a file for each
    CPU with the CPU number in its name: ``cpu0.raw``.
    """
    if path.is_file():
        found = [path]
    else:
        found = sorted(path.glob(f"per_cpu/cpu*/{_PAGES}")) or sorted(path.glob(f"cpu*/{_PAGES}"))
        found = found or sorted(one for one in path.glob("*cpu[0-9]*") if one.is_file())
    named = [
        (_CPU.search(one.parent.name if one.name == _PAGES else one.name), one) for one in found
    ]
    if path.is_file():
        return {int(match["cpu"]) if match else 0: one for match, one in named}
    return {int(match["cpu"]): one for match, one in named if match}


def open_pages(path: Path) -> RawPages:
    """Open the files of pages at ``path``.

    Raises:
        InputError: If there are no such files, or one cannot be read.
    """
    shown = one_line(str(path))
    found = find_pages(path)
    if not found:
        raise InputError(f"{shown} has no ring-buffer pages: no per_cpu/cpu0/{_PAGES}, no cpu0.raw")
    files = {cpu: open_file(str(one)) for cpu, one in found.items()}
    return RawPages(files, shown, path if path.is_dir() else path.parent)


def read_formats(folder: Path) -> Formats:
    """Read the ``events`` folder of tracefs, or a copy of it.

    Raises:
        InputError: If it contains no format.
    """
    formats = Formats(_text(folder / "header_page"))
    for path in sorted(folder.glob("*/*/format")):
        formats.add(_text(path).encode(), path.parent.parent.name)
    if not formats.events:
        raise InputError(
            f"{one_line(str(folder))} has no event formats; name a copy of "
            "/sys/kernel/tracing/events"
        )
    return formats


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_TEXT).decode("utf-8", "replace")
    except OSError:
        return ""


@dataclass(slots=True)
class PageReader:
    """Reads files of pages into batches of events, and counts all other records."""

    pages: RawPages
    formats: Formats
    registry: EventRegistry
    stats: SourceStats
    _files: list[PlainPages] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Total size of the pages in bytes."""
        return self.pages.size

    def batches(self, run: Runner[Any]) -> Iterator[RecordBatch]:
        """Yield the events that may become rows, in time order.

        Raises:
            FormatError: If the files contain no pages.
        """
        layout = self._layout()
        sources = []
        for cpu, file in sorted(self.pages.files.items()):
            self._files.append(PlainPages(file, layout, 0, file.size))
            sources.append(CpuPages(cpu, self._files[-1].read))
        events = self.formats.events
        names = printed_names(events)
        catalog = EventCatalog(events, self.registry, self.stats, names)
        comms = comms_of(_text(self.pages.folder / "saved_cmdlines"))
        tgids = tgids_of(_text(self.pages.folder / "saved_tgids"))
        reader = RingReader(sources, layout, catalog, self.stats, Clock(), comms, tgids, run)
        yield from reader.batches()
        self.stats.record_damage(reader.n_damaged)
        for detail in sorted({file.cut_short for file in self._files if file.cut_short}):
            self.stats.record_loss("truncated", None, detail)
        reported = ReportedLosses.of(self.stats)
        for cpu, counters in self._stats():
            record_counter_losses(reported, cpu, counters, "", None)

    @property
    def position(self) -> int:
        """Number of bytes read so far, for progress."""
        return sum(file.at for file in self._files)

    def header(self) -> Header:
        """Return the metadata of the recording, from the files next to the pages."""
        clock = clock_of(_text(self.pages.folder / "trace_clock")) or None
        # tdxtrace capture writes the kernel release to this file; tracefs has no such file.
        release = _text(self.pages.folder / "osrelease").strip() or None
        return Header(release, _PAGES, clock, None, None, bool(self._stats()))

    def _stats(self) -> list[tuple[int, dict[str, int]]]:
        found = []
        for cpu in self.pages.files:
            text = _text(self.pages.folder / "per_cpu" / f"cpu{cpu}" / "stats")
            found += list(cpu_stats(f"CPU: {cpu}\n{text}")) if text else []
        return found

    def _layout(self) -> PageLayout:
        """Return the layout of the pages; at least one file must begin with a valid page.

        Raises:
            FormatError: If none does, or the pages are from a 32-bit or big-endian machine.
        """
        header, shown = self.formats.header_page, self.pages.shown
        fields = fields_of(header)
        size = fields["data"].end if "data" in fields else _PAGE_BYTES
        if "commit" in fields and fields["commit"].size == 4:
            raise foreign_machine(shown, False, _ADVICE)
        layout = page_layout(header, size)
        if layout is not None and self._is_valid_start(layout):
            return layout
        if layout is not None and self._is_valid_start(layout, is_swapped=True):
            raise foreign_machine(shown, True, _ADVICE)
        raise FormatError(f"{shown} does not begin with a ring-buffer page of {size} bytes")

    def _is_valid_start(self, layout: PageLayout, *, is_swapped: bool = False) -> bool:
        """Return whether a file begins with a valid page, in given or swapped byte order."""
        shape = layout.size, layout.data, layout.commit
        for file in self.pages.files.values():
            first = np.frombuffer(file.read(0, layout.size), np.uint8)
            if len(first) > layout.data:
                page = np.zeros(layout.size + PADDING, np.uint8)
                page[: len(first)] = first
                if is_swapped:
                    page.view("<u8")[: layout.size // 8].byteswap(inplace=True)
                at = int64_at(page)
                # Length and flags use the lower half of the number only.  The kernel adds the
                # flag of lost events, bit 31, as a negative int, so that the upper half may be
                # all ones (Linux kernel/trace/ring_buffer.c, RB_MISSED_EVENTS).
                if page_start(at, 0, shape)[0] >= 0 and at[layout.commit] >> 31 in (0, 1, -1):
                    return True
        return False


_CMDLINE: Final = re.compile(r"^[^\S\n]*(?P<tid>\d{1,9}) (?P<comm>.{1,64})$", re.MULTILINE)
_STAT: Final = re.compile(r"^(?P<key>[a-z ]{3,20}): (?P<n>\d{1,18})\s*$", re.MULTILINE)
_CPU_HEADER: Final = re.compile(r"^CPU: (?P<cpu>\d{1,4})\s*$", re.MULTILINE)

_MAX_JSON: Final = 64 << 20
# PID_MAX_LIMIT: Linux include/linux/threads.h.
_MAX_PID: Final = 1 << 22
_TGID: Final = re.compile(r"^[^\S\n]*(?P<tid>\d{1,9}) (?P<tgid>\d{1,9})$", re.MULTILINE)


def printed_names(events: Mapping[int, EventFormat]) -> Callable[[EventFormat], str]:
    """Return a function from an event to its name, with its group if two events share the name."""
    counts = Counter(event.name for event in events.values())

    def name(event: EventFormat) -> str:
        return event.name if counts[event.name] == 1 else f"{event.system}:{event.name}"

    return name


def comms_of(cmdlines: str) -> dict[int, str]:
    """Parse tracefs' ``saved_cmdlines``: the last saved name by thread ID."""
    return {int(found["tid"]): found["comm"] for found in _CMDLINE.finditer(cmdlines)}


def tgids_of(text: str) -> dict[int, int]:
    """Parse tracefs' ``saved_tgids``: the process ID by thread ID, for threads that were saved."""
    return {int(found["tid"]): int(found["tgid"]) for found in _TGID.finditer(text)}


def cpu_stats(text: str) -> Iterator[tuple[int, dict[str, int]]]:
    """Parse ``per_cpu/cpuN/stats`` of one or more CPUs, each headed by ``CPU: N``.

    Yields:
        CPU number, and its counters by name.
    """
    parts = _CPU_HEADER.split(text)
    for cpu, body in zip(parts[1::2], parts[2::2], strict=True):
        yield int(cpu), {found["key"]: int(found["n"]) for found in _STAT.finditer(body)}


@dataclass(frozen=True, slots=True)
class ReportedLosses:
    """Losses reported in pages, by CPU."""

    stats: SourceStats
    n_events: Counter[int]
    """Lost events in losses with a known count."""
    uncounted: dict[int, list[Loss]]
    """Losses with an unknown number of events."""

    @classmethod
    def of(cls, stats: SourceStats) -> ReportedLosses:
        """Sum up the losses recorded in ``stats`` so far."""
        n_events, uncounted = Counter[int](), dict[int, list[Loss]]()
        for gap in stats.gaps:
            if gap.kind == "lost_events" and gap.n_events is None:
                uncounted.setdefault(gap.cpu, []).append(gap)
            elif gap.kind == "lost_events":
                n_events[gap.cpu] += gap.n_events or 0
        return cls(stats, n_events, uncounted)


def record_counter_losses(
    reported: ReportedLosses,
    cpu: int,
    counters: Mapping[str, int],
    where: str,
    n_events: int | None,
) -> None:
    """Record losses that the kernel's counters report and the pages do not.

    ``overrun`` counts events overwritten in the buffer, ``dropped events`` those that did
    not fit (overwrite off), ``commit overrun`` those lost while a page was being written,
    ``entries`` those still in the kernel when the counters were read (Linux
    Documentation/trace/ftrace.rst, per_cpu/cpu0/stats).

    Args:
        reported: Losses reported in pages, and the statistics to which losses are added.
        cpu: The CPU.
        counters: Its counters by name.
        where: Text before "CPU n" in the detail.
        n_events: Number of its events in the recording, if known: trace-cmd extract reads
            events that the counters still report as entries.
    """
    stats = reported.stats
    unreported = counters.get("overrun", 0) - reported.n_events[cpu]
    if len(reported.uncounted.get(cpu, ())) == 1 and unreported > 0:
        # A page without room for the count reports only that events were lost.
        reported.uncounted.pop(cpu)[0].n_events = unreported
        reported.n_events[cpu] += unreported
        unreported = 0
    stats.record_loss("overwritten", max(0, unreported), f"{where}CPU {cpu}", cpu=cpu)
    stats.record_loss(
        "buffer_full", counters.get("dropped events", 0), f"{where}CPU {cpu}", cpu=cpu
    )
    stats.record_loss(
        "lost_events", counters.get("commit overrun", 0), f"{where}commit overrun", cpu=cpu
    )
    if n_events is not None:
        left = counters.get("entries", 0)
        unread = max(0, min(left, left + counters.get("read events", 0) - n_events))
        stats.record_loss("unread", unread, f"{where}CPU {cpu}", cpu=cpu)


def read_saved_tgids(path: str) -> dict[int, int]:
    """Read process IDs by thread ID, which ``tdxtrace capture`` saves in a file with a trace.dat.

    The trace.dat format has no place for them, and without them the vCPUs of two VMs cannot be
    distinguished.  Empty if the file is missing or damaged.
    """
    try:
        with Path(f"{path}.capture.json").open("rb") as file:
            saved = json.loads(file.read(_MAX_JSON))["tgids"]
        pairs = [(int(tid), tgid) for tid, tgid in saved.items() if isinstance(tgid, int)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {tid: tgid for tid, tgid in pairs if 0 < tid < _MAX_PID and 0 < tgid < _MAX_PID}
