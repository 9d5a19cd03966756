"""Patterns that the loop reads lines by: columns of prefixes, and trees of event arguments.

A pattern is learned from one line and the result of the line-at-a-time reader for it.  Before a
pattern is used, the line-at-a-time reader checks what it assumes about other lines: it reads the
same line with other names and numbers substituted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np

from tdxtrace.compiler import interpreted
from tdxtrace.ingest.batch import SLOTS, FieldLayouts, U64Array
from tdxtrace.ingest.events.fields import Decoder, Fields
from tdxtrace.ingest.events.registry import role_of
from tdxtrace.ingest.loops import lines
from tdxtrace.ingest.loops.lines import LinePatterns
from tdxtrace.ingest.text.line_formats import UNITS, LinePrefix

# Limits with room for what one capture has: a few prefixes, as timestamps and threads get more
# digits over time; a pattern for each exit reason of kvm_exit.
_MAX_PREFIXES: Final = 16
_MAX_CHECKED: Final = 256
_MAX_FLAGS: Final = 1024
_MAX_NAMES: Final = 4096
_MAX_PATTERNS: Final = 96
# Longer prefixes and arguments are left to the line-at-a-time reader.
_MAX_PREFIX_BYTES: Final = 160
_MAX_ARGUMENT_BYTES: Final = 512
_COMM_BYTES: Final = 16
_MAX_FLAG_BYTES: Final = 7
_INT64_MAX: Final = (1 << 63) - 1
_NUMBERS: Final = {"tid": lines.TID, "tgid": lines.TGID, "cpu": lines.CPU, "frac": lines.PART}
# Thread names that could be misread without fixed columns; the loop leaves other ambiguous names
# to the line-at-a-time reader: see lines.find_thread.
_NAMES: Final = (
    *("a", "a-1", "a 1", "1", "-", "a:b", "[0]", "a-1 [0]", "1/2", "a (1)", "1.5", "d..1"),
    *("abcd", "a abcd"),
)
_U64_MASK: Final = (1 << 64) - 1
_HEX: Final = re.compile(r"[0-9a-f]{1,16}")
# Sixteen digits would be bare hexadecimal: fields.to_word.
_DECIMAL: Final = re.compile(r"[0-9]{1,15}")
_WORD: Final = re.compile(r"\w", re.ASCII)
_CHUNK: Final = re.compile(rb"[^ =(]{0,7}[ =(]|.{1,8}", re.DOTALL)


class Digits(NamedTuple):
    """A number in arguments: its kind (lines.HEX, DECIMAL or SKIPPED) and the slot it fills."""

    kind: np.uint64
    slot: str | None


class End(NamedTuple):
    """The end of arguments: event ID, layout of the fields, and values of constant fields."""

    event: int
    layout: int
    constants: tuple[int, ...]


Token = bytes | Digits | End
Tree = dict[Token, "Tree"]


@dataclass(frozen=True, slots=True)
class ColumnSpan:
    """Columns of a name or number: start, end, and the side on which blanks may pad it."""

    start: int
    end: int
    blanks: int = lines.NO_BLANKS

    def put(self, line: str, text: str) -> str:
        """Return the line with ``text`` in these columns, padded to their width."""
        width = self.end - self.start
        shown = text.rjust(width) if self.blanks == lines.BLANKS_BEFORE else text.ljust(width)
        return line[: self.start] + shown + line[self.end :]


@dataclass(frozen=True, slots=True)
class PrefixColumns:
    """Positions of the parts of one kind of prefix, in columns from the start of the line."""

    numbers: tuple[tuple[int, ColumnSpan], ...]
    """Pairs of a column of lines.LinePatterns.prefixes and the span of the number."""
    comm: ColumnSpan
    flags: ColumnSpan
    event: int
    literals: tuple[tuple[int, int], ...]
    """Fixed text between these parts: pairs of a column and its byte."""
    whole_ns: int
    """Unit, in ns, of the number before the point of the timestamp."""
    digits: int
    """Number of digits of the timestamp below one second."""

    def row(self) -> list[int]:
        """Return the row of lines.LinePatterns.prefixes."""
        made = [0] * lines.PREFIX_COLUMNS
        made[lines.EVENT_AT] = self.event
        made[lines.COMM_AT], made[lines.FLAGS_AT] = self.comm.start, self.flags.start
        n_comm = self.comm.end - self.comm.start
        made[lines.COMM_MASK_1] = (1 << 8 * min(n_comm, 8)) - 1
        made[lines.COMM_MASK_2] = (1 << 8 * max(n_comm - 8, 0)) - 1
        made[lines.FLAGS_MASK] = (1 << 8 * (self.flags.end - self.flags.start)) - 1
        for column, cell in self.numbers:
            made[column : column + 3] = cell.start, cell.end - cell.start, cell.blanks
        made[lines.WHOLE_NS] = self.whole_ns
        n_part = made[lines.PART + 1]
        made[lines.PART_NS] = self.whole_ns // 10**n_part
        made[lines.MAX_WHOLE] = _INT64_MAX // self.whole_ns
        words = self._literal_words()
        made[lines.N_LITERALS] = len(words)
        made[lines.LITERALS :] = [number for word in words for number in word]
        return made + [0] * (lines.PREFIX_COLUMNS - len(made))

    def _literal_words(self) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        for column, byte in self.literals:
            if not found or column >= found[-1][0] + 8:
                found.append((column, 0, 0))
            first, value, mask = found[-1]
            shift = 8 * (column - first)
            found[-1] = first, value | byte << shift, mask | 0xFF << shift
        return found

    @property
    def fits(self) -> bool:
        """Whether the prefix is within the limits of the loop."""
        is_word = self.flags.end - self.flags.start <= _MAX_FLAG_BYTES
        return is_word and len(self._literal_words()) <= lines.MAX_LITERALS


def columns_of(line: str, found: re.Match[str], prefix: LinePrefix) -> PrefixColumns | None:
    """Return the columns of a line's prefix; None if the loop cannot read it.

    Args:
        line: The line.
        found: The match of its prefix: see line_formats for the names of groups.
        prefix: The fields that were read from it.
    """
    groups = {name: text for name, text in found.groupdict().items() if text is not None}
    unit = next((name for name in UNITS if name in groups), None)
    event = len(line[: found.start("rest")].rstrip(" ")) + 1
    digits = len(groups.get("frac", ""))
    if unit is None or event > found.start("rest") or event > _MAX_PREFIX_BYTES or digits > 9:
        return None
    names = {**_NUMBERS, unit: lines.WHOLE}
    numbers: list[tuple[int, ColumnSpan]] = []
    comm = flags = ColumnSpan(0, 0)
    taken = 0
    for start, end, name in sorted((*found.span(name), name) for name in groups):
        cell: ColumnSpan | None = ColumnSpan(start, end)
        if name in names and groups[name].isdigit():
            cell = _number_cell(line, start, end, taken, name)
            numbers += [] if cell is None else [(names[name], cell)]
        elif name in {"comm", "task", "short"}:
            cell = _comm_cell(line, end, taken, prefix.comm)
            comm = cell or comm
        elif name == "flags":
            flags = ColumnSpan(start, end)
        if cell is None:
            return None
        taken = cell.end
    cells = [comm, flags, *(cell for _, cell in numbers)]
    between = set(range(event)) - {c for cell in cells for c in range(cell.start, cell.end)}
    made = PrefixColumns(
        tuple(numbers),
        comm,
        flags,
        event,
        tuple((column, ord(line[column])) for column in sorted(between)),
        UNITS[unit] if digits or unit != "sec" else 1,
        digits + len(str(10**9 // UNITS[unit])) - 1,
    )
    return made if made.fits else None


def _number_cell(line: str, start: int, end: int, taken: int, name: str) -> ColumnSpan | None:
    """Return the columns of a number, with all blanks on one side but one, at most eight columns.

    Other numbers, and the fraction of a timestamp, keep their own columns; None if these are more
    than 16.
    """
    before, after = _blanks_around(line, start, end, taken)
    can_grow = end - start < 8 and name != "frac"
    if before > 1 and can_grow:
        return ColumnSpan(max(start - before + 1, end - 8), end, lines.BLANKS_BEFORE)
    if after > 1 and can_grow:
        return ColumnSpan(start, min(end + after - 1, start + 8), lines.BLANKS_AFTER)
    return ColumnSpan(start, end) if end - start <= 16 else None


def _comm_cell(line: str, end: int, taken: int, comm: str) -> ColumnSpan | None:
    """Return the columns of a name with the blanks before it, else after it, at most sixteen.

    None if the name is not where the match found it, or is longer.
    """
    end = len(line[:end].rstrip(" "))
    start = end - len(comm)
    if line[start:end] != comm or start < taken or end - start > _COMM_BYTES:
        return None
    before, after = _blanks_around(line, start, end, taken)
    if after > 1 and before < 2:
        return ColumnSpan(start, min(end + after - 1, start + _COMM_BYTES), lines.BLANKS_AFTER)
    first = start - before
    return ColumnSpan(max(first + (first > 0), end - _COMM_BYTES), end, lines.BLANKS_BEFORE)


def _blanks_around(line: str, start: int, end: int, taken: int) -> tuple[int, int]:
    """Return the number of blanks before a span, down to column ``taken``, and after it."""
    before = start - max(taken, len(line[:start].rstrip(" ")))
    return before, len(line[end:]) - len(line[end:].lstrip(" "))


@dataclass(slots=True)
class _Name:
    """Patterns of one event name: an event without rows, or a tree of argument patterns."""

    event: int = 0
    has_parenthesis: bool = False
    tree: Tree = field(default_factory=dict)
    n_patterns: int = 0


@dataclass(slots=True)
class PatternCache:
    """Patterns learned from the lines of one source; grows while reading."""

    read_prefix: Callable[[str], LinePrefix | None]
    """Reads the prefix of a line: the line-at-a-time reader's method."""
    layouts: FieldLayouts
    prefixes: dict[PrefixColumns, int] = field(default_factory=dict)
    version: int = 0
    """Number of patterns, names and flags learned so far."""
    _checked: dict[PrefixColumns, bool] = field(default_factory=dict)
    """Whether the check of these columns by the line-at-a-time reader succeeded."""
    _flags: dict[tuple[int, str], int] = field(default_factory=dict)
    _names: dict[bytes, _Name] = field(default_factory=dict)
    _packed: tuple[int, LinePatterns] | None = None

    def add_prefix(self, line: str, found: re.Match[str], prefix: LinePrefix, in_irq: int) -> bool:
        """Learn the prefix of a line; return whether the loop can read it."""
        columns = columns_of(line, found, prefix)
        if columns is None or line.startswith((">", "#")):
            return False
        if columns not in self.prefixes:
            if len(self.prefixes) >= _MAX_PREFIXES or len(self._checked) >= _MAX_CHECKED:
                return False
            if columns not in self._checked:
                self._checked[columns] = self._passes_check(line, columns, prefix)
            if not self._checked[columns]:
                return False
            self.prefixes[columns] = len(self.prefixes)
            self.version += 1
        key = self.prefixes[columns], prefix.flags
        if key not in self._flags and len(self._flags) < _MAX_FLAGS:
            self._flags[key] = in_irq
            self.version += 1
        return key in self._flags

    def _passes_check(self, line: str, columns: PrefixColumns, prefix: LinePrefix) -> bool:
        """Return whether the line-at-a-time reader agrees for other names and numbers there."""
        comm = columns.comm
        width = comm.end - comm.start
        names = [prefix.comm, "x" * width, *(name for name in _NAMES if len(name) <= width)]
        for name in names if width else [prefix.comm]:
            for is_wide in (False, True):
                text = comm.put(line, name)
                read: dict[int, int] = {}
                for column, cell in columns.numbers:
                    shown = "3" if cell.blanks and not is_wide else "3" * (cell.end - cell.start)
                    text = cell.put(text, shown)
                    read[column] = int(shown)
                whole, part = read.get(lines.WHOLE, 0), read.get(lines.PART, 0)
                n_part = next((c.end - c.start for k, c in columns.numbers if k == lines.PART), 0)
                ts_ns = whole * columns.whole_ns + part * (columns.whole_ns // 10**n_part)
                expected = prefix._replace(
                    comm=name,
                    tid=read.get(lines.TID, prefix.tid),
                    tgid=read.get(lines.TGID, prefix.tgid),
                    cpu=read.get(lines.CPU, prefix.cpu),
                )
                made = self.read_prefix(text)
                if made is None or made.ts_ns != ts_ns or made._replace(ts=prefix.ts) != expected:
                    return False
        return True

    def add_name(self, name: str, event: int, args: str) -> None:
        """Learn the name of an event without rows; of ``args`` only an initial "(" matters."""
        key = name.encode("latin-1") + b":"
        if key not in self._names and self._has_room_for(key):
            self._names[key] = _Name(event, args.startswith("("))
            self.version += 1

    def add_arguments(
        self, name: str, event: int, args: str, fields: Fields, decode: Decoder
    ) -> None:
        """Learn a pattern of the arguments of an event.

        Args:
            name: Name of the event.
            event: Its ID in the registry.
            args: The arguments: the text after the name.
            fields: Fields that were read from them.
            decode: Decoder that read them.
        """
        key = name.encode("latin-1") + b":"
        known = self._names.get(key) or _Name()
        is_full = known.n_patterns >= _MAX_PATTERNS or not self._has_room_for(key)
        if is_full or len(args) > _MAX_ARGUMENT_BYTES:
            return
        tokens = arguments_of(args, fields, decode)
        if tokens is None:
            return
        slots = [token.slot for token in tokens if isinstance(token, Digits) and token.slot]
        constants = {s: v for s, v in fields.values.items() if s in SLOTS and s not in fields.spans}
        layout = self.layouts.intern([*slots, *constants])
        tree = known.tree
        is_new = False
        for token in (*tokens, End(event, layout, tuple(constants.values()))):
            is_new |= token not in tree
            tree = tree.setdefault(token, {})
        known.n_patterns += is_new
        self.version += is_new
        self._names[key] = known

    def _has_room_for(self, name: bytes) -> bool:
        """Return whether the loop can match a name (with its colon) and the table has room."""
        is_word = len(name) < 8 * lines.MAX_NAME_WORDS and min(name) > ord(" ")
        return is_word and (name in self._names or len(self._names) < _MAX_NAMES)

    def packed(self) -> LinePatterns:
        """Return all patterns as arrays for the loop; arrays returned earlier stay unchanged."""
        if self._packed is None or self._packed[0] != self.version:
            self._packed = self.version, self._pack()
        return self._packed[1]

    def _pack(self) -> LinePatterns:
        nodes = [0]
        roots = {}
        for key, name in self._names.items():
            roots[key] = len(nodes) if name.tree else 0
            nodes += _nodes(name.tree, len(nodes), self.layouts)
        flags = {
            prefix << 56 | int.from_bytes(text.encode("latin-1"), "little"): in_irq + 2
            for (prefix, text), in_irq in self._flags.items()
        }
        rows = [columns.row() for columns in self.prefixes]
        shape = -1, lines.PREFIX_COLUMNS
        return LinePatterns(
            np.array(rows, np.uint64).reshape(shape),
            _flags_table(flags),
            self._names_table(roots),
            np.array(nodes, np.uint64),
        )

    def _names_table(self, roots: Mapping[bytes, int]) -> U64Array:
        table = np.zeros((_table_size(len(roots)), lines.NAME_COLUMNS), np.uint64)
        for key, name in self._names.items():
            slot = (_name_key(key) >> 32) & (len(table) - 1)
            while table[slot, lines.NAME_SIZE]:
                slot = (slot + 1) % len(table)
            row = len(key), name.event, roots[key], name.has_parenthesis
            table[slot, : lines.NAME_WORDS] = row
            words = _words(key)
            table[slot, lines.NAME_WORDS : lines.NAME_WORDS + len(words)] = words
        return table


@dataclass(frozen=True, slots=True)
class _Number:
    """Digits in arguments: first and end offset, and the slot they fill; None if unused."""

    start: int
    end: int
    is_hex: bool
    slot: str | None

    @property
    def token(self) -> Token:
        """The token of the argument tree for this number."""
        if self.slot not in SLOTS:
            return Digits(lines.SKIPPED, None)
        return Digits(lines.HEX if self.is_hex else lines.DECIMAL, self.slot)


def arguments_of(args: str, fields: Fields, decode: Decoder) -> list[Token] | None:
    """Return a pattern of arguments: literal bytes, and numbers that may differ between lines.

    Returns:
        The tokens; None if a number is written in a way that is ambiguous in other lines (bare
        hexadecimal, signed or upper case), or if other numbers would give other fields.
    """
    numbers: list[_Number] = []
    spans: dict[tuple[int, int], str | None] = dict.fromkeys(fields.unread(args))
    spans |= {span: slot for slot, span in fields.spans.items()}
    done = 0
    for (start, end), slot in sorted(spans.items(), key=lambda item: item[0]):
        digits = args[start:end].removeprefix("0x")
        is_hex = slot is None or slot in fields.hexadecimal or len(digits) < end - start
        is_number = (_HEX if is_hex else _DECIMAL).fullmatch(digits) is not None
        if start < done or not is_number or _WORD.match(args, end):
            return None
        # Hexadecimal digits at the end of a word, such as "add)", are no number.
        if slot is not None or not _WORD.match(args, max(start - 1, 0), start):
            numbers.append(_Number(end - len(digits), end, is_hex, slot))
            done = end
    for hexadecimal, decimal in (("5", "3"), ("b" * 16, "7" * 15)):
        if not _is_read(args, fields, decode, numbers, hexadecimal, decimal):
            return None
    made: list[Token] = []
    done = 0
    for number in numbers:
        made += _chunks(args[done : number.start])
        made.append(number.token)
        done = number.end
    return [*made, *_chunks(args[done:])]


def _is_read(
    args: str,
    fields: Fields,
    decode: Decoder,
    numbers: Sequence[_Number],
    hexadecimal: str,
    decimal: str,
) -> bool:
    """Return whether arguments with these numbers give the same fields, with these values."""
    text, done, expected = "", 0, dict(fields.values)
    for number in numbers:
        digits = hexadecimal if number.is_hex else decimal
        text, done = text + args[done : number.start] + digits, number.end
        if number.slot is not None:
            expected[number.slot] = int(digits, 16 if number.is_hex else 10)
    text += args[done:]
    return decode(text).values == expected and role_of(text) == role_of(args)


def _chunks(text: str) -> list[Token]:
    """Split the text between numbers into tokens; text common to two lines is split alike."""
    return list(_CHUNK.findall(text.encode("latin-1")))


def _nodes(tree: Tree, at: int, layouts: FieldLayouts) -> list[int]:
    """Return the nodes of a tree for lines.read_arguments; the first one gets index ``at``."""
    made: list[int] = []
    previous: int | None = None
    # Longer literals first, numbers last: the loop takes the first branch that matches, and a
    # literal may begin with a shorter one or with digits.
    for token in sorted(tree, key=lambda t: -len(t) if isinstance(t, bytes) else 0):
        if previous is not None:
            made[previous + 1] = at + len(made)
        previous, subtree = len(made), tree[token]
        if isinstance(token, bytes):
            text = token
            while len(subtree) == 1 and isinstance(more := next(iter(subtree)), bytes):
                text, subtree = text + more, subtree[more]
            mask = (1 << 8 * ((len(text) - 1) % 8 + 1)) - 1
            made += [int(lines.LITERAL), 0, len(text), mask, *_words(text)]
        elif isinstance(token, Digits):
            made += [int(token.kind), 0]
        else:
            n_words = len(layouts.slots[token.layout])
            made += [int(lines.END), 0, token.event, token.layout, n_words, *token.constants]
        made += _nodes(subtree, at + len(made), layouts)
    return made


def _flags_table(flags: Mapping[int, int]) -> U64Array:
    table = np.zeros((_table_size(len(flags)), 2), np.uint64)
    for key, meaning in flags.items():
        slot = ((key * int(lines.MIX) & _U64_MASK) >> 32) & (len(table) - 1)
        while table[slot, 1]:
            slot = (slot + 1) % len(table)
        table[slot] = key, meaning
    return table


def _table_size(n: int) -> int:
    """Return the size of a hash table for ``n`` entries: a power of two, less than half full."""
    return 1 << (2 * n).bit_length()


@lru_cache(maxsize=4096)
def _name_key(name: bytes) -> int:
    """Return the hash of a name, as the loop computes it."""
    text = np.frombuffer(name.ljust(8 * lines.MAX_NAME_WORDS + 8), np.uint8)
    words: U64Array = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))
    return int(interpreted(lines.name_key)(words, np.uint64(0))[0])


def _words(text: bytes) -> list[int]:
    """Return the little-endian u64 words of a text, padded with zeros."""
    whole = text + bytes(-len(text) % 8)
    return [int.from_bytes(whole[at : at + 8], "little") for at in range(0, len(whole), 8)]
