"""What was a thread called at a moment: COMM and FORK records, as perf applies them."""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field

import numpy as np

from tdxtrace.ingest.raw import I32Array, RawEvents
from tdxtrace.ingest.tally import Tally

# Threads whose numbers are no farther apart are looked up in a list of so many.
_CLOSE = 1 << 16


@dataclass(slots=True)
class Names:
    """Follows the names of threads through time."""

    tally: Tally
    _changes: list[tuple[int, int, int, int | str]] = field(default_factory=list)
    """Moment, place in the file, thread, and its new name or the thread it is forked from."""
    _named: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    """Name by thread since which moment; only what may still be asked for."""

    def rename(self, ts_ns: int, tid: int, comm: str) -> None:
        """Take a COMM record."""
        insort(self._changes, (ts_ns, len(self._changes), tid, comm), key=lambda x: x[:2])

    def fork(self, ts_ns: int, tid: int, parent: int) -> None:
        """Take a FORK record: the new thread has the name of the one it came from."""
        insort(self._changes, (ts_ns, len(self._changes), tid, parent), key=lambda x: x[:2])

    def meet(self, raw: RawEvents, tids: I32Array, limit: int) -> None:
        """Put the threads of ``raw``, whose events happened up to ``limit``, into the tally.

        Args:
            raw: The events.
            tids: Their threads, ascending.
            limit: The moment.
        """
        self._apply(limit)
        for tid in tids.tolist():
            names = self._named.get(tid)
            mine = np.flatnonzero(raw.tid == tid) if names and len(names) > 1 else None
            tgid = int(raw.tgid[np.argmax(raw.tid == tid)])
            if names is None:
                self._put(tid, "swapper" if tid == 0 else f":{tid}", tgid)
            elif mine is None:
                self._put(tid, names[0][1], tgid)
            else:
                since = np.array([moment for moment, _ in names], np.int64)
                places = np.searchsorted(since, raw.ts_ns[mine], "right") - 1
                for place in np.unique(np.maximum(places, 0)).tolist():
                    self._put(tid, names[place][1], tgid)
                self._named[tid] = names[-1:]

    def _put(self, tid: int, comm: str, tgid: int) -> None:
        self.tally.meet(tid, comm, tgid)

    def _apply(self, limit: int) -> None:
        due = bisect_right(self._changes, limit, key=lambda change: change[0])
        for ts_ns, _, tid, what in self._changes[:due]:
            if isinstance(what, str):
                comm: str | None = what
            else:
                parent = self._named.get(what)
                comm = parent[-1][1] if parent else None
            if comm is not None:
                self._named.setdefault(tid, []).append((ts_ns, comm))
        del self._changes[:due]


def distinct(numbers: I32Array) -> I32Array:
    """The numbers that occur, in order: threads are often close to each other."""
    if not len(numbers):
        return numbers
    least = int(numbers.min())
    if int(numbers.max()) - least >= _CLOSE:
        return np.unique(numbers)
    found = np.flatnonzero(np.bincount(numbers - least)) + least
    return found.astype(np.int32)
