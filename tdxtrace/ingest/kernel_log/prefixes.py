"""Prefixes of log lines: who logged the message, when, and by which clock."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

# Clocks of a log's timestamps.  "printk" is local_clock() (Linux kernel/printk/printk.c,
# vprintk_store), "monotonic" the time at which journald received the line.
PRINTK: Final = "printk"
MONOTONIC: Final = "monotonic"
WALL: Final = "wall"
YEARLESS: Final = "wall, no year"
ZONELESS: Final = "wall, no zone"
NO_CLOCK: Final = "none"
_RESOLUTION_NS: Final = {PRINTK: 1000, MONOTONIC: 1000, WALL: 1000}
_SECOND_NS: Final = 1_000_000_000

_MONTHS: Final = "jan feb mar apr may jun jul aug sep oct nov dec".split()
# The year of timestamps that have none: a leap year, which has every date.
_LEAP_YEAR: Final = 1972
# printk: level in raw form (dmesg -r, serial), facility and level in words (dmesg -x), seconds,
# the step since the line before (dmesg -d, -T -d), caller (CONFIG_PRINTK_CALLER).
_LEVEL: Final = r"(?:<\d{1,3}>|\d{1,3},\d+,(?P<us>\d{1,16}),[^;]*;|\w+ *:\w+ *: )?"
_DELTA: Final = r"(?: *<[ +]*\d+\.\d+>)?"
_CALLER: Final = r"(?:\[ *[TC]\d+\])?"
_SECONDS: Final = re.compile(
    rf"^{_LEVEL}\[ *(?P<sec>\d{{1,9}})\.(?P<frac>\d{{6}}){_DELTA}\]{_CALLER} ?(?P<rest>.*)$",
    re.ASCII,
)
_KMSG: Final = re.compile(r"^\d{1,3},\d+,(?P<us>\d{1,16}),[^;]*;(?P<rest>.*)$", re.ASCII)
# dmesg -T.
_HUMAN: Final = re.compile(
    rf"^{_LEVEL}\[\w{{3}} (?P<month>\w{{3}}) +(?P<day>\d\d?) (?P<time>\d\d:\d\d:\d\d) "
    rf"(?P<year>\d{{4}}){_DELTA}\]{_CALLER} ?(?P<rest>.*)$",
)
# dmesg --time-format iso, and of syslog and journal the same before a host's name.
_ISO: Final = re.compile(
    r"^(?P<stamp>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?"
    r"(?:Z|[+-]\d\d:?\d\d)?) (?P<rest>.*)$",
    re.ASCII,
)
_SYSLOG: Final = re.compile(
    r"^(?:\w{3} )?(?P<month>[A-Za-z]{3})\.? +(?P<day>\d\d?) "
    r"(?:(?P<year>\d{4}) )?(?P<time>\d\d:\d\d:\d\d)(?:\.(?P<frac>\d{1,9}))? (?P<rest>.*)$",
)
# Relative timestamps, which are not used: dmesg -d alone, dmesg -e and -H.
_RELATIVE: Final = re.compile(
    rf"^{_LEVEL}\[ *(?:<[ +]*\d+\.\d+>|\+\d+\.\d+|\w{{3}} ?\d+ \d\d:\d\d)\]{_CALLER} ?(?P<rest>.*)$"
)
# Host and program of a syslog line.  What other programs log is no evidence: any user can write it
# with logger(1).
_HOST: Final = re.compile(r"^\S+ (?P<who>[\w./@-]+)(?:\[\d+\])?: (?P<rest>.*)$")
BOOT: Final = re.compile(r"^-- (?:Boot|Reboot)\b")
HEADER: Final = re.compile(r"^\s*$|^#|^-- (?:Boot|Reboot|Journal|Logs|No entries)\b")
_FROM_KERNEL: Final = re.compile(r"^.{0,60}? kernel: ")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a log, split into prefix and message."""

    ts_ns: int | None
    clock: str
    text: str
    of_kernel: bool
    """Whether the kernel logged it; also where the line names no program."""
    boot: str = ""
    """Boot ID, if the line has one."""


def split_prefix(line: str) -> LogLine:
    """Split a line of dmesg, syslog, journalctl or a serial console."""
    for pattern, read in _PREFIXES:
        found = pattern.match(line)
        if found is not None:
            return read(found)
    return LogLine(None, NO_CLOCK, line, True)


