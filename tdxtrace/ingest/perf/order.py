"""In which order did perf's samples happen, and what was lost between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.perf.blocks import Records
from tdxtrace.ingest.perf.held import NEVER, Waiting
from tdxtrace.ingest.perf.names import Names
from tdxtrace.ingest.raw import I32Array, I64Array, RawEvents
from tdxtrace.ingest.records.known import KnownEvents
from tdxtrace.ingest.tally import Entry, Tally

# Samples held back while no round ends: perf itself flushes half of its queue when
# that is full (tools/perf/util/ordered-events.c, OE_FLUSH__HALF).
_MAX_HELD: Final = 1 << 22
# Samples that are worth a batch where blocks are small: half as many took 1.6 instead of 1.3 s
# for 12 million.
LEAST_READY: Final = 1 << 17
_FINISHED_ROUND: Final = 68  # tools/perf/lib/include/perf/event.h


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
    waiting: Waiting | None = None
    """None until the first sample."""
    n_least: int = 0
    """Samples that must wait before any are given out."""
    n_given: int = 0
    """Samples so far: perf script prints a line for each."""
    _lost: list[Lost] = field(default_factory=list)
    _timeless: list[tuple[int, Lost]] = field(default_factory=list)
    _newest: int = -1
    _newest_before: int = -1
    _limit: int = -1

    def hold(self, records: Records) -> None:
        """Take a block; a round ends behind the samples in front of its mark."""
        if self.waiting is None or not records.n_samples:
            newest = np.full(len(records.others) + 1, -1)
        else:
            newest = self.waiting.hold(records)
        for place, lost in self._timeless:
            lost.ts_ns = max(self._newest, int(newest[place]))
        self._timeless = []
        self._newest = max(self._newest, int(newest[-1]))
        rounds = np.flatnonzero(records.types(records.others) == _FINISHED_ROUND)
        for moment in newest[rounds].tolist():
            self._limit = self._newest_before
            self._newest_before = max(moment, self._newest_before)

    def lose(self, lost: Lost, place: int) -> None:
        """Take a record of losses, before its block; ``place`` counts those that are no samples.

        One that does not say when is put behind all samples in front of it.
        """
        if lost.ts_ns < 0:
            self._timeless.append((place, lost))
        self._lost.append(lost)

    def ready(self) -> RawEvents | None:
        """Give out what cannot be preceded by anything that follows."""
        limit = self._limit
        if self.waiting is None or len(self.waiting) < self.n_least:
            return None
        if len(self.waiting) > _MAX_HELD:
            limit = int(np.median(self.waiting.times()))
        return self._until(limit)

    def rest(self) -> RawEvents | None:
        """Give out everything that is left."""
        return self._until(NEVER)

    def _until(self, limit: int) -> RawEvents | None:
        is_plain = not self.tally.has_open_gaps and not any(x.ts_ns <= limit for x in self._lost)
        given = None
        if self.waiting is not None:
            given = self.waiting.give(limit, self.n_given, is_plain)
        if given is None:
            if limit == NEVER:
                self._see(np.zeros(0, np.int32), np.zeros(0, np.int64), limit)
            return None
        self.known.count(given.found, given.by_time, self.n_given)
        if given.heard is not None:
            self._see(*given.heard(), limit)
        self.n_given += given.n
        self.tally.n_lines += given.n
        self.names.meet(given.raw, given.tids, limit)
        return given.raw

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
