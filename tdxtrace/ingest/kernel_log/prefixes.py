"""Prefixes of log lines: the program that logged the message, the timestamp and its clock."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

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
# Year assumed for timestamps without one: a leap year, in which every date exists.
_LEAP_YEAR: Final = 1972
# Text before a prefix that carries no information: quotation marks and indentation of a mail, list
# bullets, prompts, marks of a diff.
_QUOTED: Final = re.compile(r"^(?:[>|\s]|[-+*#$][ \t]|[A-Z]{2,3}>)+")
# Terminal colours, as raw escape sequences and as cat -v prints them.
_COLOUR: Final = re.compile(r"(?:\x1b|\^\[)\[[\d;]{0,16}[mK]")
# Possible beginnings of a log line.  A file name or line number is recognised by being before one.
_BEGIN: Final = (
    r"(?=\[ *\d{1,9}\.\d{6}|\[ *\+\d|\[\w{3} ?(?:\d| \w{3} )|<\d{1,3}>|\d{1,3},\d+,\d+,"
    r"|\d{10}\.\d{6} |[A-Z][a-z]{2} +\d\d? \d\d:\d\d:|[A-Z][a-z]{2} \d{4}-|\d{4}-\d\d-\d\d[T ])"
)
# Prefixes without a time: the priority as a number (dmesg -r, serial), facility and level in words
# (dmesg -x), the stream of a container log, "kernel:" without a host (containers, IPMI), file name
# and line number (grep -n, cat -n).
_DECORATION: Final = re.compile(
    r"^(?:<(?P<priority>\d{1,3})>(?!1 )|(?P<facility>[a-z]\w{2,7}) *:[a-z]{3,6} *: "
    r"|std(?:out|err) [FP] |(?:\w{2,8}\.\w{2,8} )?kernel(?:\[\d+\])?: |\d{1,9}[ \t]+"
    + _BEGIN
    + r"|(?:[\w./+@-]{1,100}[:-])?(?:\d{1,9}[:-])?[ \t]*"
    + _BEGIN
    + r")(?P<rest>.*)$",
    re.ASCII | re.DOTALL,
)
# Shift from a priority to its facility, which is 0 for the kernel (Linux include/linux/printk.h,
# RFC 5424 6.2.1).
_FACILITY_SHIFT: Final = 3
# A prefix of unknown form before printk's time or the program name "kernel".
_BEFORE_STAMP: Final = re.compile(
    r"^(?P<before>[^\n]{1,100}?)(?=\[ *\d{1,9}\.\d{6}(?:\]| <))(?P<rest>.*)$", re.ASCII | re.DOTALL
)
_BEFORE_NAME: Final = re.compile(
    r"^(?P<before>[^\n]{1,160}?[ \t])kernel(?:\[\d+\])?: (?P<rest>.*)$", re.ASCII | re.DOTALL
)
# printk: seconds, the time since the previous line (dmesg -d, journalctl -o short-delta), caller
# (CONFIG_PRINTK_CALLER).
_DELTA: Final = r"(?: *<[ +]*\d+\.\d+ ?>| {2,20})?"
_CALLER: Final = r"(?: ?\[ *[TC]\d+\])?"
_SECONDS: Final = re.compile(
    rf"^\[ *(?P<sec>\d{{1,9}})\.(?P<frac>\d{{6}}){_DELTA}\]{_CALLER} ?(?P<rest>.*)$",
    re.ASCII | re.DOTALL,
)
# /dev/kmsg and netconsole.
_KMSG: Final = re.compile(
    r"^(?P<priority>\d{1,3}),\d+,(?P<us>\d{1,16}),[^;]*;(?P<rest>.*)$", re.ASCII | re.DOTALL
)
# dmesg -T.
_HUMAN: Final = re.compile(
    rf"^\[\w{{3}} (?P<month>\w{{3}}) +(?P<day>\d\d?) (?P<time>\d\d:\d\d:\d\d) "
    rf"(?P<year>\d{{4}}){_DELTA}\]{_CALLER} ?(?P<rest>.*)$",
    re.DOTALL,
)
_STAMP: Final = r"(?P<stamp>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?)"
# dmesg --time-format iso; syslog and journal have the same before a host name.
_ISO: Final = re.compile(rf"^{_STAMP} (?P<rest>.*)$", re.ASCII | re.DOTALL)
# RFC 5424: after the priority a version, time, host, program, process ID, message ID and data.
_RFC5424: Final = re.compile(
    rf"^<\d{{1,3}}>1 {_STAMP} (?P<rest>\S+ \S+) \S+ \S+ (?:-|\[[^\]]*\]) ?(?P<text>.*)$",
    re.ASCII | re.DOTALL,
)
# journalctl -o short-full, in any language: day of the week, date, time, zone.
_FULL: Final = re.compile(
    r"^\S{1,12} (?P<stamp>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{1,9})?) (?P<zone>[\w+:-]{1,9}) "
    r"(?P<rest>.*)$",
    re.DOTALL,
)
# journalctl -o short-unix.
_UNIX: Final = re.compile(
    r"^(?P<sec>\d{9,10})\.(?P<frac>\d{1,9}) (?P<rest>.*)$", re.ASCII | re.DOTALL
)
_SYSLOG: Final = re.compile(
    r"^(?:\w{3} )?(?P<month>[A-Za-z]{3})\.? +(?P<day>\d\d?) "
    r"(?:(?P<year>\d{4}) )?(?P<time>\d\d:\d\d:\d\d)(?:\.(?P<frac>\d{1,9}))? "
    r"(?:(?:[A-Z]{2,5} )?(?P<last>\d{4}) )?(?P<rest>.*)$",
    re.DOTALL,
)
# The same in another language: the date is recognised by its position and is not read.
_LOCAL: Final = re.compile(
    r"^(?:\S{1,12} +){1,3}?\d\d:\d\d:\d\d(?:[.,]\d{1,9})? (?P<rest>\S+ [\w./@-]+(?:\[\d+\])?: .*)$",
    re.DOTALL,
)
# Relative timestamps, which are not used: dmesg -d without other options, dmesg -e and -H.
_RELATIVE: Final = re.compile(
    rf"^\[ *(?:<[ +]*\d+\.\d+>|\+\d+\.\d+|\w{{3}} ?\d+ \d\d:\d\d)\]{_CALLER} ?(?P<rest>.*)$",
    re.DOTALL,
)
# Host and program of a syslog line, maybe with facility and level (busybox); the host may be
# missing (journalctl --no-hostname, /dev/kmsg).  Messages of other programs are no evidence: any
# user can write them with logger(1).
_HOST: Final = re.compile(
    r"^(?:[^\s:]+ (?:\w{2,8}\.\w{2,8} )?|(?=kernel[:\[]|[\w./@-]+\[\d+\]:))"
    r"(?P<who>[\w./@-]+)(?P<pid>\[\d+\])?:(?: (?P<rest>.*))?$",
    re.DOTALL,
)
# Most prefixes of one line: quote, level, date, host, level, seconds, and colours between them.
_MAX_LAYERS: Final = 12
BOOT: Final = re.compile(r"^-- (?:Boot|Reboot)\b")
HEADER: Final = re.compile(
    r"^\s*$|^#+(?:\s(?!.{0,9}\[ *\d)|$)|^-- (?:Boot|Reboot|Journal|Logs|No entries)\b"
)


class LogLine(NamedTuple):
    """One line of a log, split into prefix and message."""

    ts_ns: int | None
    clock: str
    text: str
    of_kernel: bool
    """Whether the kernel logged it; also true if the line names no program."""
    boot: str = ""
    """Boot ID, if the line has one."""
    has_prefix: bool = True
    """Whether the line has a prefix before the text, other than quotes and colours."""


def split_prefix(line: str) -> LogLine:
    """Split a line of dmesg, syslog, journalctl, a serial console or a container's log.

    Prefixes are removed one after the other, as they are nested: a quoted line of a journal that
    forwards printk's own prefix has four.  The innermost timestamp is returned.
    """
    return _peel(line).line()


def has_log_prefix(line: str) -> bool:
    """Return whether a line has a prefix that occurs only in kernel logs, or marks a boot."""
    if BOOT.match(line) is not None:
        return True
    peeled = _peel(line)
    return peeled.is_log and not peeled.is_guess


def most_common_clock(lines: Iterable[LogLine]) -> str:
    """Return the clock of most timestamps; NO_CLOCK if no line has a timestamp."""
    votes = Counter(line.clock for line in lines if line.ts_ns is not None)
    return votes.most_common(1)[0][0] if votes else NO_CLOCK


def resolution_ns(clock: str) -> int:
    """Return the resolution of a clock's timestamps, in ns."""
    return _RESOLUTION_NS.get(clock, _SECOND_NS)


