"""Parse options of a trace.dat: clocks and conversion to ns, losses, buffers, offsets of parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.batch import MAX_CPUS, I64Array, U64Array
from tdxtrace.ingest.loops.pages import MAX_TIME, Shifts
from tdxtrace.ingest.records.datafile import Cursor, CutShortError

# Option numbers: trace-cmd.dat.v7(5), OPTIONS SECTION; v6 has those below 16 too.
DONE: Final = 0
_DATE, _CPUSTAT, _BUFFER, _TRACECLOCK, _UNAME = 1, 2, 3, 4, 5
_OFFSET, _CPUCOUNT, _VERSION, _TIME_SHIFT, _TSC2NSEC = 7, 8, 9, 12, 14
HEADER_INFO, FTRACE_EVENTS, EVENT_FORMATS, KALLSYMS, CMDLINES = 16, 17, 18, 19, 21
_BUFFER_TEXT: Final = 22
PARTS: Final = (HEADER_INFO, FTRACE_EVENTS, EVENT_FORMATS, KALLSYMS, CMDLINES)
_NUMBER: Final = re.compile(rb"^\s*(?P<sign>[-+]?)(?P<digits>0[xX][0-9a-fA-F]{1,16}|\d{1,19})")


@dataclass(frozen=True, slots=True)
class CpuData:
    """Offset and size of one CPU's pages in the file, in bytes."""

    cpu: int
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """One trace instance: its name ("" for the top-level one), and its pages if they are listed."""

    name: str
    at: int
    clock: str = ""
    page_size: int = 0
    cpus: tuple[CpuData, ...] = ()
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Shift:
    """Corrections of a guest CPU's clock, measured while host and guest were traced."""

    interpolate: bool
    time: tuple[int, ...]
    offset: tuple[int, ...]
    scaling: tuple[int, ...]
    fraction: tuple[int, ...]


@dataclass(slots=True)
class Options:
    """The contents of all options that the reader needs."""

    clock: str = ""
    has_clock: bool = False
    offset_ns: int = 0
    tsc_mult: int = 0
    tsc_shift: int = 0
    shifts: list[Shift] = field(default_factory=list)
    n_cpus: int | None = None
    uname: str = ""
    version: str = ""
    cpu_stats: list[str] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    parts: dict[int, int] = field(default_factory=dict)
    """Offset of each part's section, by option number."""

    def parse(self, number: int, data: bytes, has_sections: bool) -> None:
        """Parse one option; if it is cut short, the fields after the cut are ignored.

        Args:
            number: The option's number.
            data: The option's bytes.
            has_sections: Whether the file has version 7, in which buffers list their CPUs.
        """
        with suppress(CutShortError):
            self._parse(number, data, has_sections)

    def _parse(self, number: int, data: bytes, has_sections: bool) -> None:
        cursor = Cursor(data)
        if number in (_DATE, _OFFSET):
            self.offset_ns += strtoll(data) * (1000 if number == _DATE else 1)
        elif number in (_BUFFER, _BUFFER_TEXT):
            self.buffers.append(_buffer(cursor, has_sections, number == _BUFFER_TEXT))
        elif number == _TSC2NSEC:
            self.tsc_mult, self.tsc_shift = cursor.number(4), cursor.number(4)
        elif number == _TIME_SHIFT:
            self.shifts = list(_shifts(cursor))
        elif number in PARTS:
            self.parts[number] = cursor.number(8)
        elif number == _CPUCOUNT:
            self.n_cpus = min(cursor.number(4), MAX_CPUS)
        else:
            self._parse_text(number, data.partition(b"\0")[0].decode("utf-8", "replace"))

    def _parse_text(self, number: int, text: str) -> None:
        if number == _CPUSTAT:
            self.cpu_stats.append(text)
        elif number == _TRACECLOCK:
            self.clock, self.has_clock = clock_of(text) or self.clock, True
        elif number == _UNAME:
            self.uname = text
        elif number == _VERSION:
            self.version = text


def clock_of(text: str) -> str:
    """Return the clock in use, from the text of tracefs' ``trace_clock``; "" if none is marked.

    Example:
        >>> clock_of("local global [mono] boot")
        'mono'
    """
    found = re.search(r"\[([\w-]{1,40})\]", text)
    return found[1] if found else ""


def strtoll(text: bytes) -> int:
    """Parse a number as C's strtoll does with base 0; 0 if there is none."""
    found = _NUMBER.match(text)
    if found is None:
        return 0
    digits = found["digits"]
    is_octal = digits.startswith(b"0") and digits.isdigit() and digits.strip(b"01234567") == b""
    base = 16 if digits[:2].lower() == b"0x" else 8 if is_octal else 10
    value = int(digits, base)
    return -value if found["sign"] == b"-" else value


