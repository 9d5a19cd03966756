"""Reader of event text: a line-at-a-time parser, and a loop for lines with learned patterns.

The loop reads lines that match a pattern learned from the parser, and leaves all others to it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from tdxtrace.compiler import Runner, interpreted
from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import (
    ABSENT,
    EVENT_COLUMNS,
    MAX_CPUS,
    SLOTS,
    UNKNOWN,
    FieldLayouts,
    I64Array,
    RecordBatch,
    U64Array,
    concatenate,
)
from tdxtrace.ingest.events.fields import Fields
from tdxtrace.ingest.events.registry import Event, EventRegistry, names_a_probe, role_of
from tdxtrace.ingest.loops import lines as loops
from tdxtrace.ingest.loops.lines import Columns
from tdxtrace.ingest.source import BLOCK_PADDING, MAX_LINE_BYTES, Block, matched_part
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.text import line_formats
from tdxtrace.ingest.text.line_formats import LineFormat, LinePrefix
from tdxtrace.ingest.text.patterns import PatternCache
from tdxtrace.tables.text import one_line

# Bytes.  Columns are sized for lines with at least this average length; event lines are longer.
_SHORT_LINE: Final = 48
# Number of lines without a pattern after which patterns are learned from a sample of them.
_MAX_LEFT: Final = 256
_SAMPLE_SIZE: Final = 64
# Most threads that are remembered, as an input may never end.
_MAX_THREADS: Final = 1 << 16
_INT64_MAX: Final = (1 << 63) - 1
# Steps between timestamps that show whether these are times; if they are deltas, about every
# second step goes back.
_MIN_STEPS: Final = 256
_MIN_SHARE: Final = 10
# Steps back by which a text is known to be reversed, as journalctl -r and log viewers print it.
_MIN_BACK: Final = 8
# No host traces a TD in the first millisecond after power-on.
_NO_UPTIME_NS: Final = 1_000_000
# A name and one number before the CPU or the time.
_NAME_AND_NUMBER: Final = re.compile(
    # A shorter number before the time may be a CPU: perf script -L.
    r"^\s*+(?P<comm>\S.{0,16}?) +(?=\d{1,9} +\[\d|\d{4,9} +\d++\.\d)(?P<tid>\d{1,9}) ",
    re.ASCII,
)
# The time and the name of an event, within the arguments of another: lines without line ends.
_ANOTHER: Final = re.compile(r"\d(?:\.\d{6,9}|us.?) ?: +[A-Za-z_][\w:./-]{0,99}:(?: |$)", re.ASCII)
# A name that occurs at least this many times is not taken for a damaged one.
_MIN_OCCURRENCES: Final = 3
_KVM_TABLES: Final = ("vm_entry", "page_fault", "host_event")
NOT_ROWS: Final = ("noise", "unmapped")
"""Kinds of events that are in no table."""


class Line(NamedTuple):
    """One parsed event line: line number, prefix, timestamp in ns, event ID and fields."""

    number: int
    prefix: LinePrefix
    ts_ns: int
    event: int
    fields: Fields


@dataclass(slots=True)
class LineReader:
    """Reads lines of one source one at a time, and counts those that yield no event.

    It is the reference: the loop yields the same result for a line, or leaves the line to it.
    """

    format: str
    registry: EventRegistry
    stats: SourceStats
    layouts: FieldLayouts = field(default_factory=FieldLayouts)
    resolution_ns: int = 0
    """Finest resolution among the timestamps so far; 0 before the first; 1 for integer clocks."""
    has_integer_clock: bool = False
    formats: Sequence[LineFormat] = field(init=False)
    loop_timestamps: I64Array = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    """One row for each line of the block that the loop read: line number, CPU and timestamp."""
    _timestamps: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Look up the formats that lines may have."""
        self.formats = line_formats.formats_of(self.format)

    def line(self, number: int, text: bytes) -> Line | None:
        """Read one line; None if it yields no event, in which case it is counted in the stats."""
        is_whole = len(text) <= MAX_LINE_BYTES
        if not is_whole:
            text = matched_part(text)
        # latin-1 maps each byte to one column; names are decoded as UTF-8 when they are stored.
        line = text.decode("latin-1").rstrip("\r")
        if line.startswith(">"):
            line = line_formats.QUOTE.sub("", line)
        if line_formats.HEADER.match(line):
            self.stats.n_headers += 1
            return None
        prefix = self.prefix(line)
        if prefix is None:
            self._no_event(number, line)
            return None
        ts_ns = prefix.ts_ns
        self.record_digits(min(len(prefix.ts[1]), 9))
        lost = line_formats.perf_lost_of(prefix)
        if ts_ns > _INT64_MAX:
            self._no_event(number, line)
        elif lost is not None:
            self.flush_timestamps(number)
            self.stats.record_lost_events(lost.cpu, lost.n_events, number)
        elif not prefix.event and line_formats.SIDEBAND.match(prefix.args):
            self.stats.count("noise", prefix.args.partition(" ")[0].rstrip(":"), number)
        else:
            self._timestamps.append((number, prefix.cpu, ts_ns))
            return self._event(number, prefix, ts_ns, is_whole)
        return None

    def prefix(self, line: str) -> LinePrefix | None:
        """Read the prefix of a line in the first format that it matches; None without a match."""
        return line_formats.read_prefix(line, self.formats)

    def may_be_probe(self, name: str) -> bool:
        """Return whether an event of this name may be a probe, even if its line is damaged."""
        return names_a_probe(name, self.registry.mappings)

    def decode_fields(self, event: Event, args: str) -> Fields | None:
        """Read the fields of an event line; None if fields that its table needs are missing."""
        if args.endswith(("=", "=0x")) and args.startswith("("):
            return None  # cut; only raw text (trace-cmd report -R) prints a zero as nothing
        if ": " in args and _ANOTHER.search(args) is not None:
            return None
        fields = event.decode(args)
        if event.kind in _KVM_TABLES and not fields.values:
            return None
        return fields if all(slot in fields.values for slot in event.needs) else None

    def flush_timestamps(self, end_line: int | None = None) -> None:
        """Pass the timestamps of the lines before line ``end_line`` to the stats, in line order.

        These are the lines that were read here, and those that the loop read (``loop_timestamps``).
        """
        timestamps = np.array(self._timestamps, np.int64).reshape(-1, 3)
        self._timestamps = []
        looped = self.loop_timestamps
        end = len(looped) if end_line is None else int(np.searchsorted(looped[:, 0], end_line))
        from_loop, self.loop_timestamps = looped[:end], looped[end:]
        if len(from_loop):
            timestamps = np.concatenate([timestamps, from_loop])
            timestamps = timestamps[np.argsort(timestamps[:, 0], kind="stable")]
        self.stats.observe_timestamps(
            timestamps[:, 1].astype(np.int32), np.ascontiguousarray(timestamps[:, 2])
        )

    def record_digits(self, digits: int) -> None:
        """Record the resolution of a timestamp with this number of digits after the point."""
        if digits == 0:
            self.has_integer_clock = True
        step = 10 ** (9 - digits) if digits else 1
        self.resolution_ns = min(self.resolution_ns or step, step)

    def _no_event(self, number: int, line: str) -> None:
        lost = line_formats.lost_of(line)
        sample = one_line(line.encode("latin-1").decode("utf-8", "replace"), 80)
        if lost is not None:
            self.flush_timestamps(number)
            self.stats.record_lost_events(lost.cpu, lost.n_events, number)
        elif line_formats.CALLCHAIN.match(line):
            self.stats.count("callchain", "", number)
        elif line_formats.NO_PAYLOAD.match(line):
            self.stats.count("no_payload", "", number)
        elif line_formats.NO_CONTEXT.match(line):
            self.stats.count_sample("no_time", sample, number)
        else:
            self.stats.count_sample("unparsed", sample, number)

    def _event(self, number: int, prefix: LinePrefix, ts_ns: int, is_whole: bool) -> Line | None:
        if not prefix.event:
            # A pager or an editor marks a line that it cut with ">".
            is_cut = prefix.args.endswith(">")
            if is_cut or line_formats.NAMELESS.match(prefix.args):
                self.stats.count("wrapped" if is_cut else "no_event", "", number)
                return None
        index = self.registry.event_id(prefix.event or "(no event name)", prefix.args)
        event = self.registry.events[index]
        if event.kind in NOT_ROWS:
            damaged = event.kind == "noise" and self.may_be_probe(event.name)
            self.stats.count("undecoded" if damaged else event.kind, event.name, number)
            return None
        if not is_whole:
            self.stats.count("overlong", event.name, number)
            return None
        fields = self.decode_fields(event, prefix.args)
        if prefix.args.endswith(">"):
            # A number may be cut.
            self.stats.count("wrapped", event.name, number)
            return None
        if fields is None:
            self.stats.count("undecoded", event.name, number)
            return None
        if fields.unknown:
            self.stats.record_unknown(fields.unknown, number)
        self.stats.events[event.name] += 1
        comm = prefix.comm.encode("latin-1").decode("utf-8", "replace")
        self.stats.record_thread(prefix.tid, comm, prefix.tgid)
        return Line(number, prefix, ts_ns, index, fields)


