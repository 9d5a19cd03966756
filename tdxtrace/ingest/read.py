"""Reading of inputs: open, detect, read, decode, account, into a Trace or a store."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Final, TypeVar

import polars as pl

from tdxtrace.compiler import choose
from tdxtrace.errors import FormatError, InputError
from tdxtrace.ingest.decode import implied_losses
from tdxtrace.ingest.decode.decoder import (
    Decoder,
    LevelBaseDetector,
    MemorySink,
    Sink,
    SourceSink,
    normalize_levels,
)
from tdxtrace.ingest.events.registry import EventRegistry, mapping_of
from tdxtrace.ingest.formats import Input, format_named_by_user, open_input
from tdxtrace.ingest.stats import Header, SourceStats, notes_on
from tdxtrace.tables.files import refuse_overwriting
from tdxtrace.tables.memory import free_bytes
from tdxtrace.tables.store import StoreWriter, is_store, open_store
from tdxtrace.tables.temporary import TemporaryFolder
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Provenance, Source, Trace

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Options for reading: facts that inputs do not contain, further inputs, and limits."""

    input_format: str | None = None
    """A name in tables.formats.INPUT_FORMATS; None: detected from the content."""
    mappings: Sequence[str] = ()
    """``EVENT=FUNCTION[:entry|:return]`` for probes whose names do not contain the function."""
    level_base: int | None = None
    """Level number of a 4K page; None: determined from the kernel's version and the values."""
    formats: str | Path | None = None
    """Folder with the formats of events, for raw pages."""
    dmesg: Sequence[str | Path] = ()
    """Logs of the kernel, read with the traces."""
    memory: int | None = None
    """Bytes of memory that may be taken; None: what is free."""
    unpacked: int | None = None
    """Bytes that each input may unpack to; None: some hundred times as many as it has."""
    progress: Progress | None = None
    """Called with the path, the bytes read so far and the size of the input; None: unknown."""


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
        input_format: Name of the format; detected from the content if None.
        mappings: ``EVENT=FUNCTION`` for probes whose names do not contain the function, with
            ``:entry`` or ``:return`` where the text does not show it.
        level_base: Number the traced kernel gives a 4K page (6.16 to 7.1: 0,
            from 7.2: 1); detected if None.
        formats: Folder with the kernel's ``events`` (formats, header_page), for raw pages.
        dmesg: Logs of the kernel, as dmesg or journalctl print them; each is one more
            source, which may hold nothing about TDX.
        progress: Called after each batch with path, bytes read and size (None: unknown).

    Returns:
        A Trace whose tables are sorted by source; every line of every input is a
        header, part of a row, or counted in ``losses``.  Tables that take more than a quarter of
        the memory that is free go to a temporary store on disk while they are read, which exists
        as long as the Trace.

    Raises:
        InputError: If an input is missing, empty or cannot be read, or the disk has no room.
        FormatError: If an input is no trace; the message says what it looks like.
        QueryError: If a format or mapping names something unknown.
    """
    options = ReadOptions(input_format, mappings, level_base, formats, dmesg, progress=progress)
    return read(paths, options)


def read(paths: Sequence[str | Path], options: ReadOptions) -> Trace:
    """Read inputs, or a store, into a Trace: :func:`read_trace` with its options as one.

    Raises:
        InputError: As :func:`read_trace`.
        FormatError: As :func:`read_trace`.
        QueryError: As :func:`read_trace`.
    """
    stores = [path for path in paths if is_store(Path(path))]
    if stores and len(paths) == 1 and not options.dmesg:
        return open_store(Path(stores[0]), max_bytes=options.unpacked)
    if stores:
        raise InputError(
            f"{one_line(str(stores[0]))} is a converted trace; read it without other inputs"
        )
    sink = SpillingSink((options.memory or free_bytes()) // _MEMORY_DIVISOR)
    try:
        base, provenance = _read_all(paths, options, sink)
        return sink.trace(base, provenance)
    except BaseException:
        sink.discard()
        raise


# Tables that take more than this part of the memory go to disk: what is asked of them takes three
# to eight times as much as they do (12 M events: python tests/bench/memory.py).
_MEMORY_DIVISOR: Final = 4


class SpillingSink:
    """Keeps rows in memory, and from a size on in a temporary store.

    Args:
        max_bytes: Size of the tables in memory from which on they go to the store.
    """

    def __init__(self, max_bytes: int) -> None:
        self._bytes_left = max_bytes
        self._memory = MemorySink()
        self._folder: TemporaryFolder | None = None
        self._store: StoreWriter | None = None

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Take rows of the table ``name``.

        Raises:
            InputError: If the disk has no room for them.
        """
        if self._store is not None:
            self._store.add(name, rows)
            return
        self._memory.add(name, rows)
        self._bytes_left -= int(rows.estimated_size())
        if self._bytes_left < 0:
            self._spill()

    def _spill(self) -> None:
        """Move the rows to a store on disk."""
        self._folder = TemporaryFolder()
        self._store = StoreWriter(self._folder.path / "trace")
        tables, self._memory.tables = self._memory.tables, {}
        for name, frames in tables.items():
            while frames:
                self._store.add(name, frames.pop(0))

    def discard(self) -> None:
        """Remove the temporary store from disk, if there is one."""
        if self._folder is not None:
            self._folder.remove()

    def trace(self, base: int, provenance: Provenance) -> Trace:
        """Return the rows as a Trace; ``base`` is the number of a 4K level in them."""
        if self._store is None:
            tables = self._memory.result()
            tables["seamcalls"] = normalize_levels(tables["seamcalls"], base)
            return Trace(**tables, provenance=provenance)
        self._store.finish(provenance, _changes(base))
        return open_store(self._store.folder, self._folder)