def _buffer(cursor: Cursor, has_sections: bool, is_text: bool) -> Buffer:
    at, name = cursor.number(8), cursor.text()
    if not has_sections:
        return Buffer(name, at)
    clock = cursor.text()
    if is_text:
        return Buffer(name, at, clock, is_text=True)
    page_size, n_cpus = cursor.number(4), cursor.number(4)
    cpus = []
    for _ in range(min(n_cpus, cursor.left // 20)):
        cpu, start, size = cursor.number(4), cursor.number(8), cursor.number(8)
        if cpu < MAX_CPUS:
            cpus.append(CpuData(cpu, start, size))
    return Buffer(name, at, clock, page_size, tuple(cpus))


def _shifts(cursor: Cursor) -> Iterator[Shift]:
    """Parse TIME_SHIFT: by CPU count, times, offsets, scalings; then the fractions of all CPUs."""
    cursor.take(8)
    interpolate = bool(cursor.number(4) & 1)  # TRACECMD_TSYNC_FLAG_INTERPOLATE
    n_cpus = cursor.number(4)
    rows = []
    for _ in range(min(n_cpus, MAX_CPUS)):
        n = cursor.number(4)
        if n > cursor.left // 24:
            raise CutShortError
        rows.append([[cursor.number(8) for _ in range(n)] for _ in range(3)])
    for times, offsets, scalings in rows:
        n = len(times)
        fractions = [cursor.number(8) for _ in range(n)] if cursor.left else [0] * n
        samples = list(zip(times, map(_signed, offsets), scalings, fractions, strict=True))
        # Of several corrections with the same time the first one is used.
        samples = sorted({sample[0]: sample for sample in reversed(samples)}.values())
        columns = tuple(zip(*samples, strict=True)) if samples else ((), (), (), ())
        yield Shift(interpolate, *columns)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Clock:
    """Conversion of timestamps to ns: a factor, if they count cycles, and an offset.

    The offset of TSC2NSEC is not applied, so that times equal those of trace-cmd report, which
    does not apply it either (lib/trace-cmd/trace-input.c, timestamp_calc).
    """

    mult: int = 0
    shift: int = 0
    offset_ns: int = 0

    @classmethod
    def of(cls, options: Options) -> Clock:
        """Return the conversion that the options of a trace.dat describe."""
        usable = options.tsc_shift < 64
        mult = options.tsc_mult if usable else 0
        return cls(mult, options.tsc_shift if usable else 0, options.offset_ns)

    def to_ns(self, timestamps: I64Array) -> I64Array:
        """Convert ``timestamps``, which must not be negative, to ns."""
        if not self.mult and not self.offset_ns:
            return timestamps
        scaled = timestamps.view(np.uint64)
        scaled = scaled if not self.mult else _scaled(scaled, self.mult, self.shift)
        if self.offset_ns:
            scaled = scaled + np.uint64(self.offset_ns & _MASK)
        ns: I64Array = (scaled if self.offset_ns else np.minimum(scaled, np.uint64(MAX_TIME))).view(
            np.int64
        )
        return ns

    def one(self, timestamp: int) -> int | None:
        """Convert a single timestamp to ns; None if it is negative, which means no timestamp."""
        return None if timestamp < 0 else int(self.to_ns(np.array([timestamp], np.int64))[0])


def _scaled(timestamps: U64Array, mult: int, shift: int) -> U64Array:
    """Return ``timestamps * mult >> shift``, keeping high bits (the kernel's mul_u64_u32_shr)."""
    low, high = timestamps & np.uint64(0xFFFF_FFFF), timestamps >> np.uint64(32)
    low_part = low * np.uint64(mult) >> np.uint64(shift)
    high_product = high * np.uint64(mult)
    high_part = (
        high_product << np.uint64(32 - shift)
        if shift <= 32
        else high_product >> np.uint64(shift - 32)
    )
    total: U64Array = low_part + high_part
    return total


def shifts_of(sources: Sequence[Shift | None]) -> Shifts:
    """Convert the clock corrections of all sources to arrays for ``loops.pages``."""
    each = [Shift(False, (), (), (), ()) if shift is None else shift for shift in sources]
    return (
        np.cumsum([0, *(len(shift.time) for shift in each)], dtype=np.int64),
        np.array([shift.interpolate for shift in each], np.int64),
        np.array([time for shift in each for time in shift.time], np.uint64),
        np.array([offset for shift in each for offset in shift.offset], np.int64),
        np.array([factor & _MASK for shift in each for factor in shift.scaling], np.uint64),
        np.array([min(bits, 63) for shift in each for bits in shift.fraction], np.uint64),
    )
