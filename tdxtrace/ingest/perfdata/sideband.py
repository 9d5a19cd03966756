"""Records of perf data that are no samples: names of threads, losses, events, rounds."""

from __future__ import annotations

import struct
from bisect import bisect_right, insort
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.batch import MAX_CPUS, UNKNOWN, I32Array, Index, RecordBatch
from tdxtrace.ingest.perfdata.file import CPU, TIME, PerfFile
from tdxtrace.ingest.perfdata.ordered_events import Lost, OrderedEvents
from tdxtrace.ingest.records.datafile import CutShortError
from tdxtrace.ingest.stats import SourceStats

# enum perf_event_type, Linux include/uapi/linux/perf_event.h, and enum
# perf_user_event_type, tools/perf/lib/include/perf/event.h.
_LOST, _COMM, _THROTTLE, _FORK, _LOST_SAMPLES = 2, 3, 5, 7, 13
_ATTR, _FINISHED_ROUND, _FEATURE = 64, 68, 80
# Records of the kernel (1 to 21) and of perf (64 to 84); those not named above say
# nothing that matters here.
_UNDERSTOOD: Final = frozenset([*range(1, 22), *range(64, 85)])
_FILTERED: Final = 1 << 15  # PERF_RECORD_MISC_LOST_SAMPLES_BPF: not wanted, not lost
_AT_NO_TIME: Final = -1
_MAX_TIME: Final = (1 << 63) - 1
_HEADER: Final = struct.Struct("<IHH")  # type, misc, size
_COMM_NAME_AT: Final = 16
_MAX_NAME: Final = 64


@dataclass(slots=True)
class ThreadNames:
    """The names of threads through time, as COMM and FORK records tell them."""

    stats: SourceStats
    _changes: list[tuple[int, int, int, int | str]] = field(default_factory=list)
    """Time, place in the file, thread, and its new name or the thread it is forked from."""
    _named: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    """Name by thread since which time; only what may still be asked for."""

    def change(self, ts_ns: int, tid: int, name: int | str) -> None:
        """Take the new name of a thread, or the thread that it is forked from."""
        insort(self._changes, (ts_ns, len(self._changes), tid, name), key=lambda x: x[:2])

    def record(self, batch: RecordBatch, limit: int, tids: I32Array, first_row: Index) -> None:
        """Record the threads of events under the names that they had then.

        Args:
            batch: The events.
            limit: Up to when, in ns, they happened.
            tids: Their threads.
            first_row: The first event of each.
        """
        self._apply(limit)
        for tid, row in zip(tids.tolist(), first_row.tolist(), strict=True):
            names, tgid = self._named.get(tid), int(batch.tgid[row])
            if names is None:
                self.stats.record_thread(tid, "swapper" if tid == 0 else f":{tid}", tgid)
            elif len(names) == 1:
                self.stats.record_thread(tid, names[0][1], tgid)
            else:
                since = np.array([ts_ns for ts_ns, _ in names], np.int64)
                places = np.searchsorted(since, batch.ts_ns[batch.tid == tid], "right") - 1
                for place in np.unique(np.maximum(places, 0)).tolist():
                    self.stats.record_thread(tid, names[place][1], tgid)
                self._named[tid] = names[-1:]

    def _apply(self, limit: int) -> None:
        due = bisect_right(self._changes, limit, key=lambda change: change[0])
        for ts_ns, _, tid, what in self._changes[:due]:
            if isinstance(what, str):
                name: str | None = what
            else:
                parent = self._named.get(what)
                name = parent[-1][1] if parent else None
            if name is not None:
                self._named.setdefault(tid, []).append((ts_ns, name))
        del self._changes[:due]


