"""Many lines at once: reads those that look like lines the general path has read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.raw import BoolArray, I32Array, I64Array, RawEvents, U64Array, concatenate
from tdxtrace.ingest.source import SPARE_BYTES
from tdxtrace.ingest.text.bytewise import At, Text
from tdxtrace.ingest.text.knowledge import Knowledge
from tdxtrace.ingest.text.layouts import Heads, read_heads

_ODD: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Met:
    """Threads of some lines, and the two words of 16 columns with their names."""

    tid: I32Array
    tgid: I32Array
    first: U64Array
    second: U64Array

    def keys(self) -> U64Array:
        """A hash of each."""
        numbers = self.tid.astype(np.uint64) ^ (self.tgid.astype(np.uint64) << np.uint64(32))
        names: U64Array = self.second * _ODD
        return names ^ self.first ^ numbers

    def take(self, index: At | BoolArray) -> Met:
        """Those at ``index``, in that order."""
        return Met(self.tid[index], self.tgid[index], self.first[index], self.second[index])


@dataclass(slots=True)
class Parsed:
    """What the fast path made of some lines of a block; rows count from 0 within it."""

    events: RawEvents
    """Events with fields, ``line`` being the row."""
    met: Met
    """Threads of these events, again and again, but seldom that of the line before."""
    rows: At
    """Every line that was read; ``cpu`` and ``ts_ns`` go with it."""
    cpu: I32Array
    ts_ns: I64Array
    left: At
    """The lines that were not."""
    counts: list[tuple[int, int, int]]
    """Of each event that was read: which, its lines and the row of the first of them."""
    heard: list[tuple[int, int, int]] | None = None
    """CPUs, from when to when they were heard of; None: not looked for."""
    digits: frozenset[int] = frozenset()
    """Digits after the point of its stamps: 9, 6, or 0 for an integer clock."""


@dataclass(slots=True)
class _Part:
    """What was read in one layout."""

    events: RawEvents
    comm: tuple[U64Array, U64Array]
    rows: At
    event: I32Array
    cpu: I32Array
    ts_ns: I64Array


@dataclass(slots=True)
class _Fields:
    """Values of some rows by slot, filled event after event."""

    n: int
    values: dict[str, U64Array] = field(default_factory=dict)
    present: dict[str, BoolArray] = field(default_factory=dict)

    def put(self, at: At, slot: str, value: U64Array | int) -> None:
        """Set a field of the rows ``at``."""
        if slot not in self.values:
            self.values[slot] = np.zeros(self.n, np.uint64)
            self.present[slot] = np.zeros(self.n, np.bool_)
        self.values[slot][at] = value
        self.present[slot][at] = True


def parse(text: Text, knowledge: Knowledge, has_fields: BoolArray) -> Parsed:
    """Read the lines of a block that fit what is known in every byte.

    Args:
        text: The block.
        knowledge: What was learned so far.
        has_fields: For each event of the registry, whether its lines become rows.

    Returns:
        What was read, in the order of the lines.
    """
    left = np.ones(len(text), np.bool_)
    parts, digits = [], set()
    for layout in knowledge.layouts:
        rows = np.flatnonzero(left)
        if not len(rows):
            break
        part = _of_layout(text, knowledge, has_fields, read_heads(text, rows, layout))
        left[part.rows] = False
        parts.append(part)
        digits |= {layout.part} if len(part.rows) else set()
    made = _joined(parts)
    return Parsed(
        made.events,
        _met(made),
        made.rows,
        made.cpu,
        made.ts_ns,
        np.flatnonzero(left),
        _counts(made),
        digits=frozenset(digits),
    )


def _met(made: _Part) -> Met:
    every = Met(made.events.tid, made.events.tgid, *made.comm)
    key = every.keys()
    # The same thread often comes again on the next line.
    changed = np.flatnonzero(key[1:] != key[:-1]) + 1
    return every.take(np.concatenate([np.zeros(min(len(key), 1), np.intp), changed]))


def _counts(made: _Part) -> list[tuple[int, int, int]]:
    counts = np.bincount(made.event)
    return [
        (event, int(counts[event]), int(made.rows[np.argmax(made.event == event)]))
        for event in np.flatnonzero(counts).tolist()
    ]


def _of_layout(text: Text, knowledge: Knowledge, has_fields: BoolArray, heads: Heads) -> _Part:
    in_irq, good = knowledge.in_irq(heads.flags)
    event, args = knowledge.events_of(text, heads.at)
    good &= event >= 0
    size = text.ends[heads.rows] - args + 1
    own = np.flatnonzero(good & has_fields[event])  # -1 is the last one, and not good
    fields = _Fields(len(own))
    matched = _fill(text, knowledge, event[own], args[own], size[own], fields)
    good[own[~matched]] = False
    # Most often every line was read: then nothing is copied.
    every = slice(None)
    kept = every if len(own) == len(event) and matched.all() else own[matched]
    mine = every if matched.all() else matched
    events = RawEvents(
        heads.rows[kept].astype(np.int64),
        heads.ts_ns[kept],
        heads.tid[kept],
        heads.tgid[kept],
        heads.cpu[kept],
        in_irq[kept],
        event[kept],
        {slot: column[mine] for slot, column in fields.values.items()},
        {slot: column[mine] for slot, column in fields.present.items()},
    )
    comm = (heads.comm[0][kept], heads.comm[1][kept])
    read = every if good.all() else good
    rows = heads.rows[read]
    return _Part(events, comm, rows, event[read], heads.cpu[read], heads.ts_ns[read])


def _fill(
    text: Text, knowledge: Knowledge, event: I32Array, args: At, size: At, fields: _Fields
) -> BoolArray:
    """Read the arguments of lines; return which of them fitted a shape of their event."""
    done = np.zeros(len(args), np.bool_)
    # Shapes have a length: lines of one event and one length have mostly one shape.
    size = np.minimum(size, SPARE_BYTES).astype(np.int32)
    key = event * np.int32(SPARE_BYTES + 1) + size
    order = np.argsort(
        key.astype(np.uint16) if key.max(initial=0) < 1 << 16 else key, kind="stable"
    )
    ordered = key[order]
    bounds = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(order)]
    for first, last in itertools.pairwise(bounds):
        rows = order[first:last]
        if not len(rows):
            continue
        kind = int(event[rows[0]]), int(size[rows[0]])
        for template in knowledge.templates.get(kind, ()):
            good, values = template.match(text, args[rows])
            every = bool(good.all())
            fitted = rows if every else rows[good]
            for slot, value in values.items():
                fields.put(fitted, slot, value if every else value[good])
            for slot, constant in template.constants:
                fields.put(fitted, slot, constant)
            done[fitted] = True
            if every:
                break
            rows = rows[~good]
    return done


def _joined(parts: list[_Part]) -> _Part:
    if len(parts) == 1:
        return parts[0]
    none = np.zeros(0, np.uint64)
    rows = np.concatenate([np.zeros(0, np.intp), *(p.rows for p in parts)])
    events = concatenate([p.events for p in parts])
    order, by_line = np.argsort(rows, kind="stable"), np.argsort(events.line, kind="stable")
    return _Part(
        events.take(by_line),
        (
            np.concatenate([none, *(p.comm[0] for p in parts)])[by_line],
            np.concatenate([none, *(p.comm[1] for p in parts)])[by_line],
        ),
        rows[order],
        np.concatenate([np.zeros(0, np.int32), *(p.event for p in parts)])[order],
        np.concatenate([np.zeros(0, np.int32), *(p.cpu for p in parts)])[order],
        np.concatenate([np.zeros(0, np.int64), *(p.ts_ns for p in parts)])[order],
    )
