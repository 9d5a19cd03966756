"""A trace.dat of trace-cmd becomes raw events: of all its buffers, in order of time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tdxtrace.errors import FormatError
from tdxtrace.ingest.clocks import TICK_CLOCKS, Clock, corrected
from tdxtrace.ingest.cursor import FileCursor
from tdxtrace.ingest.datafile import DataFile
from tdxtrace.ingest.datfile import DatFile, is_packed, kallsyms_of, read_dat
from tdxtrace.ingest.datoptions import Buffer
from tdxtrace.ingest.formats import EventFormat, PageLayout, common_of, page_layout
from tdxtrace.ingest.headers import Header
from tdxtrace.ingest.known import KnownEvents
from tdxtrace.ingest.lines import Vocabulary
from tdxtrace.ingest.merge import Merge
from tdxtrace.ingest.pagefiles import PackedPages, PlainPages
from tdxtrace.ingest.raw import RawEvents
from tdxtrace.ingest.ringreader import RingReader
from tdxtrace.ingest.symbols import symbol_finder
from tdxtrace.ingest.tally import Tally
from tdxtrace.ingest.windows import CpuPages

_CMDLINE: Final = re.compile(r"^\s*(?P<tid>\d{1,9}) (?P<comm>.{1,64})$", re.MULTILINE)
_STAT: Final = re.compile(r"^(?P<key>[a-z ]{3,20}): (?P<n>\d{1,18})\s*$", re.MULTILINE)
_CPU: Final = re.compile(r"^CPU: (?P<cpu>\d{1,4})\s*$", re.MULTILINE)

Pages = PlainPages | PackedPages


@dataclass(slots=True)
class DatReader:
    """Reads one trace.dat into raw events, and counts the rest."""

    file: DataFile
    vocabulary: Vocabulary
    tally: Tally
    dat: DatFile = field(init=False)
    _pages: list[Pages] = field(default_factory=list)
    _merge: Merge | None = None

    def __post_init__(self) -> None:
        self.dat = read_dat(self.file)

    def batches(self) -> Iterator[RawEvents]:
        """Yield the events that may become rows, in the order of their time.

        Raises:
            FormatError: If the file holds no trace data that can be read.
        """
        dat = self.dat
        sources = [source for buffer in dat.options.buffers for source in self._sources(buffer)]
        if not sources:
            raise FormatError(self._nothing())
        layout = self._layout(dat.page_size)
        self._merge = Merge(sources, layout)
        known = KnownEvents(
            dat.formats.events,
            common_of(dat.formats.events.values()),
            self.vocabulary,
            self.tally,
            printed_names(dat.formats.events),
            symbol_finder(partial(kallsyms_of, dat)),
        )
        comms = comms_of(dat.cmdlines)
        reader = RingReader(self._merge, known, Clock.of(dat.options), self.tally, comms, {})
        yield from reader.batches()
        self._losses()

    @property
    def position(self) -> int:
        """Bytes of the file that were read, for progress."""
        return sum(p.at if isinstance(p, PlainPages) else p.cursor.at for p in self._pages[-1:])

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
            f"trace-cmd {version[0]}" if version else "trace-cmd",
            clock or None,
            None,
            None,
            bool(options.cpu_stats),
        )

    def _layout(self, page_size: int) -> PageLayout:
        dat = self.dat
        made = page_layout(dat.formats.header_page, page_size, dat.long_size, dat.big_endian)
        if made is None:
            raise FormatError(
                f"{self.file.shown} is a damaged trace.dat: its header_page does not describe "
                f"a page of {page_size} bytes"
            )
        return made

    def _sources(self, buffer: Buffer) -> Iterator[CpuPages]:
        dat = self.dat
        if buffer.is_text:
            return
        if buffer.page_size not in (0, dat.page_size):
            self._page_size(buffer)
        layout = self._layout(dat.page_size)
        packed = is_packed(dat, buffer)
        for data in buffer.cpus:
            if not data.size:
                continue
            if packed and dat.unpack is not None:
                cursor = FileCursor(self.file, dat.big_endian, data.at)
                pages: Pages = PackedPages(cursor, layout, dat.unpack)
            else:
                pages = PlainPages(self.file, layout, data.at, data.size)
            self._pages.append(pages)
            shift = dat.options.shifts[data.cpu] if data.cpu < len(dat.options.shifts) else None
            correct = None if shift is None else partial(corrected, shift=shift)
            yield CpuPages(data.cpu, pages.read, correct)

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
        n_damaged = 0 if self._merge is None else self._merge.n_damaged
        self.tally.note("damaged", None if n_damaged else 0, f"{n_damaged} pages")
        for detail in sorted({p.cut_short for p in self._pages if p.cut_short}):
            self.tally.note("truncated", None, detail)
        if self.dat.cut_short:
            self.tally.note("truncated", None, self.dat.cut_short)
        name = ""
        for text in self.dat.options.cpu_stats:
            if "Buffer:" in text:
                name = text.partition("Buffer:")[2].strip()
            for cpu, stats in cpu_stats(text):
                note_stats(self.tally, cpu, stats, f"buffer {name}, " if name else "")


def printed_names(events: Mapping[int, EventFormat]) -> Callable[[EventFormat], str]:
    """Return what gives an event's name: with its group only where two have the same."""
    bare = Counter(event.name for event in events.values())

    def name(event: EventFormat) -> str:
        return event.name if bare[event.name] == 1 else f"{event.system}:{event.name}"

    return name


def comms_of(cmdlines: str) -> dict[int, str]:
    """Read tracefs' ``saved_cmdlines``: the last name of each thread that was saved."""
    return {int(found["tid"]): found["comm"] for found in _CMDLINE.finditer(cmdlines)}


def cpu_stats(text: str) -> Iterator[tuple[int, dict[str, int]]]:
    """Read ``per_cpu/cpuN/stats`` of one or more CPUs, each headed by ``CPU: N``."""
    parts = _CPU.split(text)
    for cpu, body in zip(parts[1::2], parts[2::2], strict=True):
        yield int(cpu), {found["key"]: int(found["n"]) for found in _STAT.finditer(body)}


def note_stats(tally: Tally, cpu: int, stats: Mapping[str, int], where: str) -> None:
    """Add what the kernel's counters say was lost and no page tells of.

    ``overrun`` counts what the buffer overwrote, ``dropped events`` what it refused
    (overwrite off), ``commit overrun`` what came while a page was being written,
    ``entries`` what was still in the kernel when the counters were read (Linux
    Documentation/trace/ftrace.rst, per_cpu/cpu0/stats).
    """
    gaps = [gap for gap in tally.gaps if gap.kind == "lost_events" and gap.cpu == cpu]
    unmarked = stats.get("overrun", 0) - sum(gap.n_events or 0 for gap in gaps)
    uncounted = [gap for gap in gaps if gap.n_events is None]
    if len(uncounted) == 1 and unmarked > 0:
        # A page without room for the count says only that something was lost.
        uncounted[0].n_events, unmarked = unmarked, 0
    tally.note("overwritten", max(0, unmarked), f"{where}CPU {cpu}", cpu=cpu)
    tally.note("buffer_full", stats.get("dropped events", 0), f"{where}CPU {cpu}", cpu=cpu)
    tally.note("lost_events", stats.get("commit overrun", 0), f"{where}commit overrun", cpu=cpu)
