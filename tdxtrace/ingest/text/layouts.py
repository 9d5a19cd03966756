"""Where the columns of a line's head are, and reading them from many lines at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxtrace.ingest.raw import UNKNOWN, BoolArray, I32Array, I64Array, U64Array
from tdxtrace.ingest.source import SPARE_BYTES
from tdxtrace.ingest.text import bytewise
from tdxtrace.ingest.text.bytewise import At, Text, Words

# A name takes 16 columns, right-aligned ("%16s-%-7d" of the kernel, "%16s-%-5d" of
# trace-cmd, "%16s %5d" of perf): where it is longer or unpadded, a line goes the
# general way.
COMM_BYTES: Final = 16
_TID_BYTES: Final = 8
_TGID_BYTES: Final = 7
_HEAD: Final = re.compile(
    rb"^(?P<prefix>\S+:\s+)?(?P<comm>.{16})(?P<dash>[- ])(?P<tid>[ \d]{1,8}?)"
    rb"(?P<tgid>\((?:[ ]*\d+|-+)\) )?(?<= )\[\d\d\d\](?P<flags> [^\s:]{4,5}(?= ))?(?P<gap> *)"
    rb"(?P<seconds>\d{1,16})(?:\.(?P<part>\d{6}|\d{9}))?: ",
    re.DOTALL,
)
_U: Final = np.uint64
_8: Final = np.uint64(8)
_BLANKS: Final = np.uint64(0x2020202020202020)
_FROM: Final = ~np.uint64(0) << (np.arange(9, dtype=np.uint64) * _8)
"""Masks of the bytes of a word from the n-th on."""
_BILLION: Final = np.int64(1_000_000_000)
# Seconds whose nanoseconds fit 63 bits: 292 years.
_MAX_SECONDS: Final = 9_000_000_000


@dataclass(frozen=True, slots=True)
class Layout:
    """Columns of one kind of head, from the start of the line."""

    comm: int
    dash: int
    """Byte between name and thread: '-' in ftrace, ' ' in perf."""
    bracket: int
    """Column of the '[' before the CPU."""
    tgid: int | None
    """Column of the first digit or blank of the process, if it is printed."""
    flags: int
    """Number of flag characters; 0 if they are not printed."""
    stamp: int
    """Column of the stamp's first digit."""
    seconds: int
    """Digits before the point, or of the whole stamp."""
    part: int
    """Digits after the point: 6 or 9; 0 for an integer clock."""

    @property
    def event(self) -> int:
        """Column at which the event's name, or blanks before it, begin."""
        return self.stamp + self.seconds + (self.part + 1 if self.part else 0) + 2

    @property
    def words(self) -> int:
        """Words of a line that hold its head."""
        return self.event // 8 + 2

    @property
    def literals(self) -> dict[int, int]:
        """The bytes between the fields, by their columns."""
        found: dict[int, int] = {
            self.comm + COMM_BYTES: self.dash,
            self.bracket - 1: ord(" "),
            self.bracket: ord("["),
            self.bracket + 4: ord("]"),
            self.event - 2: ord(":"),
            self.event - 1: ord(" "),
        }
        if self.part:
            found[self.stamp + self.seconds] = ord(".")
        flags = range(self.bracket + 6, self.bracket + 6 + self.flags)
        blanks = [c for c in range(self.bracket + 5, self.stamp) if c not in flags]
        found |= dict.fromkeys(blanks, ord(" "))
        if self.tgid is not None:
            after = self.tgid + _TGID_BYTES
            found |= {self.tgid - 1: ord("("), after: ord(")"), after + 1: ord(" ")}
        return found


@dataclass(slots=True)
class Heads:
    """What the heads of some lines say; ``at`` is where their events begin."""

    rows: At
    at: At
    ts_ns: I64Array
    cpu: I32Array
    tid: I32Array
    tgid: I32Array
    flags: U64Array
    """The flag characters as a word; 0 where there are none."""
    comm: tuple[U64Array, U64Array]

    def take(self, good: BoolArray) -> Heads:
        """The heads where ``good``."""
        return Heads(
            self.rows[good],
            self.at[good],
            self.ts_ns[good],
            self.cpu[good],
            self.tid[good],
            self.tgid[good],
            self.flags[good],
            (self.comm[0][good], self.comm[1][good]),
        )


