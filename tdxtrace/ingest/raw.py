"""What every reader hands to the decoder: events in columns, not yet paired."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.memory import ROOM, behind

U64Array = NDArray[np.uint64]
I64Array = NDArray[np.int64]
I32Array = NDArray[np.int32]
I8Array = NDArray[np.int8]
BoolArray = NDArray[np.bool_]
Index = NDArray[np.intp]
Words = tuple[U64Array, BoolArray]
"""Values, and where each was seen."""
Values = tuple[dict[str, U64Array], dict[str, BoolArray]]
"""Values by slot, and where each was seen."""

# What a reader writes where the input does not say: no thread, CPU or process
# has a negative number, and the tables turn it into null.
UNKNOWN = -1
# Events of which so many come at once are decoded at once, and need not be copied before:
# fewer would hold the memory of many that are none of ours.
MANY_EVENTS = 1 << 15
_MOST_PARTS = 16


class Fields(Protocol):
    """The fields of some events, wherever they are kept."""

    def __len__(self) -> int:
        """Events they are of."""

    def names(self) -> frozenset[str]:
        """The slots that any of the events may have."""

    def pick(self, at: Index | BoolArray) -> Fields:
        """The fields of the events at ``at``, in that order."""

    def get(self, name: str) -> Words:
        """Return a slot that is among :meth:`names`."""

    def settle(self) -> Values:
        """Return all of them as arrays, which need nothing else to be kept."""


@runtime_checkable
class Apart(Fields, Protocol):
    """Fields that can be taken out of what they were recorded in, and be put together again."""

    def apart(self) -> Fields:
        """The same fields, which need nothing else to be kept."""

    def after(self, first: Fields) -> Fields | None:
        """These behind others; None if those are none that were taken out."""


@dataclass(slots=True)
class RawEvents:
    """Events that became, or will become, rows: one entry per line or record.

    ``values`` holds the fields that were read, by slot name (``gpa``, ``status``,
    ``vcpu_id``…) as unsigned 64-bit words; ``present`` says where each was seen.
    Both are empty where ``kept`` has them instead.
    """

    line: I64Array
    """Position in the source, from 1: the line or record number."""
    ts_ns: I64Array
    tid: I32Array
    tgid: I32Array
    cpu: I32Array
    in_irq: I8Array
    """1: hard interrupt context, 0: not, UNKNOWN: no flags."""
    event: I32Array
    """Index into the registry's list of events."""
    values: dict[str, U64Array] = field(default_factory=dict)
    present: dict[str, BoolArray] = field(default_factory=dict)
    kept: Fields | None = None
    """Fields that are still where they were recorded."""
    has_room: bool = False
    """Whether memory.roomy made the columns, so that others fit before them."""

    def __len__(self) -> int:
        return len(self.line)

    def take(self, index: Index | BoolArray) -> RawEvents:
        """The events at ``index``, in that order."""
        return RawEvents(
            self.line[index],
            self.ts_ns[index],
            self.tid[index],
            self.tgid[index],
            self.cpu[index],
            self.in_irq[index],
            self.event[index],
            {name: column[index] for name, column in self.values.items()},
            {name: column[index] for name, column in self.present.items()},
            None if self.kept is None else self.kept.pick(index),
        )

    def settled(self) -> RawEvents:
        """The same events with their fields in ``values`` and ``present``."""
        if self.kept is None:
            return self
        heads = self.line, self.ts_ns, self.tid, self.tgid, self.cpu, self.in_irq, self.event
        return RawEvents(*heads, *self.kept.settle())

    def value(self, name: str) -> U64Array:
        """The words of a field; zeros where it was never seen."""
        found = self.values.get(name)
        return np.zeros(len(self), np.uint64) if found is None else found

    def has(self, name: str) -> BoolArray:
        """Where a field was seen."""
        found = self.present.get(name)
        return np.zeros(len(self), np.bool_) if found is None else found

    def apart(self) -> RawEvents:
        """The same events, for which nothing else needs to be kept."""
        if not isinstance(self.kept, Apart):
            return self.settled()
        return replace(self, kept=self.kept.apart())

    def after(self, first: RawEvents) -> RawEvents | None:
        """These behind others, where they are; None if there is no room for those."""
        can_be = self.has_room and len(first) <= ROOM and isinstance(self.kept, Apart)
        fields = self.kept.after(first.fields()) if can_be else None  # type: ignore[union-attr]
        if fields is None:
            return None
        who = behind(first.tid, self.tid), behind(first.tgid, self.tgid)
        return RawEvents(
            behind(first.line, self.line),
            behind(first.ts_ns, self.ts_ns),
            *who,
            behind(first.cpu, self.cpu),
            behind(first.in_irq, self.in_irq),
            behind(first.event, self.event),
            kept=fields,
        )

    def fields(self) -> Fields:
        """The fields, wherever they are."""
        return Columns(len(self), self.values, self.present) if self.kept is None else self.kept