@dataclass(slots=True)
class SidebandRecords:
    """Takes the records that are no samples, one at a time, in the order of the file."""

    perf: PerfFile
    stats: SourceStats
    names: ThreadNames
    ordered: OrderedEvents

    def take(self, record: bytes, newest: int) -> None:
        """Take a record; the newest sample in front of it is of the time ``newest``."""
        kind, _, _ = _HEADER.unpack_from(record)
        self.stats.n_lines += 1
        self.stats.n_headers += 1
        takers = {
            _LOST: self._lost,
            _COMM: self._comm,
            _THROTTLE: self._throttle,
            _FORK: self._fork,
            _LOST_SAMPLES: self._lost_samples,
            _ATTR: self._attr,
            _FINISHED_ROUND: self._finished_round,
            _FEATURE: self._feature,
        }
        if kind in takers:
            try:
                takers[kind](record, newest)
            except (CutShortError, struct.error):
                self._not_understood("undecoded", kind)
        elif kind not in _UNDERSTOOD:
            self._not_understood("unknown_record", kind)

    def _not_understood(self, loss: str, kind: int) -> None:
        self.stats.count(loss, f"record of type {kind}", None)
        self.stats.n_headers -= 1

    def _trailer(self, record: bytes) -> tuple[int, int]:
        """When and on which CPU a record was made, where it says."""
        places = self.perf.attrs[0].trailer if self.perf.attrs else None
        if places is None:
            return _AT_NO_TIME, UNKNOWN
        begin = len(record) - 8 * len(places)
        if begin < _HEADER.size:
            raise CutShortError
        time, cpu = _AT_NO_TIME, UNKNOWN
        if TIME in places:
            time = min(struct.unpack_from("<Q", record, begin + places[TIME])[0], _MAX_TIME)
        if CPU in places:
            (number,) = struct.unpack_from("<I", record, begin + places[CPU])
            cpu = number if number < MAX_CPUS else UNKNOWN
        return time, cpu

    def _lost(self, record: bytes, newest: int) -> None:
        """Take how many samples were dropped; if not told when, behind those in front of it."""
        _, n_events = struct.unpack_from("<QQ", record, 8)
        time, cpu = self._trailer(record)
        if n_events:
            self.ordered.lose(Lost(newest if time < 0 else time, cpu, n_events))
            self.stats.n_headers -= 1

    def _lost_samples(self, record: bytes, _: int) -> None:
        """Take how many samples were never put into a buffer: not told when."""
        misc, _, n_events = struct.unpack_from("<HHQ", record, 4)
        if not misc & _FILTERED:
            self.stats.record_loss("lost_events", n_events, "LOST_SAMPLES record, no place")

    def _throttle(self, record: bytes, _: int) -> None:
        time, cpu = self._trailer(record)
        when = {"start_ns": time} if time >= 0 else {}
        self.stats.record_loss("throttled", None, f"{self.stats.n_lines}", cpu=cpu, **when)

    def _comm(self, record: bytes, _: int) -> None:
        _, tid = struct.unpack_from("<ii", record, 8)
        end = record.find(b"\0", _COMM_NAME_AT)
        if end < 0:
            raise CutShortError
        name = record[_COMM_NAME_AT:end].decode("utf-8", "replace")[:_MAX_NAME]
        self.names.change(max(0, self._trailer(record)[0]), tid, name)

    def _fork(self, record: bytes, _: int) -> None:
        _, _, tid, parent, time = struct.unpack_from("<iiiiQ", record, 8)
        self.names.change(min(time, _MAX_TIME), tid, parent)

    def _attr(self, record: bytes, _: int) -> None:
        """Take an event's attributes, in pipe mode: their size is their second word."""
        (size,) = struct.unpack_from("<I", record, 12)
        self.perf.take_attr(record[8 : 8 + size], record[8 + size :])

    def _finished_round(self, _: bytes, newest: int) -> None:
        self.ordered.end_round(newest)

    def _feature(self, record: bytes, _: int) -> None:
        (number,) = struct.unpack_from("<Q", record, 8)
        self.perf.take_feature(number, record[16:])