@dataclass(frozen=True, slots=True)
class _Read:
    """Result of the loop for some lines of a block; line numbers count from 0."""

    batch: RecordBatch
    """Events, including those without rows, whose layout is ABSENT."""
    columns: Columns
    end: int
    """Offset of the next line in the block, in bytes."""
    n_lines: int
    n_own: int
    """Lines with rows."""
    left: I64Array
    """One row for each line that the loop left: line number, and its first and end offset."""
    threads: U64Array


def has_processes(lines: Iterable[str]) -> bool:
    """Return whether the IDs are those of processes: ``perf script -F pid`` without ``tid``.

    They look like thread IDs, but several names alternate for one ID. Nearest innocent cases: a
    renamed thread, which does not return to its old name; a name that is damaged on some lines.

    Args:
        lines: First lines of a text of perf script.
    """
    names: dict[str, list[str]] = {}
    for line in lines:
        found = _NAME_AND_NUMBER.match(line)
        if found is not None and found["tid"] != "0":
            names.setdefault(found["tid"], []).append(found["comm"])
    return any(_alternate(of_thread) for of_thread in names.values())


def _alternate(names: list[str]) -> bool:
    """Return whether two or more frequent names alternate."""
    frequent = {name for name, n in Counter(names).items() if n >= _MIN_OCCURRENCES}
    changes = [name for name, _ in groupby(name for name in names if name in frequent)]
    return len(changes) >= len(frequent) + _MIN_OCCURRENCES - 1 and len(frequent) > 1


