"""From entry and return probes to SEAMCALL attempts, one batch after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from tdxtrace.ingest.decoding.attempts import Attempts
from tdxtrace.ingest.decoding.kinds import Kinds
from tdxtrace.ingest.decoding.pairing import Index, pair
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, RawEvents, concatenate
from tdxtrace.ingest.tally import Tally
from tdxtrace.tables.events import PROBES


@dataclass(slots=True)
class Calls:
    """Pairs calls and keeps those still open; rows come out as they are complete."""

    source: int
    tally: Tally
    open: RawEvents = field(default_factory=lambda: concatenate([]))

    def feed(self, parts: list[RawEvents], kinds: Kinds) -> pl.DataFrame:
        """Return the ``seamcalls`` rows that ``parts`` complete."""
        batch = concatenate([self.open, *parts])
        entry, back, given_up, orphan = _pair(batch, kinds)
        still = np.ones(len(batch), np.bool_)
        still[np.concatenate([entry, back, given_up, orphan])] = False
        held = _inside_open_call(batch, kinds, still)
        self.open = batch.take(still | held)
        paired = ~held[back]
        entry, back = entry[paired], back[paired]
        given_up, orphan = (at[~held[at]] for at in (given_up, orphan))
        return self._rows(Attempts(batch, kinds, entry, back, given_up, orphan))

    def forget(self, before_ns: int) -> None:
        """Drop what began before ``before_ns`` and is still open."""
        if len(self.open) and (self.open.ts_ns < before_ns).any():
            self.open = self.open.take(self.open.ts_ns >= before_ns)

    def finish(self, kinds: Kinds) -> pl.DataFrame:
        """Return the calls that never returned."""
        batch, self.open = self.open, concatenate([])
        entry, back, given_up, orphan = _pair(batch, kinds)
        left = np.ones(len(batch), np.bool_)
        left[np.concatenate([entry, back, given_up, orphan])] = False
        never = np.concatenate([given_up, np.flatnonzero(left)])
        return self._rows(Attempts(batch, kinds, entry, back, never, orphan))

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
        return rows.frame(self.source)


def _pair(batch: RawEvents, kinds: Kinds) -> tuple[Index, Index, Index, Index]:
    # Where the tool did not print the thread, calls nest by CPU; negative, so
    # that no thread has the same number.
    thread = np.where(batch.tid != UNKNOWN, batch.tid, -2 - batch.cpu).astype(np.int64)
    return pair(thread, kinds.function[batch.event], kinds.is_return[batch.event])


def _inside_open_call(batch: RawEvents, kinds: Kinds, still: BoolArray) -> BoolArray:
    """Which events lie inside a wrapper's call that has not returned yet.

    They wait for it: the wrapper names the request of the SEAMCALLs inside.
    """
    held = np.zeros(len(batch), np.bool_)
    inner = kinds.probe[batch.event] == PROBES.index("seamcall")
    outer = still & ~inner
    if not (inner.any() and outer.any()):
        return held
    opened = np.flatnonzero(outer)
    last = dict(zip(batch.tid[opened].tolist(), opened.tolist(), strict=True))
    for tid, position in last.items():
        after = (batch.tid == tid) & inner
        after[: position + 1] = False
        held |= after
    return held
