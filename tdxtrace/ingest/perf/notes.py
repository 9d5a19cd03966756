"""What do the records of perf data say that are no samples: names, losses, events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tdxtrace.ingest.perf import attrs
from tdxtrace.ingest.perf.attrs import SampleLayout
from tdxtrace.ingest.perf.blocks import Records
from tdxtrace.ingest.perf.file import PerfFile
from tdxtrace.ingest.perf.names import Names
from tdxtrace.ingest.perf.order import Lost, Order
from tdxtrace.ingest.raw import UNKNOWN
from tdxtrace.ingest.records.cursor import Cursor, CutShortError
from tdxtrace.ingest.records.gather import Places
from tdxtrace.ingest.tally import MAX_CPUS, Tally

# enum perf_event_type, Linux include/uapi/linux/perf_event.h, and enum
# perf_user_event_type, tools/perf/lib/include/perf/event.h.
_LOST, _COMM, _THROTTLE, _FORK, _LOST_SAMPLES, _ATTR, _FEATURE = 2, 3, 5, 7, 13, 64, 80
# Records of the kernel (1 to 21) and of perf (64 to 84); those not named above say
# nothing that matters here.
_UNDERSTOOD: Final = frozenset([*range(1, 22), *range(64, 85)])
_FILTERED: Final = 1 << 15  # PERF_RECORD_MISC_LOST_SAMPLES_BPF: not wanted, not lost
_AT_NO_TIME: Final = -1


@dataclass(slots=True)
class Notes:
    """Takes the records that are no samples, one at a time."""

    perf: PerfFile
    tally: Tally
    names: Names
    order: Order
    _place: int = 0
    """Of the record at hand, among those of its block that are no samples."""

    def take(self, records: Records, kind: Places) -> None:
        """Take the records that are no samples; ``kind`` is the type of each."""
        places = records.others
        self.tally.n_lines += len(places)
        self.tally.n_headers += len(places)
        handlers = {
            _LOST: self._lost,
            _COMM: self._comm,
            _THROTTLE: self._throttle,
            _FORK: self._fork,
            _LOST_SAMPLES: self._lost_samples,
            _ATTR: self._attr,
            _FEATURE: self._feature,
        }
        start, end = records.span(places)
        every = zip(kind.tolist(), start.tolist(), end.tolist(), strict=True)
        for place, (number, begin, stop) in enumerate(every):
            self._place = place
            handle = handlers.get(number)
            if handle is None:
                if number not in _UNDERSTOOD:
                    self._unknown("unknown_record", number)
                continue
            data = records.block.data[begin:stop]
            try:
                handle(Cursor(data.tobytes(), self.perf.big_endian, 4))
            except CutShortError:
                self._unknown("undecoded", number)

    def _unknown(self, kind: str, number: int) -> None:
        self.tally.count(kind, f"record of type {number}", None)
        self.tally.n_headers -= 1

    def _trailer(self, data: bytes) -> tuple[int, int]:
        """When and on which CPU a record was made, where it says."""
        attr = self.perf.attrs[0] if self.perf.attrs else None
        if attr is None or not attr.has_trailer:
            return _AT_NO_TIME, UNKNOWN
        places = SampleLayout(attr.sample_type, attr.read_format).trailer
        begin = len(data) - 8 * len(places)
        if begin < 8:
            raise CutShortError
        cursor = Cursor(data, self.perf.big_endian)
        time, cpu = _AT_NO_TIME, UNKNOWN
        if attrs.TIME in places:
            cursor.at = begin + places[attrs.TIME]
            time = min(cursor.number(8), (1 << 63) - 1)
        if attrs.CPU in places:
            cursor.at = begin + places[attrs.CPU]
            number = cursor.number(4)
            cpu = number if number < MAX_CPUS else UNKNOWN
        return time, cpu

    def _lost(self, cursor: Cursor) -> None:
        cursor.take(12)
        n_events = cursor.number(8)
        time, cpu = self._trailer(cursor.data)
        if n_events:
            self.order.lose(Lost(time, cpu, n_events), self._place)
            self.tally.n_headers -= 1

    def _lost_samples(self, cursor: Cursor) -> None:
        """Samples that were never put into a buffer: how many, but not when."""
        misc = cursor.number(2)
        cursor.take(2)
        n_events = cursor.number(8)
        if not misc & _FILTERED:
            self.tally.note("lost_events", n_events, "LOST_SAMPLES record, no place")

    def _throttle(self, cursor: Cursor) -> None:
        time, cpu = self._trailer(cursor.data)
        when = {"start_ns": time} if time >= 0 else {}
        self.tally.note("throttled", None, f"{self.tally.n_lines}", cpu=cpu, **when)

    def _comm(self, cursor: Cursor) -> None:
        cursor.take(8)
        tid, comm = cursor.number(4), cursor.text()
        self.names.rename(max(0, self._trailer(cursor.data)[0]), _signed(tid), comm[:64])

    def _fork(self, cursor: Cursor) -> None:
        cursor.take(4)
        _, _, tid, parent = (cursor.number(4) for _ in range(4))
        time = cursor.number(8)
        self.names.fork(min(time, (1 << 63) - 1), _signed(tid), _signed(parent))

    def _attr(self, cursor: Cursor) -> None:
        """An event's attributes, in pipe mode: their size is their second word."""
        cursor.take(4)
        data = cursor.take(cursor.left)
        size = Cursor(data, self.perf.big_endian, 4).number(4)
        ids = Cursor(data[size:], self.perf.big_endian)
        self.perf.take_attr(data[:size], tuple(ids.number(8) for _ in range(ids.left // 8)))

    def _feature(self, cursor: Cursor) -> None:
        cursor.take(4)
        number = cursor.number(8)
        self.perf.take_feature(number, cursor.take(cursor.left))


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value
