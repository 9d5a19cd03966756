"""From entry and return probes to SEAMCALL attempts, one batch after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from tdxtrace.ingest.decoding.attempts import Attempts
from tdxtrace.ingest.decoding.frames import Room
from tdxtrace.ingest.decoding.kinds import Kinds
from tdxtrace.ingest.decoding.pairing import Index, pair
from tdxtrace.ingest.raw import UNKNOWN, Apart, BoolArray, RawEvents, concatenate
from tdxtrace.ingest.tally import Tally
from tdxtrace.tables.events import PROBES

if TYPE_CHECKING:
    from tdxtrace.ingest.decoding.rowloops import RowMaker


@dataclass(slots=True)
class Calls:
    """Pairs calls and keeps those still open; rows come out as they are complete."""

    source: int
    tally: Tally
    room: Room | None = None
    """Where rows are put, if they are kept."""
    is_large: bool = False
    """Whether compiled loops pay."""
    open: RawEvents = field(default_factory=lambda: concatenate([]))
    _quick: RowMaker | None = None
    """Makes rows of many whole calls."""

    def feed(self, parts: list[RawEvents], kinds: Kinds) -> list[pl.DataFrame]:
        """Return ``seamcalls`` rows that are complete; some wait until there are more."""
        batch = concatenate([self.open, *parts])
        entry, back, given_up, orphan, still = _pair(batch, kinds, self.is_large)
        held = _inside_open_call(batch, kinds, still)
        if held is not None:
            paired = ~held[back]
            entry, back = entry[paired], back[paired]
            given_up, orphan = (at[~held[at]] for at in (given_up, orphan))
            held[still] = True
            still = np.flatnonzero(held)
        self.open = batch.take(still).apart()
        return self._all(batch, kinds, (entry, back), given_up, orphan)

    def _all(
        self,
        batch: RawEvents,
        kinds: Kinds,
        pairs: tuple[Index, Index],
        given_up: Index,
        orphan: Index,
    ) -> list[pl.DataFrame]:
        if isinstance(batch.kept, Apart) and not (len(given_up) or len(orphan)):
            maker = self._maker()
            if maker.add(batch, kinds, pairs):
                return maker.full()
        return [*self.rest(), self._rows(Attempts(batch, kinds, *pairs, given_up, orphan))]

    def _maker(self) -> RowMaker:
        if self._quick is None:
            from tdxtrace.ingest.decoding.rowloops import RowMaker  # noqa: PLC0415 - imports numba

            room = Room(is_kept=False) if self.room is None else self.room
            self._quick = RowMaker(self.source, room)
        return self._quick

    def forget(self, before_ns: int) -> None:
        """Drop what began before ``before_ns`` and is still open."""
        if len(self.open) and (self.open.ts_ns < before_ns).any():
            self.open = self.open.take(self.open.ts_ns >= before_ns)

    def rest(self) -> list[pl.DataFrame]:
        """Return the rows that wait."""
        return [] if self._quick is None else self._quick.rest()

    def finish(self, kinds: Kinds) -> list[pl.DataFrame]:
        """Return the rows that wait, and the calls that never returned."""
        batch, self.open = self.open, concatenate([])
        entry, back, given_up, orphan, still = _pair(batch, kinds, self.is_large)
        never = np.concatenate([given_up, still])
        return [*self.rest(), self._rows(Attempts(batch, kinds, entry, back, never, orphan))]

    def _rows(self, rows: Attempts) -> pl.DataFrame:
        merged = rows.merge_wrappers()
        loader, unknown = rows.leave_out()
        for kind, detail, n in (
            ("merged", "", merged),
            ("noise", "P-SEAMLDR calls", loader),
            ("undecoded", "calls that name no leaf", unknown),
        ):
            if n:
                self.tally.count(kind, detail, None, n)
        return rows.frame(self.source, self.room)


def _pair(
    batch: RawEvents, kinds: Kinds, is_large: bool
) -> tuple[Index, Index, Index, Index, Index]:
    # Where the tool did not print the thread, calls nest by CPU; negative, so
    # that no thread has the same number.
    is_known = batch.tid != UNKNOWN
    tid = batch.tid if is_known.all() else np.where(is_known, batch.tid, -2 - batch.cpu)
    if is_large:
        from tdxtrace.ingest.decoding import loops  # noqa: PLC0415 - imports numba

        return loops.pair_events(tid, batch.event, kinds.function, kinds.is_return)
    event, thread = batch.event.astype(np.intp), tid.astype(np.int64)
    return pair(thread, kinds.function.take(event), kinds.is_return.take(event))


def _inside_open_call(batch: RawEvents, kinds: Kinds, still: Index) -> BoolArray | None:
    """Which events lie inside a wrapper's call that has not returned yet; None if there is none.

    They wait for it: the wrapper names the request of the SEAMCALLs inside.
    """
    if not kinds.has_seamcalls:
        return None
    held = np.zeros(len(batch), np.bool_)
    inner = kinds.probe[batch.event] == PROBES.index("seamcall")
    opened = still[~inner[still]]
    if not (inner.any() and len(opened)):
        return None
    last = dict(zip(batch.tid[opened].tolist(), opened.tolist(), strict=True))
    for tid, position in last.items():
        after = (batch.tid == tid) & inner
        after[: position + 1] = False
        held |= after
    return held
