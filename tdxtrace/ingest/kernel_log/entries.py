"""Logs whose entries have fields, of one line or several: JSON, and the journal's own forms.

journalctl -o json, json-seq, json-sse and json-pretty, dmesg -J, and what jq makes of these;
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

# Fields by which a line tells that it is part of an entry.
_NAMES: Final = (
    r"(?:__CURSOR|__REALTIME_TIMESTAMP|__MONOTONIC_TIMESTAMP|_BOOT_ID|_TRANSPORT|MESSAGE)"
)
IN_JSON: Final = re.compile(rf'^\s*\{{?"(?:{_NAMES}|dmesg|fac|pri|msg)"\s*:')
IN_EXPORT: Final = re.compile(rf"^(?: {{4}})?{_NAMES}=")
# An object of several lines begins where a line ends with a brace, and ends where one begins so.
_OPENS: Final = re.compile(r"[{]\s*$")
_CLOSES: Final = re.compile(r"^\s*[}]")
# Lines of a JSON document that belong to no entry: brackets, and the key of dmesg's list.
_FRAME: Final = re.compile(r'^\s*+(?:"dmesg"\s*+:\s*+)?[\[\]{},\s]*+$')
_LEAD: Final = re.compile(r"^(?:\x1e|data: ?)")
_KEY: Final = re.compile(r"^(?P<key>[A-Z_][A-Z0-9_]{0,63})(?:=(?P<value>.*))?$", re.DOTALL)
_INDENT: Final = "    "
_SIZE_BYTES: Final = 8
# journald takes fields of up to 768 MiB, an entry has some 30 of a line each: no message of the
# kernel has more than 1000 lines or 1 MiB (Linux LOG_LINE_MAX is 1 KiB).
_MOST_LINES: Final = 1000
_MOST_BYTES: Final = 1 << 20


class Entry(NamedTuple):
    """What some lines of a log say."""

    number: int
    """Its first line."""
    n_lines: int
    line: LogLine | None
    """None if they are no entry."""
    text: str
    is_frame: bool = False
    """Whether they only separate entries."""


class EntryReader(Protocol):
    """Puts lines together to entries."""

    def feed(self, number: int, line: bytes) -> Iterator[Entry]:
        """Yield the entries that a line completes; lines have no line ends."""

    def finish(self) -> Iterator[Entry]:
        """Yield what never ended."""


@dataclass(slots=True)
class _Open:
    """Lines of an entry that may have more."""

    number: int
    texts: list[str] = field(default_factory=list)
    n_bytes: int = 0

    def add(self, text: str) -> bool:
        """Add a line; return whether there are too many for any entry."""
        self.texts.append(text)
        self.n_bytes += len(text)
        return len(self.texts) > _MOST_LINES or self.n_bytes > _MOST_BYTES

    def nothing(self) -> Entry:
        """The same lines, of which nothing is understood."""
        text = next((text for text in self.texts if text.strip(" {[")), "")
        return Entry(self.number, len(self.texts), None, text)


@dataclass(slots=True)
class JsonEntries:
    """Objects of JSON, on one line each or on several."""

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
            yield whole.nothing() if found is None else Entry(whole.number, n_lines, found, "")
            if found is None and last:
                yield Entry(number, 1, None, text, is_frame=True)
            if last:
                return
        if _OPENS.search(text):
            if self._open is not None:
                # What was open holds this one: it is a frame, or nothing.
                yield self._open.nothing()._replace(is_frame=True)
            self._open = _Open(number)
            text = "{"
        if self._open is not None and self._open.add(text):
            yield from self.finish()

    def finish(self) -> Iterator[Entry]:
        """Yield what never ended."""
        rest, self._open = self._open, None
        if rest is not None:
            yield rest.nothing()


@dataclass(slots=True)
class FieldEntries:
    """Entries of ``KEY=value`` lines: an empty line, or a line with a date, separates them."""

    _open: _Open | None = None
    _fields: dict[str, str] = field(default_factory=dict)
    _binary: bytearray | None = None
    """Of a field that is written with its size: what was read of it."""
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
            # -o verbose: a date before the fields of an entry.
            yield Entry(number, 1, None, text, is_frame=text.endswith("]"))

    def _count(self, number: int, text: str) -> Iterator[Entry]:
        if self._open is None:
            self._open = _Open(number)
        if self._open.add(text):
            yield from self.finish()

    def _add_binary(self, line: bytes) -> None:
        """Take a part of a field that is a size of 8 bytes, little-endian, and so many bytes."""
        assert self._binary is not None
        self._binary += line + b"\n"
        size = int.from_bytes(self._binary[:_SIZE_BYTES], "little")
        if len(self._binary) >= _SIZE_BYTES + min(size, _MOST_BYTES) + 1:
            value = bytes(self._binary[_SIZE_BYTES : _SIZE_BYTES + size])
            self._fields.setdefault(self._key, value.decode("utf-8", "replace"))
            self._binary = None

    def finish(self) -> Iterator[Entry]:
        """Yield the entry that ends here."""
        whole, self._open = self._open, None
        fields, self._fields, self._binary, self._key = self._fields, {}, None, ""
        if whole is not None:
            made = whole.nothing()
            yield made._replace(line=of_journal(fields) if "MESSAGE" in fields else None)


def parse_json(text: str) -> LogLine | None:
    """Read an object of JSON; None if it is no entry of a log.

    It is one of the journal (``MESSAGE``) or of dmesg -J (``msg``).
    """
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
    # dmesg -x says the facility; the time is in seconds.
    time, facility = fields.get("time"), fields.get("fac", "kern")
    if isinstance(time, str) and re.fullmatch(r"\d{1,9}\.\d{6}", time):
        line = f"[{time}] {line}"
    found = prefixes.split_prefix(line)
    return found if facility == "kern" else found._replace(of_kernel=False)


def is_entry(text: str) -> bool:
    """Whether a line is an entry of a log in JSON that is the journal's or about TDX."""
    text = _LEAD.sub("", text)
    found = parse_json(text) if text.startswith("{") else None
    if found is None:
        return False
    return '"MESSAGE"' in text or messages.parse_message(found.text) is not None


def of_journal(fields: Mapping[str, object]) -> LogLine:
    """Make a line of the fields of an entry of the journal."""
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
    """The kernel's own timestamp if the entry has it, else the time at which it was received."""
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
    """The message as text; journald gives one that is not UTF-8 as an array of bytes."""
    if isinstance(message, list):
        ok = all(isinstance(byte, int) and 0 <= byte < 256 for byte in message)
        return bytes(message).decode("utf-8", "replace") if ok else ""
    return message if isinstance(message, str) else ""
