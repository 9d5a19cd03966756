"""What stands before a message: who logged it, when, and on which clock."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

# Clocks of a log's stamps.  "printk" is local_clock() (Linux kernel/printk/printk.c,
# vprintk_store), "monotonic" the time at which journald received the line.
PRINTK: Final = "printk"
MONOTONIC: Final = "monotonic"
WALL: Final = "wall"
YEARLESS: Final = "wall, no year"
ZONELESS: Final = "wall, no zone"
NO_CLOCK: Final = "none"
_STEPS_NS: Final = {PRINTK: 1000, MONOTONIC: 1000, WALL: 1000}
_SECOND_NS: Final = 1_000_000_000

_MONTHS: Final = "jan feb mar apr may jun jul aug sep oct nov dec".split()
# A stamp without a year is set in one that has every date.
_LEAP_YEAR: Final = 1972
# printk: level in raw form (dmesg -r, serial), facility and level in words (dmesg -x), seconds,
# the step since the line before (dmesg -d, -T -d), caller (CONFIG_PRINTK_CALLER).
_LEVEL: Final = r"(?:<\d{1,3}>|\d{1,3},\d+,(?P<us>\d{1,16}),[^;]*;|\w+ *:\w+ *: )?"
_STEP: Final = r"(?: *<[ +]*\d+\.\d+>)?"
_CALLER: Final = r"(?:\[ *[TC]\d+\])?"
_SECONDS: Final = re.compile(
    rf"^{_LEVEL}\[ *(?P<sec>\d{{1,9}})\.(?P<frac>\d{{6}}){_STEP}\]{_CALLER} ?(?P<rest>.*)$",
    re.ASCII,
)
_KMSG: Final = re.compile(r"^\d{1,3},\d+,(?P<us>\d{1,16}),[^;]*;(?P<rest>.*)$", re.ASCII)
# dmesg -T.
_HUMAN: Final = re.compile(
    rf"^{_LEVEL}\[\w{{3}} (?P<month>\w{{3}}) +(?P<day>\d\d?) (?P<time>\d\d:\d\d:\d\d) "
    rf"(?P<year>\d{{4}}){_STEP}\]{_CALLER} ?(?P<rest>.*)$",
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
# Relative stamps, of which nothing can be said: dmesg -d alone, dmesg -e and -H.
_RELATIVE: Final = re.compile(
    rf"^{_LEVEL}\[ *(?:<[ +]*\d+\.\d+>|\+\d+\.\d+|\w{{3}} ?\d+ \d\d:\d\d)\]{_CALLER} ?(?P<rest>.*)$"
)
# The host and the program of a line of syslog: what others than the kernel log is not evidence,
# for any user can make it (logger).
_HOST: Final = re.compile(r"^\S+ (?P<who>[\w./@-]+)(?:\[\d+\])?: (?P<rest>.*)$")
BOOT: Final = re.compile(r"^-- (?:Boot|Reboot)\b")
HEADER: Final = re.compile(r"^\s*$|^#|^-- (?:Boot|Reboot|Journal|Logs|No entries)\b")
_LOGGED: Final = re.compile(r"^.{0,60}? kernel: ")


@dataclass(frozen=True, slots=True)
class Stamped:
    """One line of a log, taken apart."""

    ts_ns: int | None
    clock: str
    text: str
    of_kernel: bool
    """Whether the kernel logged it; where the line does not say who did, it did."""
    boot: str = ""
    """Which boot, where the line says."""


def stamped(line: str) -> Stamped:
    """Take a line of a log apart, whichever tool wrote it."""
    for pattern, read in _SHAPES:
        found = pattern.match(line)
        if found is not None:
            return read(found)
    return Stamped(None, NO_CLOCK, line, True)


def looks_logged(line: str) -> bool:
    """Whether a line has a stamp that only logs of a kernel have."""
    found = _SECONDS.match(line) or _KMSG.match(line) or _HUMAN.match(line)
    if found is not None or BOOT.match(line):
        return True
    by_date = _ISO.match(line) or _SYSLOG.match(line)
    return by_date is not None and _LOGGED.match(f" {by_date['rest']}") is not None


def entry(line: str) -> Stamped | None:
    """Take one line of ``journalctl -o json`` apart; None if it is none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or "MESSAGE" not in fields:
        return None
    boot = fields.get("_BOOT_ID")
    who = fields.get("_TRANSPORT", fields.get("SYSLOG_IDENTIFIER"))
    ts_ns, clock = _journal_time(fields)
    return Stamped(
        ts_ns,
        clock,
        _message(fields["MESSAGE"]),
        who == "kernel",
        boot if isinstance(boot, str) else "",
    )


def clock_of(lines: Iterable[Stamped]) -> str:
    """The clock that most of the lines are stamped by."""
    votes = Counter(line.clock for line in lines if line.ts_ns is not None)
    return votes.most_common(1)[0][0] if votes else NO_CLOCK


def step_of(clock: str) -> int:
    """The finest step of a clock's stamps, in ns."""
    return _STEPS_NS.get(clock, _SECOND_NS)


def _printk(found: re.Match[str]) -> Stamped:
    ts_ns = int(found["sec"]) * _SECOND_NS + int(found["frac"]) * 1000
    behind = _HOST.match(found["rest"])
    if behind is not None and behind["who"] == "kernel":  # journalctl -o short-monotonic
        return Stamped(ts_ns, MONOTONIC, behind["rest"], True)
    return Stamped(ts_ns, PRINTK, found["rest"], True)


def _logged(ts_ns: int | None, clock: str, rest: str, has_host: bool = False) -> Stamped:
    """A line with a date: perhaps a host and a program, perhaps the kernel's own stamp."""
    behind = _HOST.match(rest)
    of_kernel = not has_host
    if behind is not None and (has_host or behind["who"] == "kernel"):
        of_kernel = behind["who"] == "kernel"
        rest = behind["rest"]
    inner = _SECONDS.match(rest) if of_kernel else None
    if inner is not None:
        return _printk(inner)
    return Stamped(ts_ns, clock, rest, of_kernel)


def _kmsg(found: re.Match[str]) -> Stamped:
    return Stamped(int(found["us"]) * 1000, PRINTK, found["rest"], True)


def _human(found: re.Match[str]) -> Stamped:
    return Stamped(_date(found), ZONELESS, found["rest"], True)


def _of_iso(found: re.Match[str]) -> Stamped:
    return _logged(*_iso(found["stamp"]), found["rest"])


def _of_syslog(found: re.Match[str]) -> Stamped:
    clock = ZONELESS if found["year"] else YEARLESS
    return _logged(_date(found), clock, found["rest"], has_host=True)


def _relative(found: re.Match[str]) -> Stamped:
    return Stamped(None, NO_CLOCK, found["rest"], True)


def _date(found: re.Match[str]) -> int | None:
    """Nanoseconds since 1970 as if the stamp were UTC; None for another language's months."""
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
    """The kernel's own stamp where the entry has it, else the time of its receipt."""
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
    """The text; one that is no UTF-8 comes as an array of bytes."""
    if isinstance(message, list):
        ok = all(isinstance(byte, int) and 0 <= byte < 256 for byte in message)
        return bytes(message).decode("utf-8", "replace") if ok else ""
    return message if isinstance(message, str) else ""


_SHAPES: Final[tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Stamped]], ...]] = (
    (_SECONDS, _printk),
    (_KMSG, _kmsg),
    (_HUMAN, _human),
    (_ISO, _of_iso),
    (_SYSLOG, _of_syslog),
    (_RELATIVE, _relative),
)
