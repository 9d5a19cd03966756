"""Reader of a kernel log: rows of ``kernel_messages``, and counts of all other lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from tdxtrace.ingest.batch import UNKNOWN
from tdxtrace.ingest.kernel_log import messages, prefixes
from tdxtrace.ingest.kernel_log.prefixes import LogLine
from tdxtrace.ingest.source import KEPT_LINE_BYTES, MAX_LINE_BYTES, Block, matched_part
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.events import KERNEL_MESSAGES
from tdxtrace.tables.text import one_line

# Lines whose prefixes tell the clock of a log.
_SAMPLE_LINES: Final = 2000
# printk's timestamps are out of order by microseconds at most, except where another boot begins.
_BOOT_BACK_NS: Final = 1_000_000_000
_MAX_TEXT: Final = 400
# Lines of registers after a failed SEAMCALL: three in the longest form.
_MAX_REGISTER_LINES: Final = 3
SEVERAL_BOOTS: Final = "printk of several boots"


@dataclass(slots=True)
class MessageReader:
    """Reads one kernel log into rows of ``kernel_messages``."""

    format: str
    """``kernel-log`` or ``journal-json``."""
    source: int
    """Number of the input."""
    stats: SourceStats
    clock: str = ""
    """Clock of the timestamps that are read: the most common one."""
    _boot: str = ""
    _n_boots: int = 1
    _last_ns: int = 0
    _open: dict[str, Any] | None = None
    """Row of the failure or warning whose registers may be on the next line."""
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def batches(self, blocks: Iterable[Block]) -> Iterator[pl.DataFrame]:
        """Yield the rows of each block of whole lines."""
        for block in blocks:
            lines = block.tobytes().split(b"\n")[:-1]
            if not self.clock:
                sample = (self._split(self._text(line)) for line in lines[:_SAMPLE_LINES])
                self.clock = prefixes.most_common_clock(line for line in sample if line)
            for line in lines:
                self.stats.n_lines += 1
                self._line(self._text(line), len(line))
            yield self._take(all_of_them=False)
        yield self._take(all_of_them=True)

    @property
    def clock_name(self) -> str:
        """The clock as provenance names it."""
        return SEVERAL_BOOTS if self._n_boots > 1 and self.clock == prefixes.PRINTK else self.clock

    def _text(self, line: bytes) -> str:
        kept = line[:KEPT_LINE_BYTES] if self.format == "journal-json" else matched_part(line)
        return kept.decode("utf-8", "replace").rstrip("\r")

    def _split(self, line: str) -> LogLine | None:
        is_json = self.format == "journal-json"
        return prefixes.parse_journal_entry(line) if is_json else prefixes.split_prefix(line)

    def _line(self, line: str, n_bytes: int) -> None:
        number = self.stats.n_lines
        if self.format == "kernel-log" and prefixes.HEADER.match(line):
            self._n_boots += bool(prefixes.BOOT.match(line)) and self._last_ns > 0
            self.stats.n_headers += 1
            return
        found = self._split(line)
        if found is None:
            self.stats.count_sample("unparsed", one_line(line, 80), number)
            return
        ts_ns = found.ts_ns if found.clock == self.clock else None
        self._count_boots(found.boot, ts_ns)
        if not found.of_kernel:
            self.stats.count("noise", "of another program", number, 1)
        elif (len(found.text) if self.format == "journal-json" else n_bytes) > MAX_LINE_BYTES:
            self.stats.count_sample("overlong", one_line(found.text, 80), number)
        elif not self._continues(found.text) and not self._starts(found.text, ts_ns, number):
            self.stats.count("noise", "about something else", number, 1)
        if ts_ns is not None:
            self.stats.extend_cpu_span(UNKNOWN, ts_ns, ts_ns)

    def _count_boots(self, boot: str, ts_ns: int | None) -> None:
        """Count boots: by their name if a line has it, else where the timestamps restart."""
        if boot and boot != self._boot:
            self._n_boots += bool(self._boot)
            self._boot = boot
        elif ts_ns is not None and ts_ns < self._last_ns - _BOOT_BACK_NS:
            self._n_boots += 1
        if ts_ns is not None:
            self._last_ns = ts_ns

    def _continues(self, text: str) -> bool:
        """Add the registers on a line to the message before it; return whether there are any."""
        row = self._open
        if row is None:
            return False
        if row["message"] == "warning":
            found = messages.RAX.match(text)
            if found is None:
                return False
            row["rax"] = int(found["word"], 16)
            row |= messages.status_of_warning(row.get("function"), row["rax"])
        elif not messages.REGISTERS.match(text) or row["n_lines"] > _MAX_REGISTER_LINES:
            self._open = None
            return False
        else:
            for name, pattern in (("rcx", messages.RCX), ("rdx", messages.RDX)):
                found = pattern.search(text)
                if found is not None and row.get(name) is None:
                    row[name] = int(found["word"], 16)
        row["n_lines"] += 1
        if row["message"] == "warning":
            self._open = None
        return True

    def _starts(self, text: str, ts_ns: int | None, number: int) -> bool:
        """Make a row of a line that is a message about TDX; return whether it is one."""
        if messages.END_TRACE.match(text):
            self._open = None
        parsed = messages.parse_message(text)
        if parsed is None and messages.is_about_tdx(text):
            parsed = "other", {}
        if parsed is None:
            return False
        message, fields = parsed
        row = {"source": self.source, "seq": number, "ts_ns": ts_ns, "message": message}
        row |= fields | {"text": text[:_MAX_TEXT], "n_lines": 1}
        self._rows.append(row)
        self.stats.events[message] += 1
        if message in ("seamcall_failed", "warning"):
            self._open = row
        elif message == "suppressed":
            self._count_suppressed(row)
        return True

    def _count_suppressed(self, row: dict[str, Any]) -> None:
        place = {"line_no": row["seq"], "end_ns": row["ts_ns"]}
        self.stats.record_loss("suppressed", row["n_events"], row["function"], **place)

    def _take(self, all_of_them: bool) -> pl.DataFrame:
        """Take the finished rows; with ``all_of_them`` also one whose registers may follow."""
        taken = [row for row in self._rows if all_of_them or row is not self._open]
        self._rows = [] if all_of_them else [row for row in self._rows if row is self._open]
        return pl.DataFrame(taken, schema=KERNEL_MESSAGES.schema)
