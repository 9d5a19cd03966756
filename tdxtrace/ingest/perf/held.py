"""Samples that wait until nothing older can follow, read block by block with numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from tdxtrace.ingest.perf.blocks import Records
from tdxtrace.ingest.perf.names import distinct
from tdxtrace.ingest.perf.samples import SampleReader, Samples
from tdxtrace.ingest.raw import I32Array, I64Array, RawEvents, concatenate
from tdxtrace.ingest.records.gather import Places
from tdxtrace.ingest.records.known import Found, KnownEvents, Numbers

NEVER: Final = np.iinfo(np.int64).max
# A block of which so small a part is ours is not kept in memory for that.
_MUCH: Final = 4


@dataclass(slots=True)
class Given:
    """Samples whose turn has come, by time."""

    n: int
    raw: RawEvents
    """Those that become rows; ``line`` counts from all samples before."""
    found: Found
    """How often each event number occurs."""
    by_time: Callable[[], Numbers | I32Array]
    """Gives the event number of each; valid until more samples are taken."""
    heard: Callable[[], tuple[I32Array, I64Array]] | None
    """On which CPU and when each was taken; None: the tally knows."""
    tids: I32Array
    """The threads of ``raw``, ascending."""


class Waiting(Protocol):
    """Takes the samples of blocks, and gives them out by time."""

    def __len__(self) -> int:
        """Samples that wait."""

    def hold(self, records: Records) -> I64Array:
        """Take the samples of a block.

        Returns:
            For each of the block's other records, the moment of the newest sample in front
            of it in the block, or -1; and behind these that of all its samples.
        """

    def times(self) -> I64Array:
        """When the samples that wait were taken."""

    def give(self, limit: int, n_before: int, is_plain: bool) -> Given | None:
        """Give out the samples up to a moment, ordered by time, then by place in the file.

        Args:
            limit: The moment.
            n_before: Samples given out before.
            is_plain: Whether it matters only when each CPU was heard of first and last:
                then the tally may be told at once.
        """


@dataclass(slots=True)
class StandIns:
    """Numbers for samples that have none: KnownEvents counts them by these."""

    known: KnownEvents
    name_of: Callable[[int], str]
    """What perf calls the event of an attribute."""
    silent: dict[int, int] = field(default_factory=dict)
    """Of samples that hold no record, by attribute."""
    short: dict[int, int] = field(default_factory=dict)
    """Of samples whose record lacks room for the fields of its layout, by that."""
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict)

    def learn(self, samples: Samples) -> tuple[Places, Found]:
        """Give every sample a number, and meet those that are new.

        Returns:
            Which samples become rows, and the index of their layouts.
        """
        known, number = self.known, samples.number
        for attr in np.unique(samples.attr).tolist():
            mine = samples.silent[samples.attr == attr]
            number[mine] = self._number(self.silent, attr, "noise", self.name_of)
        every = known.are_wanted(known.meet(number, samples.base, samples.block))
        ours = np.arange(len(number)) if every else np.flatnonzero(known.is_wanted(number))
        index = known.index(number[ours])
        fits = known.has_room(index, samples.size[ours])
        if not fits.all():
            for place, layout in zip(ours[~fits].tolist(), index[~fits].tolist(), strict=True):
                number[place] = self._number(self.short, layout, "undecoded", self._layout)
            ours, index = ours[fits], index[fits]
        return ours, index

    def _layout(self, which: int) -> str:
        return self.known.layouts[which].name

    def _number(
        self, numbers: dict[int, int], which: int, kind: str, name_of: Callable[[int], str]
    ) -> int:
        if which not in numbers:
            name = name_of(which)
            if (kind, name) not in self._numbers:
                self._numbers[kind, name] = self.known.stand_in(kind, name)
            numbers[which] = self._numbers[kind, name]
        return numbers[which]


@dataclass(slots=True)
class Part:
    """Samples that wait for others which may have happened before them."""

    ts_ns: I64Array
    cpu: I32Array
    number: Numbers
    """Which event each sample is of."""
    ours: Places
    """Which of the samples become rows."""
    raw: RawEvents
    """Those, in the same order; ``line`` is not yet known."""

    def take(self, places: Places, ours: Places) -> Part:
        """Some of the samples, of which ``ours`` says where each is among ours, or -1."""
        mine = np.flatnonzero(ours >= 0)
        raw = self.raw.take(ours[mine])
        return Part(self.ts_ns[places], self.cpu[places], self.number[places], mine, raw)


@dataclass(slots=True)
class Held:
    """Samples in parts, one of each block."""

    known: KnownEvents
    samples: SampleReader
    names: StandIns
    _parts: list[Part] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(part.ts_ns) for part in self._parts)

    def hold(self, records: Records) -> I64Array:
        """Take the samples of a block."""
        samples = self.samples.read(records)
        self._parts.append(self._part(samples))
        n_before = records.others - np.arange(len(records.others))
        newest: I64Array = np.maximum.accumulate(np.concatenate([[-1], samples.ts_ns]))
        return newest.take(np.append(n_before, len(samples)))

    def times(self) -> I64Array:
        """When the samples that wait were taken."""
        return np.concatenate([part.ts_ns for part in self._parts] or [np.zeros(0, np.int64)])

    def give(self, limit: int, n_before: int, is_plain: bool) -> Given | None:
        """Give out the samples up to a moment."""
        times = [int(part.ts_ns.min()) for part in self._parts if len(part.ts_ns)]
        if not times or min(times) > limit:
            return None
        held = self._joined()
        order = np.argsort(held.ts_ns, kind="stable")
        n = int(np.searchsorted(held.ts_ns[order], limit, "right"))
        done, left = order[:n], np.sort(order[n:])
        # Where each sample is among ours; -1 if it is none.
        mine = np.full(len(order), -1, np.intp)
        mine[held.ours] = np.arange(len(held.ours))
        given = held.take(done, mine[done])
        given.raw.line = given.ours + (n_before + 1)
        self._parts = [held.take(left, mine[left])]
        return Given(
            n,
            given.raw,
            np.bincount(given.number),
            lambda: given.number,
            lambda: (given.cpu, given.ts_ns),
            distinct(given.raw.tid),
        )

    def _joined(self) -> Part:
        parts = self._parts
        starts = np.cumsum([0, *(len(part.ts_ns) for part in parts)])
        return Part(
            np.concatenate([part.ts_ns for part in parts]),
            np.concatenate([part.cpu for part in parts]),
            np.concatenate([part.number for part in parts]),
            np.concatenate([p.ours + start for p, start in zip(parts, starts, strict=False)]),
            concatenate([part.raw for part in parts]),
        )

    def _part(self, samples: Samples) -> Part:
        known, block, number = self.known, samples.block, samples.number
        ours, index = self.names.learn(samples)
        base = samples.base[ours]
        _, in_irq = known.context(block, base)
        is_much = len(ours) * _MUCH >= len(number)
        kept = known.kept(block, base, index) if is_much else None
        raw = RawEvents(
            np.zeros(len(ours), np.int64),
            samples.ts_ns[ours],
            samples.tid[ours],
            samples.tgid[ours],
            samples.cpu[ours],
            in_irq,
            known.events(index),
            *(({}, {}) if kept is not None else known.fields(block, base, index)),
            kept,
        )
        return Part(samples.ts_ns, samples.cpu, number, ours, raw)