class MendedLine(NamedTuple):
    """A line restored to what the tool printed, or one that is lost."""

    number: int
    text: bytes
    loss: str
    """Kind of loss; "" for a line that is to be read."""
    n_lines: int
    """Number of input lines that it was joined from."""


class LineMender(Protocol):
    """Joins wrapped lines: ``wrapping.Mender``."""

    def feed(self, texts: Iterable[tuple[int, bytes]]) -> Iterator[MendedLine]:
        """Yield each line once its end is certain."""

    def finish(self) -> Iterator[MendedLine]:
        """Yield the line that is still held back."""


@dataclass(slots=True)
class StepCounter:
    """Recognises timestamps that are differences, of perf script --deltatime, or reversed.

    The differences are between successive events of all CPUs (Linux tools/perf/builtin-script.c,
    perf_sample__fprintf_start, previous_time), so they start near 0 and go up and down, whereas
    perf script prints events in time order. Nearest innocent case: lines that were sorted by
    another column; their times are not near 0 unless they count from the first event.
    """

    n: int = 0
    n_back: int = 0
    n_forth: int = 0
    min_ns: int = _INT64_MAX
    _last_ns: int = -1

    def observe(self, ts_ns: I64Array) -> None:
        """Add the timestamps of further events, in line order."""
        if self.n >= _MIN_STEPS or not len(ts_ns):
            return
        steps = np.diff(ts_ns, prepend=self._last_ns if self._last_ns >= 0 else ts_ns[:1])
        self.n += len(steps)
        self.n_back += int((steps < 0).sum())
        self.n_forth += int((steps > 0).sum())
        self.min_ns = min(self.min_ns, int(ts_ns.min()))
        self._last_ns = int(ts_ns[-1])

    def are_reversed(self, min_steps: int) -> bool:
        """Return whether the newest event is first; False for fewer than ``min_steps``."""
        steps = self.n_back + self.n_forth
        return self.n >= min_steps and steps >= _MIN_BACK and self.n_forth * _MIN_SHARE <= steps

    def are_deltas(self, min_steps: int) -> bool:
        """Return whether the timestamps are differences; False for fewer than ``min_steps``."""
        is_often_back = self.n_back * _MIN_SHARE >= self.n and self.n_back > 0
        return self.n >= min_steps and is_often_back and self.min_ns < _NO_UPTIME_NS


