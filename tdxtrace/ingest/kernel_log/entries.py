"""Entries of logs with fields, on one line or several: JSON, and the journal's own formats.

journalctl -o json, json-seq, json-sse and json-pretty, dmesg -J, and these reformatted by jq;
journalctl -o export and -o verbose (systemd, docs/JOURNAL_EXPORT_FORMATS.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from tdxtrace.ingest.kernel_log import messages, prefixes
from tdxtrace.ingest.kernel_log.prefixes import MONOTONIC, NO_CLOCK, PRINTK, WALL, LogLine

# Fields that identify a line as part of an entry.
_NAMES: Final = (
    r"(?:__CURSOR|__REALTIME_TIMESTAMP|__MONOTONIC_TIMESTAMP|_BOOT_ID|_TRANSPORT|MESSAGE)"
)
IN_JSON: Final = re.compile(rf'^\s*\{{?"(?:{_NAMES}|dmesg|fac|pri|msg)"\s*:')
IN_EXPORT: Final = re.compile(rf"^(?: {{4}})?{_NAMES}=")
# An object on several lines starts with a line that ends with "{", and ends with a line that starts
# with "}".
_OPENS: Final = re.compile(r"[{]\s*$")
_CLOSES: Final = re.compile(r"^\s*[}]")
# Lines of a JSON document that belong to no entry: brackets, and the key of dmesg's list.
_FRAME: Final = re.compile(r'^\s*+(?:"dmesg"\s*+:\s*+)?[\[\]{},\s]*+$')
_LEAD: Final = re.compile(r"^(?:\x1e|data: ?)")
_KEY: Final = re.compile(r"^(?P<key>[A-Z_][A-Z0-9_]{0,63})(?:=(?P<value>.*))?$", re.DOTALL)
_INDENT: Final = "    "
_SIZE_BYTES: Final = 8
# Limits of one entry.  journald accepts fields of up to 768 MiB, but an entry usually has some 30
# fields of one line each, and no kernel message has more than 1000 lines or 1 MiB (Linux
# LOG_LINE_MAX is 1 KiB).
_MAX_LINES: Final = 1000
_MAX_BYTES: Final = 1 << 20


class Entry(NamedTuple):
    """Result of reading one or more lines of a log."""

    number: int
    """Number of the first line."""
    n_lines: int
    line: LogLine | None
    """The log line that the entry holds; None if the lines are no entry."""
    text: str
    is_frame: bool = False
    """Whether the lines only separate entries."""


class EntryReader(Protocol):
    """Assembles entries from lines."""

    def feed(self, number: int, line: bytes) -> Iterator[Entry]:
        """Yield the entries that a line completes; ``line`` is without its line end."""

    def finish(self) -> Iterator[Entry]:
        """Yield the entry that is still open at the end of the input."""


@dataclass(slots=True)
class _Open:
    """Lines of an entry that is not complete."""

    number: int
    texts: list[str] = field(default_factory=list)
    n_bytes: int = 0

    def add(self, text: str) -> bool:
        """Add a line; return whether the lines exceed the limits of an entry."""
        self.texts.append(text)
        self.n_bytes += len(text)
        return len(self.texts) > _MAX_LINES or self.n_bytes > _MAX_BYTES

    def unreadable(self) -> Entry:
        """Return the lines as an entry that could not be read."""
        text = next((text for text in self.texts if text.strip(" {[")), "")
        return Entry(self.number, len(self.texts), None, text)


@dataclass(slots=True)
class JsonEntries:
    """Assembles entries from JSON objects, each on one line or on several."""

    _open: _Open | None = None

    def feed(self, number: int, line: bytes) -> Iterator[Entry]:
        """Yield the entries that a line completes."""
        text = _LEAD.sub("", line.decode("utf-8", "replace").rstrip("\r"))
        if self._open is None and not _OPENS.search(text):
            found = parse_json(text)
            yield Entry(number, 1, found, text, found is None and bool(_FRAME.match(text)))
            return
        if self._open is not None and _CLOSES.match(text):
            whole, self._open = self._open, None
            last = 0 if _OPENS.search(text) else 1
            found = parse_json("\n".join(whole.texts) + "}")
            n_lines = len(whole.texts) + last
            yield whole.unreadable() if found is None else Entry(whole.number, n_lines, found, "")
            if found is None and last:
                yield Entry(number, 1, None, text, is_frame=True)
            if last:
                return
        if _OPENS.search(text):
            if self._open is not None:
                # The open object contains this one, so its own lines only frame entries.
                yield self._open.unreadable()._replace(is_frame=True)
            self._open = _Open(number)
            text = "{"
        if self._open is not None and self._open.add(text):
            yield from self.finish()

    def finish(self) -> Iterator[Entry]:
        """Yield the object that is still open at the end of the input, as unreadable."""
        rest, self._open = self._open, None
        if rest is not None:
            yield rest.unreadable()


@dataclass(slots=True)
class FieldEntries:
    """Assembles entries from ``KEY=value`` lines, separated by empty lines or lines with a date."""

    _open: _Open | None = None
    _fields: dict[str, str] = field(default_factory=dict)
    _binary: bytearray | None = None
    """Bytes read so far of a field that is written with its size; None outside such a field."""
    _key: str = ""

    def feed(self, number: int, line: bytes) -> Iterator[Entry]:
        """Yield the entries that a line completes."""
        if self._binary is not None:
            self._add_binary(line)
            yield from self._count(number, "")
            return
        text = line.decode("utf-8", "replace").rstrip("\r")
        is_indented = text.startswith(_INDENT)
        found = _KEY.match(text.removeprefix(_INDENT))
        if not text.strip():
            yield from self.finish()
            yield Entry(number, 1, None, "", is_frame=True)
        elif found is not None and found["value"] is not None:
            self._key = found["key"]
            self._fields.setdefault(self._key, found["value"])
            yield from self._count(number, text)
        elif found is not None and not is_indented:
            self._key, self._binary = found["key"], bytearray()
            yield from self._count(number, text)
        elif is_indented and self._key:
            yield from self._count(number, "")
        else:
            yield from self.finish()
            # -o verbose: a line with a date precedes the fields of an entry.
            yield Entry(number, 1, None, text, is_frame=text.endswith("]"))

    def _count(self, number: int, text: str) -> Iterator[Entry]:
        if self._open is None:
            self._open = _Open(number)
        if self._open.add(text):
            yield from self.finish()

    def _add_binary(self, line: bytes) -> None:
        """Add a line of a binary field: its size in 8 bytes, little-endian, then its value."""
        assert self._binary is not None
        self._binary += line + b"\n"
        size = int.from_bytes(self._binary[:_SIZE_BYTES], "little")
        if len(self._binary) >= _SIZE_BYTES + min(size, _MAX_BYTES) + 1:
            value = bytes(self._binary[_SIZE_BYTES : _SIZE_BYTES + size])
            self._fields.setdefault(self._key, value.decode("utf-8", "replace"))
            self._binary = None

    def finish(self) -> Iterator[Entry]:
        """Yield the entry that ends here."""
        whole, self._open = self._open, None
        fields, self._fields, self._binary, self._key = self._fields, {}, None, ""
        if whole is not None:
            made = whole.unreadable()
            yield made._replace(line=of_journal(fields) if "MESSAGE" in fields else None)


def parse_json(text: str) -> LogLine | None:
    """Read a JSON object of the journal (``MESSAGE``) or of dmesg -J (``msg``); None for others."""
    try:
        fields = json.loads(text, parse_float=str)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    if "MESSAGE" in fields:
        return of_journal(fields)
    message = fields.get("msg")
    if not isinstance(message, str):
        return None
    line = message.split("\n", 1)[0]
    # dmesg -x adds the facility; the time is in seconds.
    time, facility = fields.get("time"), fields.get("fac", "kern")
    if isinstance(time, str) and re.fullmatch(r"\d{1,9}\.\d{6}", time):
        line = f"[{time}] {line}"
    found = prefixes.split_prefix(line)
    return found if facility == "kern" else found._replace(of_kernel=False)


def is_entry(text: str) -> bool:
    """Return whether a line is a JSON log entry from the journal, or one about TDX."""
    text = _LEAD.sub("", text)
    found = parse_json(text) if text.startswith("{") else None
    if found is None:
        return False
    return '"MESSAGE"' in text or messages.parse_message(found.text) is not None


def of_journal(fields: Mapping[str, object]) -> LogLine:
    """Return the log line that the fields of a journal entry hold."""
    boot = fields.get("_BOOT_ID")
    who = fields.get("_TRANSPORT", fields.get("SYSLOG_IDENTIFIER"))
    ts_ns, clock = _journal_time(fields)
    return LogLine(
        ts_ns,
        clock,
        _message(fields["MESSAGE"]),
        who == "kernel",
        boot if isinstance(boot, str) else "",
    )


def _journal_time(fields: Mapping[str, object]) -> tuple[int | None, str]:
    """Return the kernel's own timestamp, else the time of receipt, in ns, and the clock of it."""
    for name, clock in (
        ("_SOURCE_MONOTONIC_TIMESTAMP", PRINTK),
        ("__REALTIME_TIMESTAMP", WALL),
        ("__MONOTONIC_TIMESTAMP", MONOTONIC),
    ):
        us = fields.get(name)
        if isinstance(us, str) and re.fullmatch(r"\d{1,16}", us, re.ASCII):
            return int(us) * 1000, clock
    return None, NO_CLOCK


def _message(message: object) -> str:
    """Return the message as text; journald exports one that is not UTF-8 as an array of bytes."""
    if isinstance(message, list):
        ok = all(isinstance(byte, int) and 0 <= byte < 256 for byte in message)
        return bytes(message).decode("utf-8", "replace") if ok else ""
    return message if isinstance(message, str) else ""