@dataclass(frozen=True, slots=True)
class Columns:
    """Fields in arrays, and which of their entries are meant."""

    n: int
    values: dict[str, U64Array]
    present: dict[str, BoolArray]
    at: Index | BoolArray | None = None

    def __len__(self) -> int:
        return self.n

    def names(self) -> frozenset[str]:
        """The slots that any of the events may have."""
        return frozenset(self.values)

    def pick(self, at: Index | BoolArray) -> Columns:
        """The fields of the events at ``at``, in that order."""
        at = np.flatnonzero(at) if at.dtype == np.bool_ else at
        mine = at if self.at is None else self.at[at]
        return Columns(len(at), self.values, self.present, mine)

    def get(self, name: str) -> Words:
        """Return a slot that is among :meth:`names`."""
        value, there = self.values[name], self.present[name]
        return (value, there) if self.at is None else (value[self.at], there[self.at])

    def settle(self) -> Values:
        """Return all of them as arrays."""
        return _settled(self)


@dataclass(slots=True)
class Spread:
    """Fields of events that are kept in several places."""

    parts: list[Fields]
    which: Index
    """Place in ``parts`` of each event …"""
    place: Index
    """… and its place there."""
    _picked: list[tuple[Index, Fields]] = field(default_factory=list)
    """Of each part: which events it has, and their fields.  The first one, which has
    most, has something for all events; the others replace it."""

    def __len__(self) -> int:
        return len(self.which)

    def names(self) -> frozenset[str]:
        """The slots that any of the events may have."""
        return frozenset().union(*(part.names() for part in self.parts))

    def pick(self, at: Index | BoolArray) -> Fields:
        """The fields of the events at ``at``, in that order; parts without any are let go."""
        which, place = self.which[at], self.place[at]
        used = np.flatnonzero(np.bincount(which, minlength=len(self.parts)))
        if len(used) < 2:
            return self.parts[int(used[0]) if len(used) else 0].pick(place)
        parts = [self.parts[n] for n in used.tolist()]
        return Spread(parts, np.searchsorted(used, which), place)

    def get(self, name: str) -> Words:
        """Return a slot that is among :meth:`names`."""
        if not self._picked:
            self._pick()
        value, there = _words(self._picked[0][1], name)
        for where, fields in self._picked[1:]:
            value[where], there[where] = _words(fields, name)
        return value, there

    def _pick(self) -> None:
        counts = np.bincount(self.which, minlength=len(self.parts))
        for n in np.argsort(-counts, kind="stable").tolist():
            mine = self.which == n
            where = np.flatnonzero(mine)
            place = self.place[where] if self._picked else np.where(mine, self.place, 0)
            self._picked.append((where, self.parts[n].pick(place)))

    def settle(self) -> Values:
        """Return all of them as arrays."""
        return _settled(self)


def _words(fields: Fields, name: str) -> Words:
    """A slot of events that need not have it, in arrays of their own."""
    if name in fields.names():
        return fields.get(name)
    return np.zeros(len(fields), np.uint64), np.zeros(len(fields), np.bool_)


def _settled(fields: Fields) -> Values:
    found = {name: fields.get(name) for name in sorted(fields.names())}
    return (
        {name: value for name, (value, _) in found.items()},
        {name: there for name, (_, there) in found.items()},
    )


def _spread(parts: list[RawEvents]) -> Fields:
    """The fields of several batches, one behind the other."""
    kept: list[Fields] = []
    which: list[Index] = []
    place: list[Index] = []
    for part in parts:
        fields = part.fields()
        if isinstance(fields, Spread):
            which.append(fields.which + len(kept))
            place.append(fields.place)
            kept += fields.parts
        else:
            which.append(np.full(len(fields), len(kept), np.intp))
            place.append(np.arange(len(fields)))
            kept.append(fields)
    if len(parts) == 2 and len(kept) == 2 and isinstance(kept[1], Apart):
        both = kept[1].after(kept[0])
        if both is not None:
            return both
    return Spread(kept, np.concatenate(which), np.concatenate(place))


def concatenate(parts: list[RawEvents]) -> RawEvents:
    """Join batches in order; a field missing from one is absent there.

    Fields that are still where they were recorded stay there if they are many; else they
    are read.
    """
    parts = [part for part in parts if len(part)] if len(parts) > 1 else parts
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2 and len(parts[1]) >= MANY_EVENTS:
        both = parts[1].after(parts[0])
        if both is not None:
            return both
    is_kept = len(parts) <= _MOST_PARTS and any(part.kept is not None for part in parts)
    kept = _spread(parts) if is_kept and sum(map(len, parts)) >= MANY_EVENTS else None
    parts = parts if kept is not None else [part.settled() for part in parts]
    names = sorted({name for part in parts for name in part.values} if kept is None else ())
    return RawEvents(
        np.concatenate([p.line for p in parts] or [np.zeros(0, np.int64)]),
        np.concatenate([p.ts_ns for p in parts] or [np.zeros(0, np.int64)]),
        np.concatenate([p.tid for p in parts] or [np.zeros(0, np.int32)]),
        np.concatenate([p.tgid for p in parts] or [np.zeros(0, np.int32)]),
        np.concatenate([p.cpu for p in parts] or [np.zeros(0, np.int32)]),
        np.concatenate([p.in_irq for p in parts] or [np.zeros(0, np.int8)]),
        np.concatenate([p.event for p in parts] or [np.zeros(0, np.int32)]),
        {name: np.concatenate([p.value(name) for p in parts]) for name in names},
        {name: np.concatenate([p.has(name) for p in parts]) for name in names},
        kept,
    )
