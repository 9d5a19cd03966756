"""Reader of a kernel log: rows of ``kernel_messages``, and counts of all other lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from tdxtrace.ingest.batch import UNKNOWN
from tdxtrace.ingest.kernel_log import messages, prefixes
from tdxtrace.ingest.kernel_log.entries import Entry, EntryReader, FieldEntries, JsonEntries
from tdxtrace.ingest.kernel_log.prefixes import LogLine
from tdxtrace.ingest.kernel_log.wrapping import LogMender, WholeLine
from tdxtrace.ingest.source import KEPT_LINE_BYTES, MAX_LINE_BYTES, Block, matched_part
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.events import KERNEL_MESSAGES
from tdxtrace.tables.text import one_line

# Number of first lines from which the clock of a log is determined.
_SAMPLE_LINES: Final = 2000
# printk's timestamps are out of order by microseconds at most, except at the start of a new boot.
_BOOT_BACK_NS: Final = 1_000_000_000
_MAX_TEXT: Final = 400
# Most lines of registers after a failed SEAMCALL: the longest form has three.
_MAX_REGISTER_LINES: Final = 3
# Largest number in the column n_lines.
_MAX_COUNTED: Final = 255
SEVERAL_BOOTS: Final = "printk of several boots"


def _is_int64(ts_ns: int | None) -> bool:
    """Return whether a time in ns fits an Int64 column: 1970 plus or minus 292 years."""
    return ts_ns is not None and -(1 << 63) <= ts_ns < 1 << 63


@dataclass(slots=True)
class MessageReader:
    """Reads one kernel log into rows of ``kernel_messages``."""

    format: str
    """``kernel-log``, ``journal-json`` or ``journal-export``."""
    source: int
    """Number of the input."""
    stats: SourceStats
    clock: str = ""
    """Clock whose timestamps are read: the most common one among the first lines."""
    _boot: str = ""
    _n_boots: int = 1
    _last_ns: int = 0
    _open: dict[str, Any] | None = None
    """Row of the failure or warning whose registers may be on the next line."""
    _n_registers: int = 0
    """Number of register lines added to that row so far."""
    _mender: LogMender = field(default_factory=LogMender)
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def batches(self, blocks: Iterable[Block]) -> Iterator[pl.DataFrame]:
        """Yield one table of ``kernel_messages`` rows for each block of whole lines."""
        entries = self._new_entries()
        for block in blocks:
            lines = block.tobytes().split(b"\n")[:-1]
            if not self.clock:
                self.clock = prefixes.most_common_clock(self._sample(lines[:_SAMPLE_LINES]))
            for line in lines:
                self.stats.n_lines += 1
                if entries is None:
                    self._line(self._text(line), len(line))
                else:
                    self._entries(entries.feed(self.stats.n_lines, line[:KEPT_LINE_BYTES]))
            yield self._take(all_of_them=False)
        self._mended(self._mender.finish())
        if entries is not None:
            self._entries(entries.finish())
        yield self._take(all_of_them=True)

    def _new_entries(self) -> EntryReader | None:
        """Return a new assembler of entries; None for a plain log, where each line is an entry."""
        if self.format == "journal-json":
            return JsonEntries()
        return FieldEntries() if self.format == "journal-export" else None

    def _sample(self, lines: list[bytes]) -> Iterator[LogLine]:
        """Yield the first lines of a log, split into prefix and message."""
        entries = self._new_entries()
        if entries is None:
            yield from (prefixes.split_prefix(self._text(line)) for line in lines)
            return
        for number, line in enumerate(lines, 1):
            for entry in entries.feed(number, line[:KEPT_LINE_BYTES]):
                if entry.line is not None:
                    yield entry.line

    @property
    def clock_name(self) -> str:
        """Name of the clock for the provenance of the input."""
        return SEVERAL_BOOTS if self._n_boots > 1 and self.clock == prefixes.PRINTK else self.clock

    def _text(self, line: bytes) -> str:
        return matched_part(line).decode("utf-8", "replace").rstrip("\r")

    def _line(self, line: str, n_bytes: int) -> None:
        if prefixes.HEADER.match(line):
            self._mended(self._mender.finish())
            self._n_boots += bool(prefixes.BOOT.match(line)) and self._last_ns > 0
            self.stats.n_headers += 1
            return
        found = prefixes.split_prefix(line)
        self._mended(self._mender.feed(self.stats.n_lines, found, line, n_bytes))

    def _mended(self, lines: Iterable[WholeLine]) -> None:
        for number, n_lines, found, n_bytes, _raw, is_cut in lines:
            if is_cut:
                self.stats.count_sample("wrapped", one_line(found.text, 80), number, n_lines)
                continue
            if n_lines > 1:
                self.stats.count("joined", "", number + 1, n_lines - 1)
            self._message(found, number, 1, is_overlong=n_bytes > MAX_LINE_BYTES)

    def _entries(self, entries: Iterable[Entry]) -> None:
        for number, n_lines, found, text, is_frame in entries:
            if found is not None:
                is_overlong = len(found.text) > MAX_LINE_BYTES
                # Column n_lines holds at most _MOST_COUNTED.
                counted = min(n_lines, _MAX_COUNTED)
                self.stats.n_headers += n_lines - counted
                self._message(found, number, counted, is_overlong=is_overlong)
            elif is_frame or prefixes.HEADER.match(text):
                self.stats.n_headers += n_lines
            else:
                self.stats.count_sample("unparsed", one_line(text, 80), number, n_lines)

    def _message(self, found: LogLine, number: int, n_lines: int, *, is_overlong: bool) -> None:
        """Add a row for a message about TDX, or count the message in the stats."""
        ts_ns = found.ts_ns if found.clock == self.clock and _is_int64(found.ts_ns) else None
        self._count_boots(found.boot, ts_ns)
        if not found.of_kernel:
            self.stats.count("noise", "of another program", number, n_lines)
        elif is_overlong:
            self.stats.count_sample("overlong", one_line(found.text, 80), number, n_lines)
        elif not self._continues(found.text, n_lines):
            row = self._starts(found.text, ts_ns, number)
            if row is None:
                self.stats.count("noise", "about something else", number, n_lines)
            else:
                row["n_lines"] = n_lines
        if ts_ns is not None:
            self.stats.extend_cpu_span(UNKNOWN, ts_ns, ts_ns)

    def _count_boots(self, boot: str, ts_ns: int | None) -> None:
        """Count a new boot: by its boot ID if the line has one, else where timestamps restart."""
        if boot and boot != self._boot:
            self._n_boots += bool(self._boot)
            self._boot = boot
        elif ts_ns is not None and ts_ns < self._last_ns - _BOOT_BACK_NS:
            self._n_boots += 1
        if ts_ns is not None:
            self._last_ns = ts_ns

    def _continues(self, text: str, n_lines: int) -> bool:
        """Add the registers of a line to the message before it; return whether it has any."""
        row = self._open
        if row is None:
            return False
        if row["message"] == "warning":
            found = messages.RAX.match(text)
            if found is None:
                return False
            row["rax"] = int(found["word"], 16)
            row |= messages.status_of_warning(row.get("function"), row["rax"])
        elif not messages.REGISTERS.match(text) or self._n_registers >= _MAX_REGISTER_LINES:
            self._open = None
            return False
        else:
            for name, pattern in (("rcx", messages.RCX), ("rdx", messages.RDX)):
                found = pattern.search(text)
                if found is not None and row.get(name) is None:
                    row[name] = int(found["word"], 16)
        if row["message"] == "warning":
            self._open = None
        self._n_registers += 1
        counted = min(n_lines, _MAX_COUNTED - row["n_lines"])
        row["n_lines"] += counted
        self.stats.n_headers += n_lines - counted
        return True

    def _starts(self, text: str, ts_ns: int | None, number: int) -> dict[str, Any] | None:
        """Add a row for a message about TDX and return it; None for other messages."""
        if messages.END_TRACE.match(text):
            self._open = None
        parsed = messages.parse_message(text)
        if parsed is None and messages.is_about_tdx(text):
            parsed = "other", {}
        if parsed is None:
            return None
        message, fields = parsed
        row = {"source": self.source, "seq": number, "ts_ns": ts_ns, "message": message}
        row |= fields | {"text": text[:_MAX_TEXT], "n_lines": 1}
        self._rows.append(row)
        self.stats.events[message] += 1
        if message in ("seamcall_failed", "warning"):
            self._open, self._n_registers = row, 0
        elif message == "suppressed":
            self._count_suppressed(row)
        return row

    def _count_suppressed(self, row: dict[str, Any]) -> None:
        place = {"line_no": row["seq"], "end_ns": row["ts_ns"]}
        self.stats.record_loss("suppressed", row["n_events"], row["function"], **place)

    def _take(self, all_of_them: bool) -> pl.DataFrame:
        """Return and remove the finished rows; with ``all_of_them`` also a row that is open."""
        taken = [row for row in self._rows if all_of_them or row is not self._open]
        self._rows = [] if all_of_them else [row for row in self._rows if row is self._open]
        return pl.DataFrame(taken, schema=KERNEL_MESSAGES.schema)
