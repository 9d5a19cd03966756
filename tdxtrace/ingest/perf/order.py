"""In which order did perf's samples happen, and what was lost between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.perf.names import Names
from tdxtrace.ingest.raw import I32Array, I64Array, RawEvents, concatenate
from tdxtrace.ingest.records.gather import Places
from tdxtrace.ingest.records.known import KnownEvents, Numbers
from tdxtrace.ingest.tally import Entry, Tally

# Samples held back while no round ends: perf itself flushes half of its queue when
# that is full (tools/perf/util/ordered-events.c, OE_FLUSH__HALF).
_MAX_HELD: Final = 1 << 22
_NEVER: Final = np.iinfo(np.int64).max


@dataclass(slots=True)
class Held:
    """Samples that wait for others which may have happened before them."""

    ts_ns: I64Array
    cpu: I32Array
    number: Numbers
    """Which event each sample is of."""
    ours: Places
    """Which of the samples become rows."""
    raw: RawEvents
    """Those, in the same order; ``line`` is not yet known."""


@dataclass(slots=True)
class Lost:
    """A LOST record: so many samples of a CPU were dropped before this moment."""

    ts_ns: int
    cpu: int
    n_events: int


@dataclass(slots=True)
class Order:
    """Holds samples until a round of perf's buffers ends, and gives them out by time.

    ``perf record`` drains the buffers of all CPUs in turn; when it has been round
    twice, nothing older than the first round's newest sample can follow
    (tools/perf/Documentation/perf.data-file-format.txt, FINISHED_ROUND).
    """

    known: KnownEvents
    tally: Tally
    names: Names
    n_given: int = 0
    """Samples so far: perf script prints a line for each."""
    _held: list[Held] = field(default_factory=list)
    _lost: list[Lost] = field(default_factory=list)
    _newest: int = -1
    _newest_before: int = -1
    _limit: int = -1

    def hold(self, held: Held) -> None:
        """Take samples, in the order of the file."""
        self._held.append(held)
        if len(held.ts_ns):
            self._newest = max(self._newest, int(held.ts_ns.max()))

    def lose(self, lost: Lost) -> None:
        """Take a record of losses."""
        if lost.ts_ns < 0:
            lost.ts_ns = self._newest
        self._lost.append(lost)

    def end_round(self, newest: int) -> None:
        """Note that a round has ended whose newest sample is of the moment ``newest``."""
        self._limit, self._newest_before = self._newest_before, max(newest, self._newest_before)

    def ready(self) -> RawEvents | None:
        """Give out what cannot be preceded by anything that follows."""
        limit = self._limit
        if sum(len(held.ts_ns) for held in self._held) > _MAX_HELD:
            limit = int(np.median(np.concatenate([held.ts_ns for held in self._held])))
        return self._until(limit)

    def rest(self) -> RawEvents | None:
        """Give out everything that is left."""
        return self._until(_NEVER)

    def _until(self, limit: int) -> RawEvents | None:
        if not self._held or min(int(h.ts_ns.min(initial=_NEVER)) for h in self._held) > limit:
            if limit == _NEVER:
                self._see(np.zeros(0, np.int32), np.zeros(0, np.int64), limit)
            return None
        held = self._joined()
        order = np.argsort(held.ts_ns, kind="stable")
        n = int(np.searchsorted(held.ts_ns[order], limit, "right"))
        done, left = order[:n], np.sort(order[n:])
        # Where each sample is among ours; -1 if it is none.
        mine = np.full(len(order), -1, np.intp)
        mine[held.ours] = np.arange(len(held.ours))
        now = mine[done]
        line = np.flatnonzero(now >= 0)
        raw = held.raw.take(now[line])
        raw.line = line + (self.n_given + 1)
        number = held.number[done]
        self.known.count(np.bincount(number), number, lambda: np.arange(n), self.n_given)
        self._see(held.cpu[done], held.ts_ns[done], limit)
        self.n_given += n
        self.tally.n_lines += n
        self.names.meet(raw, limit)
        self._held = [_left(held, left, mine[left])]
        return raw

    def _joined(self) -> Held:
        held = self._held
        starts = np.cumsum([0, *(len(h.ts_ns) for h in held)])
        return Held(
            np.concatenate([h.ts_ns for h in held]),
            np.concatenate([h.cpu for h in held]),
            np.concatenate([h.number for h in held]),
            np.concatenate([h.ours + start for h, start in zip(held, starts, strict=False)]),
            concatenate([h.raw for h in held]),
        )

    def _see(self, cpu: I32Array, ts_ns: I64Array, limit: int) -> None:
        """Note when CPUs were heard of; a loss closes the time before it."""
        due = sorted((lost for lost in self._lost if lost.ts_ns <= limit), key=lambda x: x.ts_ns)
        self._lost = [lost for lost in self._lost if lost.ts_ns > limit]
        start = 0
        for lost in due:
            end = int(np.searchsorted(ts_ns, lost.ts_ns, "right"))
            self.tally.see(cpu[start:end], ts_ns[start:end])
            self._gap(lost, self.n_given + end + 1)
            start = end
        self.tally.see(cpu[start:], ts_ns[start:])

    def _gap(self, lost: Lost, line: int) -> None:
        same: Entry | None = next(
            (g for g in self.tally.gaps[-8:] if (g.line_no, g.cpu) == (line, lost.cpu)), None
        )
        if same is not None:
            same.n_events = (same.n_events or 0) + lost.n_events
            same.n_lines += 1
        else:
            self.tally.lost(lost.cpu, lost.n_events, line)


def _left(held: Held, places: Places, mine: Places) -> Held:
    """What of ``held`` is not given out.

    Args:
        held: What was held.
        places: Which samples those are.
        mine: Where each of them is among ours; -1 if it is none.
    """
    ours = np.flatnonzero(mine >= 0)
    raw = held.raw.take(mine[ours])
    return Held(held.ts_ns[places], held.cpu[places], held.number[places], ours, raw)
