"""A log of the kernel becomes rows of ``kernel_messages``; every other line is counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from tdxtrace.ingest.kernel_log import messages, prefixes
from tdxtrace.ingest.kernel_log.prefixes import Stamped
from tdxtrace.ingest.provenance import Header
from tdxtrace.ingest.raw import UNKNOWN
from tdxtrace.ingest.source import (
    KEPT_LINE_BYTES,
    MAX_LINE_BYTES,
    Block,
    Stream,
    matched_part,
)
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.events import KERNEL_MESSAGES
from tdxtrace.tables.text import one_line

# Lines that tell by which clock a log is stamped.
_SAMPLE_LINES: Final = 2000
# printk's stamps may be some microseconds out of order, and never seconds, but for a boot.
_BOOT_BACK_NS: Final = 1_000_000_000
_MAX_TEXT: Final = 400
# Lines of registers that follow a failure: three in the longest form.
_MAX_REGISTER_LINES: Final = 3
SEVERAL_BOOTS: Final = "printk of several boots"


@dataclass(slots=True)
class MessageReader:
    """Reads lines of one log into rows, and counts the rest."""

    format: str
    source: int
    stats: SourceStats
    stream: Stream
    blocks: Iterable[Block]
    """The lines of the stream."""
    clock: str = ""
    _boot: str = ""
    _n_boots: int = 1
    _last_ns: int = 0
    _open: dict[str, Any] | None = None
    """The failure or warning whose registers may follow."""
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows of each block of whole lines."""
        for block in self.blocks:
            lines = block.tobytes().split(b"\n")[:-1]
            if not self.clock:
                told = (self._stamped(self._text(line)) for line in lines[:_SAMPLE_LINES])
                self.clock = prefixes.clock_of(line for line in told if line is not None)
            for line in lines:
                self.stats.n_lines += 1
                self._line(self._text(line), len(line))
            yield self._take(all_of_them=False)
        yield self._take(all_of_them=True)

    def header(self) -> Header:
        """What the log says of itself: its clock."""
        is_printk = self.clock == prefixes.PRINTK
        clock = SEVERAL_BOOTS if self._n_boots > 1 and is_printk else self.clock
        return Header(kind_of_clock=clock, resolution_ns=prefixes.step_of(self.clock))

    @property
    def position(self) -> int:
        """Bytes read so far, for progress."""
        return self.stream.n_bytes

    def _text(self, line: bytes) -> str:
        kept = line[:KEPT_LINE_BYTES] if self.format == "journal-json" else matched_part(line)
        return kept.decode("utf-8", "replace").rstrip("\r")

    def _stamped(self, line: str) -> Stamped | None:
        return prefixes.entry(line) if self.format == "journal-json" else prefixes.stamped(line)

    def _line(self, line: str, n_bytes: int) -> None:
        number = self.stats.n_lines
        if self.format == "kernel-log" and prefixes.HEADER.match(line):
            self._n_boots += bool(prefixes.BOOT.match(line)) and self._last_ns > 0
            self.stats.n_headers += 1
            return
        told = self._stamped(line)
        if told is None:
            self.stats.count_sample("unparsed", one_line(line, 80), number)
            return
        ts_ns = told.ts_ns if told.clock == self.clock else None
        self._look_for_boots(told, ts_ns)
        if not told.of_kernel:
            self.stats.count("noise", "of another program", number, 1)
        elif (len(told.text) if self.format == "journal-json" else n_bytes) > MAX_LINE_BYTES:
            self.stats.count_sample("overlong", one_line(told.text, 80), number)
        elif not self._goes_on(told.text) and not self._begins(told.text, ts_ns, number):
            self.stats.count("noise", "about something else", number, 1)
        if ts_ns is not None:
            self.stats.extend_cpu_span(UNKNOWN, ts_ns, ts_ns)

    def _look_for_boots(self, told: Stamped, ts_ns: int | None) -> None:
        """The kernel's clock begins again with each boot."""
        if told.boot and told.boot != self._boot:
            self._n_boots += bool(self._boot)
            self._boot = told.boot
        elif ts_ns is not None and ts_ns < self._last_ns - _BOOT_BACK_NS:
            self._n_boots += 1
        if ts_ns is not None:
            self._last_ns = ts_ns

    def _goes_on(self, text: str) -> bool:
        """Whether a line has registers of the message before it."""
        row = self._open
        if row is None:
            return False
        if row["message"] == "warning":
            found = messages.RAX.match(text)
            if found is None:
                return False
            row["rax"] = int(found["word"], 16)
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

    def _begins(self, text: str, ts_ns: int | None, number: int) -> bool:
        """Whether a line is a message of ours; it then has a row."""
        if messages.END_TRACE.match(text):
            self._open = None
        said = messages.decoded(text)
        if said is None:
            return False
        message, fields = said
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
        """The rows so far; but for the last block all that nothing can be added to."""
        taken = [row for row in self._rows if all_of_them or row is not self._open]
        self._rows = [] if all_of_them else [row for row in self._rows if row is self._open]
        return pl.DataFrame(taken, schema=KERNEL_MESSAGES.schema)