@dataclass(slots=True)
class TextReader:
    """Reads blocks of lines into batches of events, in order, and counts all other lines."""

    lines: LineReader
    shown: str = "the input"
    """Name of the input in messages."""
    mender: LineMender | None = None
    """Joins wrapped lines; with it, lines are read one at a time."""
    patterns: PatternCache = field(init=False)
    _steps: StepCounter = field(default_factory=StepCounter)
    _threads: set[tuple[int, ...]] = field(default_factory=set)
    """Threads that were recorded in the stats."""

    def __post_init__(self) -> None:
        """Start with an empty pattern cache."""
        self.patterns = PatternCache(self.lines.prefix, self.lines.layouts)

    def batches(self, blocks: Iterable[Block], run: Runner[Any]) -> Iterator[RecordBatch]:
        """Yield one batch with the events of each block of whole lines.

        If ``run`` is ``interpreted``, lines are read one at a time: interpreting the loop would
        take longer.

        Raises:
            FormatError: If the timestamps are differences (``perf script --deltatime``) or
                reversed.
        """
        for block in filter(len, blocks):
            is_looped = run is not interpreted and self.mender is None
            batch = self._in_loop(block, run) if is_looped else self._line_by_line(block)
            self._steps.observe(batch.ts_ns)
            self._refuse_steps(_MIN_STEPS)
            yield batch
        if self.mender is not None:
            yield self._mended(self.mender.finish())
        self._refuse_steps(1)

    def _refuse_steps(self, min_steps: int) -> None:
        """Refuse timestamps that are differences or reversed, once ``min_steps`` were read.

        Raises:
            FormatError: If they are.
        """
        if self._steps.are_reversed(min_steps):
            raise FormatError(f"{self.shown} has its newest line first; turn it round: tac FILE")
        if self.lines.format == "perf-script" and self._steps.are_deltas(min_steps):
            raise FormatError(
                f"{self.shown} has the time from each event to the next, which perf script "
                "--deltatime prints and rounds: print it without --deltatime (--ns is exact)"
            )

    def forget_threads(self) -> None:
        """Clear the set of recorded threads if it is large: threads are then recorded again."""
        if len(self._threads) > _MAX_THREADS:
            self._threads.clear()

    def _line_by_line(self, block: Block) -> RecordBatch:
        first = self.lines.stats.n_lines + 1
        texts = block.tobytes().split(b"\n")[:-1]
        self.lines.stats.n_lines += len(texts)
        if self.mender is not None:
            return self._mended(self.mender.feed(enumerate(texts, first)))
        read = (self.lines.line(number, text) for number, text in enumerate(texts, first))
        found = [line for line in read if line is not None]
        self.lines.flush_timestamps()
        return to_batch(found, self.lines.layouts)

    def _mended(self, lines: Iterable[MendedLine]) -> RecordBatch:
        """Read restored lines, and count those that were joined or lost."""
        found = []
        for number, text, loss, n_lines in lines:
            if loss:
                shown = one_line(text.decode("utf-8", "replace"), 80)
                for _ in range(n_lines):
                    self.lines.stats.count_sample(loss, shown, number)
                continue
            if n_lines > 1:
                self.lines.stats.count("joined", "", number + 1, n_lines - 1)
            line = self.lines.line(number, text)
            if line is not None:
                found.append(line)
        self.lines.flush_timestamps()
        return to_batch(found, self.lines.layouts)

    def _in_loop(self, block: Block, run: Runner[Any]) -> RecordBatch:
        """Run the loop, parse and learn from the lines it leaves, and continue where it ended."""
        assert block[-1] == ord("\n")  # else the loop would search for it beyond the block
        parts: list[RecordBatch] = []
        at, max_left = 0, _MAX_LEFT
        while at < len(block):
            read = self._read(block, at, run, max_left)
            if len(read.left) == max_left:
                # Learning from so many lines did not help, and each pass allocates columns for a
                # block: leave more lines in the next pass.
                max_left = min(2 * max_left, _MAX_LEFT << 8)
            part, at = self._account(block, read), read.end
            if len(part) or not parts:
                parts.append(part)
        return concatenate(parts)

    def _read(self, block: Block, at: int, run: Runner[Any], max_left: int) -> _Read:
        """Run the loop on the lines of a block from byte ``at`` on; it may stop before the end."""
        text = np.ndarray(len(block) + BLOCK_PADDING, np.uint8, block.base)
        words: U64Array = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))
        patterns = self.patterns.packed()
        n_lines = (len(block) - at) // _SHORT_LINE + 1
        n_patterns = len(self.lines.registry.events), len(patterns.prefixes)
        columns = _columns(n_lines, *n_patterns, max_left)
        numbers = np.uint64(at), np.uint64(len(block)), np.uint64(MAX_LINE_BYTES)
        read = run(loops.read_lines)(words, *numbers, patterns, columns)
        end, n_lines, n_read, n_own, n_words, n_left, n_threads = map(int, read)
        event_columns = {name: getattr(columns, name)[:n_read] for name in EVENT_COLUMNS}
        fields = columns.words[:n_words]
        batch = RecordBatch(**event_columns, words=fields, layouts=self.lines.layouts)
        left, threads = columns.left[:n_left], columns.threads[:n_threads]
        return _Read(batch, columns, end, n_lines, n_own, left, threads)

    def _account(self, block: Block, read: _Read) -> RecordBatch:
        """Read the lines that the loop left, count all, and return the events in line order."""
        stats, batch = self.lines.stats, read.batch
        first = stats.n_lines + 1
        stats.n_lines += read.n_lines
        batch.line += first
        parsed = self._read_left(block, read, first)
        self._count(read, first)
        from_loop = batch if read.n_own == len(batch) else batch.take(batch.layout != ABSENT)
        if not len(parsed):
            return from_loop
        merged = concatenate([from_loop, parsed])
        return merged.take(np.argsort(merged.line, kind="stable"))

    def _read_left(self, block: Block, read: _Read, first: int) -> RecordBatch:
        """Read the lines that the loop left; pass the timestamps of all lines to the stats."""
        stats, batch = self.lines.stats, read.batch
        if not len(read.left) and not stats.has_open_gaps:
            cpus = read.columns.cpus
            for place in np.flatnonzero(cpus[:, 0]).tolist():
                stats.extend_cpu_span(place - 1, int(cpus[place, 1]), int(cpus[place, 2]))
            return RecordBatch.empty(self.lines.layouts)
        self.lines.loop_timestamps = np.stack([batch.line, batch.cpu, batch.ts_ns], axis=1)
        texts = [block[start:end].tobytes() for _, start, end in read.left.tolist()]
        numbers = (read.left[:, 0] + first).tolist()
        lines = (self.lines.line(n, text) for n, text in zip(numbers, texts, strict=True))
        found = [line for line in lines if line is not None]
        self.lines.flush_timestamps()
        sample = np.unique(np.linspace(0, len(texts) - 1, _SAMPLE_SIZE).astype(np.intp))
        for row in sample[: len(texts)].tolist():
            self._add_patterns(texts[row])
        return to_batch(found, self.lines.layouts)

    def _add_patterns(self, text: bytes) -> None:
        """Learn patterns for the prefix, the event name and the arguments of a line."""
        line = text.decode("latin-1").rstrip("\r")
        found = line_formats.match_prefix(line, self.lines.formats)
        if found is None or len(text) > MAX_LINE_BYTES:
            return
        prefix = line_formats.prefix_of(*found)
        if not prefix.event or prefix.ts_ns > _INT64_MAX:
            return
        registry = self.lines.registry
        index = registry.event_id(prefix.event, prefix.args)
        event = registry.events[index]
        if event.name != prefix.event or not self.patterns.add_prefix(
            line, found[1], prefix, in_irq(prefix.flags)
        ):
            return
        if event.kind not in NOT_ROWS:
            fields = self.lines.decode_fields(event, prefix.args)
            if fields is not None and not fields.unknown:
                self.patterns.add_arguments(event.name, index, prefix.args, fields, event.decode)
        elif not self.lines.may_be_probe(event.name) and not (
            # The line may be a probe's, cut.
            event.kind == "noise" and prefix.args[:1] in ("", "(") and role_of(prefix.args) is None
        ):
            self.patterns.add_name(event.name, index, prefix.args)

    def _count(self, read: _Read, first: int) -> None:
        """Count the loop's lines by event; record their threads and timestamp resolution."""
        stats, events = self.lines.stats, self.lines.registry.events
        counts = read.columns.events
        for index in np.flatnonzero(counts[:, 0]).tolist():
            event, n_lines = events[index], int(counts[index, 0])
            if event.kind in NOT_ROWS:
                stats.count(event.kind, event.name, first + int(counts[index, 1]), n_lines)
            else:
                stats.events[event.name] += n_lines
        for columns, number in self.patterns.prefixes.items():
            if number < len(read.columns.used) and read.columns.used[number]:
                self.lines.record_digits(columns.digits)
        for *words, tid, tgid, has_rows in read.threads.tolist():
            key = *words, tid, tgid
            # The key includes the process: a thread seen without it is recorded again with it.
            if has_rows and key not in self._threads:
                self._threads.add(key)
                name = b"".join(word.to_bytes(8, "little") for word in words)
                comm = name.rstrip(b"\0").strip(b" \t").decode("utf-8", "replace")
                stats.record_thread(tid - 1, comm, tgid - 1)