def has_log_prefix(line: str) -> bool:
    """Whether a line has a prefix that only logs of a kernel have."""
    found = _SECONDS.match(line) or _KMSG.match(line) or _HUMAN.match(line)
    if found is not None or BOOT.match(line):
        return True
    by_date = _ISO.match(line) or _SYSLOG.match(line)
    return by_date is not None and _FROM_KERNEL.match(f" {by_date['rest']}") is not None


def parse_journal_entry(line: str) -> LogLine | None:
    """Split a line of ``journalctl -o json``; None if it is no entry of a journal."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or "MESSAGE" not in fields:
        return None
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


def most_common_clock(lines: Iterable[LogLine]) -> str:
    """Return the clock of most timestamps; NO_CLOCK if there are none."""
    votes = Counter(line.clock for line in lines if line.ts_ns is not None)
    return votes.most_common(1)[0][0] if votes else NO_CLOCK


def resolution_ns(clock: str) -> int:
    """Return the resolution of timestamps of a clock, in ns."""
    return _RESOLUTION_NS.get(clock, _SECOND_NS)


def _printk(found: re.Match[str]) -> LogLine:
    ts_ns = int(found["sec"]) * _SECOND_NS + int(found["frac"]) * 1000
    behind = _HOST.match(found["rest"])
    if behind is not None and behind["who"] == "kernel":  # journalctl -o short-monotonic
        return LogLine(ts_ns, MONOTONIC, behind["rest"], True)
    return LogLine(ts_ns, PRINTK, found["rest"], True)


def _dated(ts_ns: int | None, clock: str, rest: str, has_host: bool = False) -> LogLine:
    """Split what follows a date: perhaps host and program, perhaps printk's own prefix."""
    behind = _HOST.match(rest)
    of_kernel = not has_host
    if behind is not None and (has_host or behind["who"] == "kernel"):
        of_kernel = behind["who"] == "kernel"
        rest = behind["rest"]
    inner = _SECONDS.match(rest) if of_kernel else None
    if inner is not None:
        return _printk(inner)
    return LogLine(ts_ns, clock, rest, of_kernel)


def _of_syslog(found: re.Match[str]) -> LogLine:
    clock = ZONELESS if found["year"] else YEARLESS
    return _dated(_date(found), clock, found["rest"], has_host=True)


def _date(found: re.Match[str]) -> int | None:
    """Nanoseconds since 1970, taking the time for UTC; None for months of another language."""
    month = found["month"].lower()
    if month not in _MONTHS:
        return None
    year = int(found["year"] or _LEAP_YEAR)
    hour, minute, second = (int(part) for part in found["time"].split(":"))
    fraction = found.groupdict().get("frac") or ""
    try:
        date = (year, _MONTHS.index(month) + 1, int(found["day"]))
        when = datetime(*date, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None
    return int(when.timestamp()) * _SECOND_NS + int(fraction.ljust(9, "0"))


def _iso(stamp: str) -> tuple[int | None, str]:
    whole, _, rest = stamp.replace(",", ".").partition(".")
    fraction = re.match(r"\d*", rest)
    digits = fraction[0] if fraction else ""
    zone = rest[len(digits) :] if rest else ""
    try:
        when = datetime.fromisoformat(whole + zone)
    except ValueError:
        return None, NO_CLOCK
    clock = WALL if when.tzinfo is not None else ZONELESS
    seconds = int((when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp())
    return seconds * _SECOND_NS + int(digits.ljust(9, "0")[:9]), clock


def _journal_time(fields: dict[str, object]) -> tuple[int | None, str]:
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


_PREFIXES: Final[tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], LogLine]], ...]] = (
    (_SECONDS, _printk),
    (_KMSG, lambda found: LogLine(int(found["us"]) * 1000, PRINTK, found["rest"], True)),
    (_HUMAN, lambda found: LogLine(_date(found), ZONELESS, found["rest"], True)),
    (_ISO, lambda found: _dated(*_iso(found["stamp"]), found["rest"])),
    (_SYSLOG, _of_syslog),
    (_RELATIVE, lambda found: LogLine(None, NO_CLOCK, found["rest"], True)),
)