@dataclass(slots=True)
class _Peeled:
    """State of a line while its prefixes are removed."""

    text: str
    ts_ns: int | None = None
    clock: str = NO_CLOCK
    of_kernel: bool = True
    is_log: bool = False
    """Whether a prefix was removed that occurs only in kernel logs."""
    is_marked: bool = False
    """Whether a prefix without a time was removed: level, stream, program, file or line number."""
    is_guess: bool = False
    """Whether a prefix of unknown form was removed."""
    has_date: bool = False
    has_program: bool = False

    def line(self) -> LogLine:
        """Return the rest of the line with the information from its prefixes."""
        has_prefix = self.is_log or self.has_date or self.is_guess or self.is_marked
        return LogLine(self.ts_ns, self.clock, self.text, self.of_kernel, "", has_prefix)


def _peel(line: str) -> _Peeled:
    """Remove the prefixes of a line, and its indentation."""
    peeled = _Peeled(_QUOTED.sub("", line.replace("\xa0", " "), count=1))
    for _ in range(_MAX_LAYERS):
        if not any(layer(peeled) for layer in _LAYERS):
            break
    peeled.text = peeled.text.lstrip()
    return peeled


def _decoration(peeled: _Peeled) -> bool:
    if _COLOUR.match(peeled.text):
        # A tool that colours prefixes also colours words of the message: remove all colours.
        peeled.text = _QUOTED.sub("", _COLOUR.sub("", peeled.text), count=1)
        return True
    found = _DECORATION.match(peeled.text)
    if found is None or len(found["rest"]) == len(peeled.text):
        return False
    peeled.text, peeled.is_marked = found["rest"], True
    if found["facility"]:
        peeled.of_kernel = peeled.is_log = found["facility"] == "kern"
    elif found["priority"]:
        peeled.of_kernel = int(found["priority"]) >> _FACILITY_SHIFT == 0
    return True


