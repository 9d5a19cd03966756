"""The events of all CPUs between two moments, and in which order they happened."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.raw import BoolArray, I32Array, U64Array
from tdxtrace.ingest.records.gather import Block, Places

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

    The block is overwritten when the next round is asked for, unless it is kept.
    """

    block: Block
    stamp: U64Array
    base: Places
    """Where each event's record begins: CPU by CPU."""
    size: Places
    """How many bytes each record has."""
    cpus: I32Array
    cpu_ends: Places
    """Events of the CPUs up to and with each."""
    gaps: list[Gap] = field(default_factory=list)
    head: U64Array | None = None
    """The first eight bytes of each record, if they were read on the way."""
    is_kept: bool = False
    """Whether something refers to the block."""
    _order: Places | None = None

    def cpu(self) -> I32Array:
        """The CPU of each event."""
        found: I32Array = np.repeat(self.cpus, np.diff(self.cpu_ends, prepend=0))
        return found

    def order(self) -> Places:
        """The events by time; those of one moment by CPU, then by place."""
        if self._order is None:
            self._order = np.argsort(self.stamp, kind="stable")
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
        starts = np.append(0, self.cpu_ends)
        runs = [self.stamp[a:b] for a, b in itertools.pairwise(starts.tolist())]
        if not all((run[1:] >= run[:-1]).all() for run in runs):
            return None
        bounds = np.searchsorted(mine, starts)
        rank = np.empty(len(mine), np.intp)
        for cpu, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
            places = mine[first:last]
            stamps = self.stamp[places]
            before = places - starts[cpu]
            for other, run in enumerate(runs):
                if other != cpu and len(places):
                    before += np.searchsorted(run, stamps, "right" if other < cpu else "left")
            rank[first:last] = before
        return rank
