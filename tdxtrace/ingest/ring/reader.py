"""From rounds of ring-buffer events to raw events: which are ours, what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.memory import roomy
from tdxtrace.ingest.raw import MANY_EVENTS, UNKNOWN, BoolArray, I32Array, RawEvents
from tdxtrace.ingest.records.gather import Block, Places
from tdxtrace.ingest.records.known import KnownEvents
from tdxtrace.ingest.ring.clocks import Clock
from tdxtrace.ingest.ring.merge import Merge
from tdxtrace.ingest.ring.rounds import Round
from tdxtrace.ingest.tally import USUAL_TIDS, Tally

if TYPE_CHECKING:
    from types import ModuleType

    from tdxtrace.ingest.records.loops import RecordFields, Table

# What trace-cmd and the kernel print for a thread whose name was not saved.
_NO_NAME: Final = "<...>"
_IDLE: Final = "<idle>"


@dataclass(slots=True)
class RingReader:
    """Reads the events of one recording's ring buffers, and counts the rest."""

    merge: Merge
    known: KnownEvents
    clock: Clock
    tally: Tally
    comms: Mapping[int, str]
    tgids: Mapping[int, int]
    is_large: bool = False
    """Whether compiled loops pay."""
    _tids: set[int] = field(default_factory=set)
    _is_met: BoolArray = field(default_factory=lambda: np.zeros(USUAL_TIDS, np.bool_))
    """Which of the usual thread numbers are in ``_tids``."""
    _loops: ModuleType | None = None
    """What orders events and reads the heads of records, if compiled loops pay."""
    _table: Table | None = None
    """Where the fields of the layouts are that were met so far."""

    def __post_init__(self) -> None:
        if self.is_large:
            from tdxtrace.ingest.ring import mergeloops  # noqa: PLC0415 - imports numba

            self._loops = mergeloops if mergeloops.are_usual(self.known.common) else None

    def batches(self) -> Iterator[RawEvents]:
        """Yield the events that may become rows, in the order of their time."""
        for made in self.merge.rounds():
            yield self._events(made)
        for cpu, first, last in self.merge.spans():
            first_ns, last_ns = self.clock.one(first), self.clock.one(last)
            if first_ns is not None and last_ns is not None:
                self.tally.heard(cpu, first_ns, last_ns)
        for gap in self.merge.lost_at_end():
            after = self.clock.one(gap.after)
            self.tally.gap(gap.cpu, gap.n_events, self.tally.n_lines + 1, after, None)

    def _events(self, made: Round) -> RawEvents:
        known, n_before = self.known, self.tally.n_lines
        loops = None if made.events.head is None else self._loops
        found = None if loops is None else loops.count(made)
        place = known.common.type
        if found is None or not known.are_met(found):
            found = known.meet(made.number(place), made.base(), made.block)
        known.count(found, lambda: made.number(place)[made.order()], n_before)
        for gap in made.gaps:
            start, end = self.clock.one(gap.after), self.clock.one(gap.before)
            self.tally.gap(gap.cpu, gap.n_events, gap.rank + n_before + 1, start, end)
        self.tally.n_lines += len(made)
        quick = None if loops is None else self._quickly(loops, made, found, n_before)
        return self._slowly(made, found, n_before) if quick is None else quick

    def _slowly(self, made: Round, found: Places, n_before: int) -> RawEvents:
        known, base = self.known, made.base()
        number = made.number(known.common.type)
        if known.are_wanted(found):
            rank, at = np.arange(len(base)), made.order()
        else:
            rank, at = made.ranks(known.is_wanted(number))
        line, index, base = rank + (n_before + 1), known.index(number[at]), base[at]
        fits = known.has_room(index, made.size()[at])
        if not fits.all():
            known.too_short(index[~fits], line[~fits].tolist())
            base, at, line, index = base[fits], at[fits], line[fits], index[fits]
        return self._raw(made, base, at, line, index)

    def _raw(
        self, made: Round, base: Places, at: Places, line: NDArray[np.int64], index: Places
    ) -> RawEvents:
        block, known = made.block, self.known
        tid, in_irq = known.context(block, base)
        self._meet_threads(tid)
        kept = known.kept(block, base, index) if len(base) >= MANY_EVENTS else None
        made.is_kept = kept is not None
        fields = ({}, {}) if kept is not None else known.fields(block, base, index)
        return RawEvents(
            line,
            self.clock.to_ns(made.stamp()[at]),
            tid,
            self._tgids_of(tid),
            made.cpu().take(at),
            in_irq,
            known.events(index),
            *fields,
            kept,
        )

    def _quickly(
        self, loops: ModuleType, made: Round, found: Places, n_before: int
    ) -> RawEvents | None:
        """The events that may become rows, read by a compiled loop; None if that cannot be."""
        known, clock = self.known, self.clock
        n = known.n_wanted(found)
        heads = loops.ordered(made, n, n_before, known.by_layout(), self._is_met)
        self._meet(heads.fresh)
        if not heads.fits:
            return None
        stamp = heads.stamp
        events = RawEvents(
            heads.line,
            stamp.view(np.int64) if clock.is_plain else clock.to_ns(stamp),
            heads.tid,
            self._tgids_of(heads.tid),
            heads.cpu,
            heads.in_irq,
            heads.event,
            kept=self._late(made.block, heads.base, heads.index, heads.layouts),
            has_room=True,
        )
        made.is_kept = len(events) >= MANY_EVENTS
        return events if made.is_kept else events.settled()

    def _late(self, block: Block, base: Places, index: Places, met: Places) -> RecordFields:
        """Leave the fields where they are."""
        from tdxtrace.ingest.records.loops import RecordFields, table_of  # noqa: PLC0415 - numba

        if self._table is None or len(self._table.size) != len(self.known.layouts):
            self._table = table_of(self.known.layouts)
        return RecordFields(block, block, base, index, self._table, met, has_room=True)

    def _tgids_of(self, tid: I32Array) -> I32Array:
        if not self.tgids:
            unknown: I32Array = roomy(len(tid), np.int32)
            unknown[:] = UNKNOWN
            return unknown
        known = np.array(sorted(self.tgids), np.int32)
        process = np.array([self.tgids[t] for t in known.tolist()], np.int32)
        place = np.minimum(np.searchsorted(known, tid), len(known) - 1)
        return np.where(known[place] == tid, process[place], UNKNOWN).astype(np.int32)

    def _meet_threads(self, tid: I32Array) -> None:
        # Negative numbers are large ones without their sign.
        is_usual = tid.view(np.uint32).max(initial=0) < USUAL_TIDS
        met = self._is_met.take(tid) if is_usual else np.zeros(len(tid), np.bool_)
        self._meet(tid[~met] if not met.all() else tid[:0])

    def _meet(self, tids: I32Array) -> None:
        """Name the threads that are new."""
        for one in np.unique(tids).tolist():
            if one not in self._tids:
                self._tids.add(one)
                if 0 <= one < USUAL_TIDS:
                    self._is_met[one] = True
                comm = self.comms.get(one, _IDLE if one == 0 else _NO_NAME)
                self.tally.meet(one, comm, self.tgids.get(one, UNKNOWN))