def _unknown(peeled: _Peeled) -> bool:
    """Remove a prefix of unknown form before printk's time or the program name "kernel"."""
    if peeled.is_log or peeled.has_date or peeled.clock in (PRINTK, MONOTONIC):
        return False
    found = _BEFORE_STAMP.match(peeled.text) or _BEFORE_NAME.match(peeled.text)
    if found is None:
        return False
    peeled.text, peeled.is_guess = found["rest"], True
    return True


def _printk(peeled: _Peeled) -> bool:
    """Remove printk's time and a host and program after it (journalctl -o short-monotonic)."""
    found = _SECONDS.match(peeled.text) or _KMSG.match(peeled.text)
    if found is None or peeled.clock in (PRINTK, MONOTONIC):
        return False
    numbers = found.groupdict()
    if numbers.get("us"):
        peeled.ts_ns = int(numbers["us"]) * 1000
        peeled.of_kernel = int(numbers["priority"]) >> _FACILITY_SHIFT == 0
    else:
        peeled.ts_ns = int(numbers["sec"]) * _SECOND_NS + int(numbers["frac"]) * 1000
    peeled.clock, peeled.text, peeled.is_log = PRINTK, found["rest"], True
    program = _HOST.match(peeled.text)
    if program is None or peeled.has_date:
        return True
    if program["who"] == "kernel":
        peeled.clock, peeled.text = MONOTONIC, program["rest"] or ""
    elif program["pid"]:  # a process logged it: journalctl -o short-monotonic without -k
        peeled.of_kernel = False
    return True