def layout_of(line: bytes) -> Layout | None:
    """Return the layout that ``line`` has, if its columns are of the fixed kind."""
    found = _HEAD.match(line)
    if found is None or (found["flags"] and found["dash"] == b" "):
        return None
    tgid = found.start("tgid") + 1 if found["tgid"] else None
    made = Layout(
        found.start("comm"),
        found["dash"][0],
        found.end("tgid") if found["tgid"] else found.end("tid"),
        tgid,
        len(found["flags"]) - 1 if found["flags"] else 0,
        found.start("seconds"),
        len(found["seconds"]),
        len(found["part"] or b""),
    )
    fits = found.end("tid") - found.start("tid") <= _TID_BYTES
    fits &= found["tgid"] is None or len(found["tgid"]) == _TGID_BYTES + 3
    return made if fits and 8 * made.words <= SPARE_BYTES else None


def read_heads(text: Text, rows: At, layout: Layout) -> Heads:
    """Read the heads of those of ``rows`` that fit ``layout`` in every byte."""
    whole = text.ends[rows] > text.starts[rows] + layout.event
    rows = rows if whole.all() else rows[whole]
    start = text.starts[rows]
    head = text.load(start, layout.words)
    good = _literals(head, layout)
    cpu, is_cpu = bytewise.decimal(head, layout.bracket + 1, 3)
    tid, is_tid = _thread(head, layout)
    tgid, is_tgid = _process(head, layout)
    ts_ns, is_stamp = _stamp(head, layout)
    good &= is_cpu & is_tid & is_tgid & is_stamp
    flags = np.zeros(len(rows), np.uint64)
    if layout.flags:
        flags = bytewise.first_bytes(bytewise.column(head, layout.bracket + 6), layout.flags)
    comm = (bytewise.column(head, layout.comm), bytewise.column(head, layout.comm + 8))
    at = start + layout.event
    heads = Heads(rows, at, ts_ns, cpu.astype(np.int32), tid, tgid, flags, comm)
    return heads if good.all() else heads.take(good)


def _literals(head: Words, layout: Layout) -> BoolArray:
    """Whether all that is between the fields is as in the layout."""
    good = np.ones(head.shape[1], np.bool_)
    for index, word in enumerate(head):
        mine = {c - 8 * index: byte for c, byte in layout.literals.items() if c // 8 == index}
        mask = sum(0xFF << 8 * place for place in mine)
        if mask:
            value = sum(byte << 8 * place for place, byte in mine.items())
            good &= (word & _U(mask)) == _U(value)
    return good


def _thread(head: Words, layout: Layout) -> tuple[I32Array, BoolArray]:
    """The thread's number: digits with blanks before or after, nothing else."""
    begin = layout.comm + COMM_BYTES + 1
    width = (layout.bracket if layout.tgid is None else layout.tgid - 1) - begin
    # What lies behind the columns reads as blank.
    beyond = _BLANKS & ~_U((1 << 8 * width) - 1)
    word = bytewise.first_bytes(bytewise.column(head, begin), width) | beyond
    if layout.dash == ord(" "):
        before = bytewise.spaces(word)
        word = (word >> (before * _8)) | (_BLANKS << (_U(64) - before * _8))
    n = bytewise.digits(word)
    good = (n > 0) & ((word & _FROM[n]) == (_BLANKS & _FROM[n]))
    return bytewise.eight_digits(word, n).astype(np.int32), good


def _process(head: Words, layout: Layout) -> tuple[I32Array, BoolArray]:
    """The process's number: seven columns, right-aligned, or dashes if unknown."""
    n_rows = head.shape[1]
    if layout.tgid is None:
        return np.full(n_rows, UNKNOWN, np.int32), np.ones(n_rows, np.bool_)
    word = bytewise.first_bytes(bytewise.column(head, layout.tgid), _TGID_BYTES)
    unknown = word == _U(int.from_bytes(b"-" * _TGID_BYTES, "little"))
    before = bytewise.spaces(word)
    number = word >> (before * _8)
    n = bytewise.digits(number)
    good = unknown | ((n > 0) & (before + n == _TGID_BYTES))
    value = bytewise.eight_digits(number, n).astype(np.int32)
    return np.where(unknown, np.int32(UNKNOWN), value), good


def _stamp(head: Words, layout: Layout) -> tuple[I64Array, BoolArray]:
    """The time in ns, or in ticks of an integer clock."""
    whole, good = bytewise.decimal(head, layout.stamp, layout.seconds)
    ts = whole.astype(np.int64)
    if not layout.part:
        return ts, good
    part, is_part = bytewise.decimal(head, layout.stamp + layout.seconds + 1, layout.part)
    scale = np.int64(10 ** (9 - layout.part))
    good &= is_part & (whole < _MAX_SECONDS)
    return ts * _BILLION + part.astype(np.int64) * scale, good