def _columns(n_lines: int, n_events: int, n_prefixes: int, max_left: int) -> Columns:
    """Allocate the output columns of the loop for this number of lines."""
    return Columns(
        **{name: np.empty(n_lines, kind) for name, kind in EVENT_COLUMNS.items()},
        words=np.empty(4 * n_lines + loops.MAX_FIELDS, np.uint64),
        left=np.empty((max_left, 3), np.int64),
        threads=np.empty((loops.MAX_THREADS, loops.THREAD_COLUMNS), np.uint64),
        thread_table=np.zeros(2 * loops.MAX_THREADS, np.int32),
        events=np.zeros((n_events, 2), np.int64),
        cpus=np.zeros((MAX_CPUS + 2, 3), np.int64),
        used=np.zeros(n_prefixes, np.int8),
        numbers=np.empty(loops.N_NUMBERS, np.uint64),
    )


def in_irq(flags: str) -> int:
    """Return 1 in hard interrupt or NMI context, 0 elsewhere, UNKNOWN without flags.

    The third flag is the context: h, H, z and Z are hardirq, hardirq inside
    softirq and NMI (Linux kernel/trace/trace_output.c, trace_print_lat_fmt).
    uprobe events carry 0xff for all flags or for the preemption count, so ``..ff`` carries no
    information; nor does -0x23, which trace-cmd report -l -R prints without that count.
    """
    if len(flags) < 4 or flags.endswith("ff") or flags.startswith("-0x"):
        return UNKNOWN
    return int(flags[2] in "hHzZ")