def _dated(peeled: _Peeled) -> bool:
    """Remove a date, and the host and program after it."""
    if peeled.has_program or peeled.clock in (PRINTK, MONOTONIC):
        return False
    for pattern, read, names_program in _DATES:
        found = pattern.match(peeled.text)
        if found is None:
            continue
        peeled.ts_ns, peeled.clock = read(found)
        peeled.text, peeled.has_date = found["rest"], True
        peeled.is_log |= pattern is _HUMAN
        # dmesg prints a decimal comma, syslog a point, followed by host and program.
        may_be = pattern is _UNIX or (pattern is _ISO and "," not in found["stamp"])
        is_syslog = may_be and _HOST.match(found["rest"])
        # ts(1) prefixes the output of a command with a date; syslog has no printk time right
        # after the date.
        is_printed = _SECONDS.match(peeled.text) is not None
        _take_host(peeled, named=not is_printed and (names_program or bool(is_syslog)))
        return True
    found = _RFC5424.match(peeled.text)
    if found is None:
        return False
    peeled.ts_ns, peeled.clock = _iso(found["stamp"])
    peeled.has_date = peeled.has_program = True
    peeled.of_kernel = peeled.is_log = found["rest"].split()[1] == "kernel"
    peeled.text = found["text"]
    return True


def _take_host(peeled: _Peeled, named: bool) -> None:
    """Remove host and program; with ``named``, a line without them is not from the kernel."""
    program = _HOST.match(peeled.text)
    is_kernel = program is not None and program["who"] == "kernel"
    if program is not None and (named or is_kernel):
        peeled.text, peeled.has_program = program["rest"] or "", True
        peeled.is_log |= is_kernel
    peeled.of_kernel = is_kernel or (peeled.of_kernel and not named)


def _relative(peeled: _Peeled) -> bool:
    found = None if peeled.has_date else _RELATIVE.match(peeled.text)
    if found is None:
        return False
    peeled.text, peeled.has_date = found["rest"], True
    return True


def _of_syslog(found: re.Match[str]) -> tuple[int | None, str]:
    return _date(found), ZONELESS if found["year"] or found["last"] else YEARLESS


def _full(found: re.Match[str]) -> tuple[int | None, str]:
    """Return the time and clock of a date with a named zone; only UTC and GMT are unambiguous."""
    is_utc = found["zone"] in ("UTC", "GMT")
    return _iso(found["stamp"] + ("Z" if is_utc else ""))


def _unix(found: re.Match[str]) -> tuple[int | None, str]:
    return int(found["sec"]) * _SECOND_NS + int(found["frac"].ljust(9, "0")), WALL


def _date(found: re.Match[str]) -> int | None:
    """Return ns since 1970, taking the time as UTC; None for an invalid date or foreign month."""
    month = found["month"].lower()
    if month not in _MONTHS:
        return None
    year = int(found["year"] or found.groupdict().get("last") or _LEAP_YEAR)
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


_Reader = Callable[[re.Match[str]], tuple[int | None, str]]
# Dates: pattern, reader of time and clock, and whether host and program always follow.
_DATES: Final[tuple[tuple[re.Pattern[str], _Reader, bool], ...]] = (
    (_HUMAN, lambda found: (_date(found), ZONELESS), False),
    (_ISO, lambda found: _iso(found["stamp"]), False),
    (_FULL, _full, True),
    (_UNIX, _unix, False),
    (_SYSLOG, _of_syslog, True),
    (_LOCAL, lambda _: (None, NO_CLOCK), True),
)
_LAYERS: Final = (_decoration, _printk, _dated, _relative, _unknown)
