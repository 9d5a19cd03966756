"""Many lines at once, as fast does it, with compiled loops: for large inputs only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxtrace.ingest.raw import BoolArray, Index, RawEvents, U64Array, Values
from tdxtrace.ingest.stream import SPARE_BYTES, Block
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
_MAX_SLOTS: Final = 64
_NO_ROOM: Final = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Packed:
    """What is known of lines, in one array, and the names of the slots."""

    words: U64Array
    slots: tuple[str, ...]
    parts: tuple[int, ...]
    """Of each layout the digits after the point of its stamps."""
    n_events: int


def parse(
    block: Block, packed: Packed, rooms: list[U64Array], *, may_end_in_cr: bool
) -> tuple[Text, Parsed] | None:
    """Read the lines of a block that fit what is known in every byte.

    Args:
        block: Whole lines.
        packed: What is known.
        rooms: Memory to work in, which is left there for the next block; none at first.
        may_end_in_cr: Whether not to read a block in which a line ends in a carriage return.

    Returns:
        Its lines and what was read, as fast.parse gives it; or None if this cannot be done
        here: where lines end in a carriage return, or are very short.
    """
    if not len(block) or block[-1] != ord("\n"):
        return None
    data = np.ndarray(len(block) + SPARE_BYTES, np.uint8, block.base)
    words: U64Array = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))
    shape = loops.N_COLUMNS + len(packed.slots), len(block) // _SHORT_LINE + 1
    room = rooms.pop() if rooms else _NO_ROOM
    if len(room) < shape[0] * shape[1]:
        room = np.empty(shape[0] * shape[1], np.uint64)
    rows = room[: shape[0] * shape[1]].reshape(shape)
    sums = np.zeros((loops.N_SUMS, max(loops.LEAST_SUMS, packed.n_events)), np.uint64)
    sums[loops.FIRST_NS] = _NONE
    how, *sizes = loops.parse(words, np.uint64(len(block)), may_end_in_cr, packed.words, rows, sums)
    made = None
    if how == loops.DONE:
        text = Text(block, rows[loops.END, : int(sizes[0])].astype(np.intp))
        made = text, _parsed(rows, sums, packed, [int(size) for size in sizes[1:]])
    rooms.append(room)
    return made


def _parsed(rows: U64Array, sums: U64Array, packed: Packed, sizes: list[int]) -> Parsed:
    """Take what was read out of the room it is in."""
    n_read, n_own, n_left, n_met = sizes
    read, fields = rows[:, :n_read], rows[:, :n_own]
    row, ts_ns = read[loops.ROW].astype(np.intp), read[loops.TS_NS].astype(np.int64)
    cpu, event = read[loops.CPU].astype(np.int32), read[loops.EVENT].astype(np.int32)
    # Most often every line that was read has fields: then nothing is copied again.
    own = slice(None) if n_own == n_read else fields[loops.OWN].astype(np.intp)
    events = RawEvents(
        row[own],
        ts_ns[own],
        read[loops.TID][own].astype(np.int32),
        read[loops.TGID][own].astype(np.int32),
        cpu[own],
        read[loops.IN_IRQ][own].astype(np.int8),
        event[own],
        *_fields(fields, packed.slots),
    )
    layouts = np.flatnonzero(sums[loops.HAS_LAYOUT]).tolist()
    return Parsed(
        events,
        _met(read, rows[loops.THREAD, :n_met].astype(np.intp)),
        row,
        cpu,
        ts_ns,
        rows[loops.LEFT, :n_left].astype(np.intp),
        _counts(sums, row),
        _heard(sums),
        frozenset(packed.parts[layout] for layout in layouts),
    )


def _fields(fields: U64Array, slots: tuple[str, ...]) -> Values:
    """Fields of events, by slot."""
    seen = fields[loops.SEEN]
    anywhere = int(np.bitwise_or.reduce(seen))
    everywhere = int(np.bitwise_and.reduce(seen)) if len(seen) else 0
    values: dict[str, U64Array] = {}
    present: dict[str, BoolArray] = {}
    for k, slot in enumerate(slots):
        if anywhere >> k & 1:
            is_all = everywhere >> k & 1
            values[slot] = fields[loops.N_COLUMNS + k].copy()
            present[slot] = np.ones(len(seen), np.bool_) if is_all else _bit(seen, k)
    return values, present


def _bit(words: U64Array, n: int) -> BoolArray:
    made: BoolArray = (words & np.uint64(1 << n)) != 0
    return made


def _met(read: U64Array, rows: Index) -> Met:
    """Threads that may be new."""
    return Met(
        read[loops.TID][rows].astype(np.int32),
        read[loops.TGID][rows].astype(np.int32),
        read[loops.COMM_1][rows],
        read[loops.COMM_2][rows],
    )


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


def packed(knowledge: Knowledge, has_fields: BoolArray) -> Packed | None:
    """Put what is known into one array, as loops.parse takes it.

    Returns:
        None if it is more than fits there, which no trace has taught.
    """
    kinds = {kind: group for kind, group in knowledge.templates.items() if group}
    shapes = [shape for group in kinds.values() for shape in group]
    slots = tuple(sorted({slot for shape in shapes for slot in shape.slots}))
    if len(slots) > _MAX_SLOTS:
        return None
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
            words += _shape(shape, slots)
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
    return Packed(np.array(words, np.uint64), slots, parts, len(has_fields))


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


def _shape(shape: Template, slots: tuple[str, ...]) -> list[int]:
    """What loops know of a shape: how much of each, a bit for each slot, and all of it."""
    seen = sum(1 << slots.index(slot) for slot in set(shape.slots))
    made = [len(shape.masks), len(shape.numbers), len(shape.constants), seen]
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