def batches_by_line(
    blocks: Iterable[Block],
    read: Callable[[int, bytes], Line | None],
    stats: SourceStats,
    layouts: FieldLayouts,
) -> Iterator[RecordBatch]:
    """Yield one batch with the events of each block of whole lines, read one line at a time.

    Args:
        blocks: The text.
        read: Reads a line, given its number; returns None, after counting it, if it yields no
            event.
        stats: Counter of lines.
        layouts: Field layouts of the source's events.
    """
    for block in blocks:
        first = stats.n_lines + 1
        lines = block.tobytes().split(b"\n")[:-1]
        stats.n_lines += len(lines)
        calls = (read(number, text) for number, text in enumerate(lines, first))
        yield to_batch([call for call in calls if call is not None], layouts)


def to_batch(lines: Sequence[Line], layouts: FieldLayouts) -> RecordBatch:
    """Return lines as a batch of columns, one row for each line."""
    fields = [_words(line.fields.values) for line in lines]
    n_words = np.array([len(words) for words in fields], np.int64)
    return RecordBatch(
        np.array([line.number for line in lines], np.int64),
        np.array([line.ts_ns for line in lines], np.int64),
        np.array([line.prefix.tid for line in lines], np.int32),
        np.array([line.prefix.tgid for line in lines], np.int32),
        np.array([line.prefix.cpu for line in lines], np.int32),
        np.array([in_irq(line.prefix.flags) for line in lines], np.int8),
        np.array([line.event for line in lines], np.int32),
        np.array([layouts.intern(tuple(words)) for words in fields], np.int32),
        np.cumsum(n_words) - n_words,
        np.array([word for words in fields for word in words.values()], np.uint64),
        layouts,
    )


def _words(values: Mapping[str, int]) -> dict[str, int]:
    """Return the fields that are columns of tables."""
    return {slot: word for slot, word in values.items() if slot in SLOTS}