def _changes(base: int) -> dict[str, Callable[[pl.DataFrame], pl.DataFrame]]:
    return {"seamcalls": partial(normalize_levels, base=base)} if base else {}


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
        store.finish(provenance, _changes(base))
    finally:
        store.discard()


def _read_all(
    paths: Sequence[str | Path], options: ReadOptions, sink: Sink
) -> tuple[int, Provenance]:
    """Read every input into ``sink``; return the base of levels and the provenance."""
    from tdxtrace import __version__  # noqa: PLC0415 - the package imports this module

    if not paths:
        raise InputError("no input named; name a file, or - for standard input")
    detector = LevelBaseDetector()
    log_options = replace(options, input_format=None, formats=None)
    inputs = [(path, False) for path in paths] + [(path, True) for path in options.dmesg]
    sources = tuple(
        _read(
            str(path),
            number,
            log_options if is_log else options,
            SourceSink(sink, detector),
            is_log,
        )
        for number, (path, is_log) in enumerate(inputs)
    )
    base, evidence = detector.base(options.level_base, [source.kernel for source in sources])
    return base, Provenance(sources, base, evidence, __version__, notes_on(sources))


def _read(path: str, number: int, options: ReadOptions, sink: SourceSink, is_log: bool) -> Source:
    """Open one input and detect its format, read it, decode it, and account for the rest."""
    requested = format_named_by_user(options.input_format)
    mappings = {event: (name, role) for event, name, role in map(mapping_of, options.mappings)}
    stats, registry = SourceStats(), EventRegistry(mappings)
    with open_input(
        path,
        requested,
        is_log=is_log,
        event_formats=options.formats,
        number=number,
        unpacked=options.unpacked,
    ) as opened:
        reader = opened.reader(registry, stats)
        sink.losses.run = run = choose(reader.n_bytes)
        decoder = Decoder(number, registry.events, stats, sink, run)
        has_events = opened.format.holds == "events"
        add_rows = decoder.feed if has_events else partial(sink.add, "kernel_messages")
        batches = reader.batches(run)
        if not opened.is_piped_text:  # Ctrl-C interrupts only this thread's wait for a pipe
            batches = opened.stack.enter_context(closing(prefetch(batches)))
        for batch in batches:
            add_rows(batch)
            if options.progress is not None:
                options.progress(path, reader.position, opened.stream.size)
        line_no = stats.n_lines if opened.format.unit == "line" else None
        stream_losses = dict(opened.stream.losses())
        for kind, detail in stream_losses.items():
            stats.record_loss(kind, None, detail, line_no=line_no)
        header = reader.header()
        if has_events:
            decoder.finish()
            implied_losses.add_implied_losses(sink.losses, stats, header)
    if not is_log and (not sink.n_rows or _is_foreign(opened, stats, sink)):
        if changed := stream_losses.get("changed_while_read"):
            raise InputError(f"{one_line(path)} has no complete event: it had {changed}")
        from tdxtrace.ingest import refusals  # noqa: PLC0415 - few inputs need it

        raise FormatError(refusals.nothing_in(one_line(path), stats, opened.first_lines))
    sink.add("losses", stats.losses(number))
    sink.add("threads", stats.thread_table(number))
    return _source(opened, stats, header)


def _is_foreign(opened: Input, stats: SourceStats, sink: SourceSink) -> bool:
    """Whether a trace is of an AMD host, or a log of a guest: no message is one of a TDX host."""
    if stats.has_amd_exits and not sink.n_intel:
        return True
    if opened.format.holds == "events" or set(stats.events) != {"other"}:
        return False
    from tdxtrace.ingest import refusals  # noqa: PLC0415 - few inputs need it

    return refusals.not_intel(opened.first_lines) is not None


def _source(opened: Input, stats: SourceStats, header: Header) -> Source:
    """Return the provenance entry of an input."""
    first_ns, last_ns = stats.span()
    return Source(
        opened.stream.path,
        opened.format.name,
        opened.stream.compression,
        opened.stream.n_bytes,
        stats.n_lines,
        stats.n_headers,
        first_ns,
        last_ns,
        header.clock or header.kind_of_clock,
        header.resolution_ns,
        header.kernel,
        header.tool,
        dict(stats.events.most_common()),
    )


T = TypeVar("T")

# Batches queued: enough to even out slow ones, few enough to bound memory.
_DEPTH: Final = 4
# A batch, or the end: an error, or None.
_Item = tuple[bool, T | BaseException | None]


def prefetch(batches: Iterator[T]) -> Generator[T]:
    """Yield what ``batches`` yields, iterated by a second thread up to _DEPTH items ahead.

    An exception of ``batches`` is raised here, after the items before it. Closing this waits for
    the item in progress.
    """
    queue: Queue[_Item[T]] = Queue(_DEPTH)
    is_stopped = Event()
    thread = Thread(target=_fill_queue, args=(batches, queue, is_stopped), daemon=True)
    thread.start()
    try:
        while True:
            is_batch, item = queue.get()
            if isinstance(item, BaseException):
                raise item
            if not is_batch:
                return
            yield item  # type: ignore[misc]
    finally:
        is_stopped.set()
        while thread.is_alive():
            # The thread may be blocked in put.
            while not queue.empty():
                queue.get()
            thread.join(0.01)


def _fill_queue(batches: Iterator[T], queue: Queue[_Item[T]], is_stopped: Event) -> None:
    try:
        for batch in batches:
            if is_stopped.is_set():
                return
            queue.put((True, batch))
        queue.put((False, None))
    except BaseException as error:
        queue.put((False, error))
