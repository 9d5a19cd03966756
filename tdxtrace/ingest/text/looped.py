"""Many lines at once, as fast does it, with compiled loops: for large inputs only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.memory import roomy
from tdxtrace.ingest.raw import BoolArray, Index, RawEvents, U64Array
from tdxtrace.ingest.records.gather import PADDING
from tdxtrace.ingest.records.gather import Block as Records
from tdxtrace.ingest.records.loops import RecordFields, Table
from tdxtrace.ingest.source import SPARE_BYTES, Block
from tdxtrace.ingest.text import loops
from tdxtrace.ingest.text.bytewise import Text
from tdxtrace.ingest.text.fast import Met, Parsed
from tdxtrace.ingest.text.knowledge import Knowledge
from tdxtrace.ingest.text.layouts import Layout
from tdxtrace.ingest.text.templates import Template

# Room is made for lines that are no shorter than this on average: those of events are not.
_SHORT_LINE: Final = 48
_NONE: Final = (1 << 64) - 1
_MIX: Final = int(loops.MIX)

Number = TypeVar("Number", bound=np.integer)


@dataclass(frozen=True, slots=True)
class Packed:
    """What is known of lines, in one array, and what their fields are."""

    words: U64Array
    fields: Table
    """Where those of each event and set of slots are, once they are read."""
    parts: tuple[int, ...]
    """Of each layout of heads the digits after the point of its stamps."""
    n_events: int

    @property
    def n_words(self) -> int:
        """Words that the fields of a line take."""
        return int(self.words[int(loops.RECORD_WORDS)])


class Desk:
    """Memory to work in, for one block after the other."""

    def __init__(self, n_lines: int, n_words: int) -> None:
        """Make room for so many lines with so many words of fields each."""
        self.n_lines = n_lines
        self.notes = np.empty((loops.N_COLUMNS, n_lines), np.uint64)
        self.line, self.ts_ns = np.empty(n_lines, np.int64), np.empty(n_lines, np.int64)
        self.cpu, self.tid = np.empty(n_lines, np.int32), np.empty(n_lines, np.int32)
        self.tgid, self.event = np.empty(n_lines, np.int32), np.empty(n_lines, np.int32)
        self.in_irq, self.layout = np.empty(n_lines, np.int8), np.empty(n_lines, np.intp)
        self.values = np.zeros(n_lines * n_words + PADDING // 8, np.uint64)

    def has_room(self, n_lines: int, n_words: int) -> bool:
        """Whether so many lines fit."""
        return self.n_lines >= n_lines and len(self.values) >= n_lines * n_words + PADDING // 8

    def parse(
        self, words: U64Array, n_bytes: int, packed: Packed, sums: U64Array, *, may_end_in_cr: bool
    ) -> tuple[int, list[int]]:
        """Run the loop; return how it ended and how many lines there are of each sort."""
        heads = self.line, self.ts_ns, self.cpu, self.tid, self.tgid, self.in_irq, self.event
        into = self.notes, (*heads, self.layout), self.values, sums
        how, *sizes = loops.parse(words, np.uint64(n_bytes), may_end_in_cr, packed.words, into)
        return how, [int(size) for size in sizes]


def parse(
    block: Block, packed: Packed, desks: list[Desk], *, may_end_in_cr: bool
) -> tuple[Text, Parsed] | None:
    """Read the lines of a block that fit what is known in every byte.

    Args:
        block: Whole lines.
        packed: What is known.
        desks: Memory to work in, left there for the next block; none at first.
        may_end_in_cr: Whether not to read a block in which a line ends in a carriage return.

    Returns:
        Its lines and what was read, as fast.parse gives it; None if lines end in a carriage
        return, or are very short.
    """
    if not len(block) or block[-1] != ord("\n"):
        return None
    data = np.ndarray(len(block) + SPARE_BYTES, np.uint8, block.base)
    words: U64Array = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))
    n_lines = len(block) // _SHORT_LINE + 1
    try:
        desk = desks.pop()
    except IndexError:  # none, or another thread was quicker
        desk = Desk(0, 0)
    if not desk.has_room(n_lines, packed.n_words):
        desk = Desk(n_lines, packed.n_words)
    n_sums = max(loops.LEAST_SUMS, packed.n_events, len(packed.fields.size))
    sums = np.zeros((loops.N_SUMS, n_sums), np.uint64)
    sums[loops.FIRST_NS] = _NONE
    how, sizes = desk.parse(words, len(block), packed, sums, may_end_in_cr=may_end_in_cr)
    made = None
    if how == loops.DONE:
        text = Text(block, desk.notes[loops.END, : sizes[0]].astype(np.intp))
        made = text, _parsed(desk, sums, packed, sizes[1:])
    desks.append(desk)
    return made


def _parsed(desk: Desk, sums: U64Array, packed: Packed, sizes: list[int]) -> Parsed:
    """Take what was read off the desk."""
    n_read, n_own, n_left, n_met = sizes
    every = np.s_[:n_read]
    row, ts_ns = _taken(desk.line, every, n_read), _taken(desk.ts_ns, every, n_read)
    cpu = _taken(desk.cpu, every, n_read)
    # Most often every line that was read has fields.
    is_all = n_own == n_read
    own = every if is_all else desk.notes[loops.OWN, :n_own].astype(np.intp)
    events = RawEvents(
        row if is_all else _taken(row, own, n_own),
        ts_ns if is_all else _taken(ts_ns, own, n_own),
        _taken(desk.tid, own, n_own),
        _taken(desk.tgid, own, n_own),
        cpu if is_all else _taken(cpu, own, n_own),
        _taken(desk.in_irq, own, n_own),
        _taken(desk.event, own, n_own),
        kept=_fields(desk, packed, n_own, np.flatnonzero(sums[loops.HAS_FIELDS_OF])),
        has_room=True,
    )
    layouts = np.flatnonzero(sums[loops.HAS_LAYOUT]).tolist()
    return Parsed(
        events,
        _met(desk, desk.notes[loops.THREAD, :n_met].astype(np.intp)),
        row,
        cpu,
        ts_ns,
        desk.notes[loops.LEFT, :n_left].astype(np.intp),
        _counts(sums, row),
        _heard(sums),
        frozenset(packed.parts[layout] for layout in layouts),
    )


def _taken(column: NDArray[Number], which: Index | slice, n: int) -> NDArray[Number]:
    """Copy ``n`` entries of a column to where others fit before them."""
    made: NDArray[Number] = roomy(n, column.dtype)
    made[:] = column[which]
    return made


def _fields(desk: Desk, packed: Packed, n_own: int, met: Index) -> RecordFields:
    """The fields of lines that have them, as records behind one another, of layouts ``met``."""
    words = desk.values[: n_own * packed.n_words + PADDING // 8].copy()
    block = Records(words.view(np.uint8), "<")
    base, layout = roomy(n_own, np.intp), _taken(desk.layout, np.s_[:n_own], n_own)
    np.multiply(np.arange(n_own), 8 * packed.n_words, out=base)
    return RecordFields(block, block, base, layout, packed.fields, met, has_room=True)


def _met(desk: Desk, rows: Index) -> Met:
    """Threads that may be new."""
    names = desk.notes[loops.COMM_1][rows], desk.notes[loops.COMM_2][rows]
    return Met(desk.tid[rows], desk.tgid[rows], *names)


def _counts(sums: U64Array, row: Index) -> list[tuple[int, int, int]]:
    """Of each event that was read its number, its lines and the first of these."""
    events = np.flatnonzero(sums[loops.COUNT]).tolist()
    first = row[sums[loops.FIRST, events].astype(np.intp)].tolist()
    return list(zip(events, sums[loops.COUNT, events].tolist(), first, strict=True))


def _heard(sums: U64Array) -> list[tuple[int, int, int]]:
    """From when to when each CPU was heard of."""
    cpus = np.flatnonzero(sums[loops.FIRST_NS] != _NONE)
    first, last = sums[loops.FIRST_NS, cpus].tolist(), sums[loops.LAST_NS, cpus].tolist()
    return list(zip(cpus.tolist(), first, last, strict=True))


def packed(knowledge: Knowledge, has_fields: BoolArray) -> Packed:
    """Put what is known into one array, as loops.parse takes it."""
    kinds = {kind: group for kind, group in knowledge.templates.items() if group}
    layouts = _layouts(kinds)
    n_words = max((len(slots) for _, slots in layouts), default=0)
    words = [0] * int(loops.N_KNOWN)
    words[int(loops.N_HEADS)], words[int(loops.HEADS)] = len(knowledge.layouts), len(words)
    for layout in knowledge.layouts:
        words += _head(layout)
    words[int(loops.HAS_FIELDS)] = len(words)
    words += has_fields.tolist()
    groups = {}
    for (event, n_bytes), group in kinds.items():
        groups[event << 32 | n_bytes] = len(words)
        words.append(len(group))
        for shape in group:
            slots = _slots(shape)
            words += _shape(shape, slots, layouts[event, slots])
    words[int(loops.RECORD_WORDS)] = n_words
    words[int(loops.LONGEST)] = max((n_bytes for _, n_bytes in kinds), default=0)
    flags = {word: meaning + 1 for word, meaning in knowledge.flags.items()}
    begin = {key: event << 8 | args for key, (event, args) in knowledge.beginnings.items()}
    tables = {
        loops.FLAGS: flags,
        loops.BEGINNINGS: begin,
        loops.NAMES: knowledge.names,
        loops.SHAPES: groups,
    }
    for place, entries in tables.items():
        table = _table(entries)
        words[int(place) : int(place) + 2] = len(words), len(table) // 2 - 1
        words += table
    parts = tuple(layout.part for layout in knowledge.layouts)
    fields = _table_of(list(layouts), n_words)
    return Packed(np.array(words, np.uint64), fields, parts, len(has_fields))


def _slots(shape: Template) -> tuple[str, ...]:
    """What a shape fills, in the order in which it stands in records."""
    return tuple(sorted(set(shape.slots)))


def _layouts(
    kinds: Mapping[tuple[int, int], Sequence[Template]],
) -> dict[tuple[int, tuple[str, ...]], int]:
    """Number the layouts of records: there is one for each event and what it fills."""
    found = ((event, _slots(shape)) for (event, _), group in kinds.items() for shape in group)
    return {layout: n for n, layout in enumerate(dict.fromkeys(found))}


def _table_of(layouts: Sequence[tuple[int, tuple[str, ...]]], n_words: int) -> Table:
    """Say where in a record each slot is."""
    names = tuple(sorted({slot for _, slots in layouts for slot in slots}))
    shape = len(names), len(layouts)
    offset, bits = np.zeros(shape, np.intp), np.zeros(shape, np.uint64)
    for column, (_, slots) in enumerate(layouts):
        for k, slot in enumerate(slots):
            at = names.index(slot), column
            offset[at], bits[at] = 8 * k, 64
    size = np.full(len(layouts), 8 * n_words, np.intp)
    event = np.array([event for event, _ in layouts], np.intp)
    return Table(names, offset, bits, np.zeros(shape, np.bool_), size, event, is_printed=True)


def _head(layout: Layout) -> list[int]:
    """What loops know of a head."""
    literals = _literals(layout)
    is_dashed = layout.dash == ord("-")
    made = [0, layout.comm, layout.bracket, layout.tgid or 0, layout.flags, layout.stamp]
    made += [layout.seconds, layout.part, 10 ** (9 - layout.part), layout.event, is_dashed]
    made += [len(literals), *(number for word in literals for number in word)]
    made[0] = len(made)
    return made


def _literals(layout: Layout) -> list[tuple[int, int, int]]:
    """Words with all the literal bytes of a head: where they begin, values and masks."""
    found: list[tuple[int, int, int]] = []
    for column, byte in sorted(layout.literals.items()):
        if not found or column >= found[-1][0] + 8:
            found.append((column, 0, 0))
        first, value, mask = found[-1]
        shift = 8 * (column - first)
        found[-1] = first, value | byte << shift, mask | 0xFF << shift
    return found


def _shape(shape: Template, slots: tuple[str, ...], layout: int) -> list[int]:
    """What loops know of a shape: how much of each, the layout of its record, and all of it."""
    made = [len(shape.masks), len(shape.numbers), len(shape.constants), layout]
    for literal, mask in zip(shape.literals, shape.masks, strict=True):
        made += [int(literal), int(mask)]
    for number in shape.numbers:
        slot = _NONE if number.slot is None else slots.index(number.slot)
        made += [number.offset, number.n_digits, number.base == 16, slot]
    for name, value in shape.constants:
        made += [slots.index(name), value]
    return made


def _table(entries: Mapping[int, int]) -> list[int]:
    """Keys and values where loops._find looks for them: at most every second place is taken."""
    n = 2
    while n < 2 * len(entries):
        n *= 2
    made = [0, _NONE] * n
    for key, value in entries.items():
        place = (key * _MIX & _NONE) >> 32 & n - 1
        while made[2 * place + 1] != _NONE:
            place = place + 1 & n - 1
        made[2 * place : 2 * place + 2] = key, value
    return made
