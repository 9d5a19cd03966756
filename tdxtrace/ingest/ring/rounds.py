"""The events of all CPUs between two moments, and in which order they happened."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.raw import BoolArray, I32Array, U64Array
from tdxtrace.ingest.records.formats import Field
from tdxtrace.ingest.records.gather import Block, Places
from tdxtrace.ingest.ring.pages import PageEvents

N = TypeVar("N", bound=np.number)

# To look up the rank of one event among those of a CPU costs as much as to put so many
# events in order.
_FEW: Final = 4


@dataclass(frozen=True, slots=True)
class Gap:
    """Events that the kernel dropped on a CPU; times in the clock's unit."""

    cpu: int
    n_events: int | None
    after: int | None
    """Stamp of the last event before."""
    before: int | None
    """Stamp of the first event after; None if there is none."""
    rank: int
    """Place in its round of the first event after."""


@dataclass(slots=True)
class Round:
    """Events of all CPUs between two moments; every event is in one round.

    The block and the events are overwritten when the next round is asked for, unless
    the block is kept.
    """

    block: Block
    events: PageEvents
    """Those of the pages that have events of this round."""
    cpus: I32Array
    starts: Places
    """Where each CPU's events of this round begin in ``events`` …"""
    stops: Places
    """… and where they end."""
    gaps: list[Gap] = field(default_factory=list)
    is_kept: bool = False
    """Whether something refers to the block."""
    _order: Places | None = None
    _stamp: U64Array | None = None
    _base: Places | None = None
    _number: Places | None = None

    def __len__(self) -> int:
        return int((self.stops - self.starts).sum())

    def _mine(self, column: NDArray[N]) -> NDArray[N]:
        runs = zip(self.starts.tolist(), self.stops.tolist(), strict=True)
        return np.concatenate([column[start:stop] for start, stop in runs])

    def stamp(self) -> U64Array:
        """When each event was: CPU by CPU."""
        if self._stamp is None:
            self._stamp = self._mine(self.events.stamp)
        return self._stamp

    def base(self) -> Places:
        """Where each event's record begins."""
        if self._base is None:
            self._base = self._mine(self.events.base)
        return self._base

    def number(self, place: Field) -> Places:
        """Which event each record is of: what it says at ``place``, always the same one."""
        if self._number is None:
            self._number = self.block.numbers(self.base(), place)
        return self._number

    def size(self) -> Places:
        """How many bytes each record has."""
        return self._mine(self.events.size)

    def cpu(self) -> I32Array:
        """The CPU of each event."""
        found: I32Array = np.repeat(self.cpus, self.stops - self.starts)
        return found

    def order(self) -> Places:
        """The events by time; those of one moment by CPU, then by place."""
        if self._order is None:
            self._order = np.argsort(self.stamp(), kind="stable")
        return self._order

    def ranks(self, wanted: BoolArray) -> tuple[Places, Places]:
        """The ranks in time of the events that are wanted, ascending, and their places."""
        mine = np.flatnonzero(wanted)
        if self._order is None and len(mine) * len(self.cpus) < len(wanted) // _FEW:
            rank = self._ranks_of(mine)
            if rank is not None:
                by_time = np.argsort(rank, kind="stable")
                return rank[by_time], mine[by_time]
        rank = np.flatnonzero(wanted[self.order()])
        return rank, self.order()[rank]

    def _ranks_of(self, mine: Places) -> Places | None:
        """The same for a few events; None where time does not go forward on a CPU."""
        stamp, starts = self.stamp(), np.append(0, np.cumsum(self.stops - self.starts))
        runs = [stamp[a:b] for a, b in itertools.pairwise(starts.tolist())]
        if not all((run[1:] >= run[:-1]).all() for run in runs):
            return None
        bounds = np.searchsorted(mine, starts)
        rank = np.empty(len(mine), np.intp)
        for cpu, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
            places = mine[first:last]
            stamps = stamp[places]
            before = places - starts[cpu]
            for other, run in enumerate(runs):
                if other != cpu and len(places):
                    before += np.searchsorted(run, stamps, "right" if other < cpu else "left")
            rank[first:last] = before
        return rank
