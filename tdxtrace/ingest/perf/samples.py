"""What the samples of a block hold: whose they are, when they were taken, their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.perf import attrs
from tdxtrace.ingest.perf.attrs import Attr, SampleLayout
from tdxtrace.ingest.perf.blocks import Records
from tdxtrace.ingest.raw import UNKNOWN, I64Array, U64Array
from tdxtrace.ingest.records.formats import Common, EventFormat, Field
from tdxtrace.ingest.records.gather import Block, Places
from tdxtrace.ingest.tally import MAX_CPUS

_HEADER: Final = 8
_WORD: Final = Field("word", 0, 8, False, True)
_FAR: Final = np.uint64((1 << 63) - 1)
NO_EVENT: Final = -1
_NO_CPU: Final = np.uint64((1 << 64) - 1)  # UNKNOWN, once it is cut to 32 bits


@dataclass(slots=True)
class Samples:
    """The samples of a block, one entry each, in the order of the file."""

    block: Block
    ts_ns: I64Array
    cpu: NDArray[np.int32]
    tid: NDArray[np.int32]
    tgid: NDArray[np.int32]
    number: NDArray[np.intp]
    """Number of the tracepoint; NO_EVENT for samples that hold no record."""
    base: Places
    """Where the record begins."""
    size: Places
    silent: Places = field(default_factory=lambda: np.zeros(0, np.intp))
    """Which of the samples hold no record."""
    attr: Places = field(default_factory=lambda: np.zeros(0, np.intp))
    """The event that each of those is of."""

    def __len__(self) -> int:
        return len(self.ts_ns)


@dataclass(slots=True)
class SampleReader:
    """Reads samples by the layouts of the events that were recorded."""

    attrs: list[Attr] = field(default_factory=list)
    common: Common | None = None
    _ids: U64Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    _attr_of_id: NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))

    def learn(self, attrs: list[Attr], common: Common) -> None:
        """Take the attributes and where records keep their numbers."""
        self.attrs, self.common = list(attrs), common
        pairs = sorted({i: n for n, attr in enumerate(attrs) for i in attr.ids}.items())
        self._ids = np.array([i for i, _ in pairs], np.uint64)
        self._attr_of_id = np.array([n for _, n in pairs], np.intp)

    def read(self, records: Records) -> Samples:
        """Read the samples among ``records``."""
        block = records.block
        start, end = records.span(records.samples)
        body, n = start + _HEADER, len(start)
        made = Samples(
            block=block,
            ts_ns=np.zeros(n, np.int64),
            cpu=np.full(n, UNKNOWN, np.int32),
            tid=np.full(n, UNKNOWN, np.int32),
            tgid=np.full(n, UNKNOWN, np.int32),
            number=np.full(n, NO_EVENT, np.intp),
            base=body.copy(),
            size=np.zeros(n, np.intp),
        )
        layouts = {SampleLayout(a.sample_type, a.read_format) for a in self.attrs}
        if len(layouts) == 1:
            self._fill(made, layouts.pop(), slice(None), body, end)
            layouts = set()
        attr = self.attrs_of(block, body, end) if layouts else None
        for layout in layouts:
            mine = self._of_layout(layout)[attr]
            self._fill(made, layout, mine, body[mine], end[mine])
        silent = np.flatnonzero(made.number == NO_EVENT)
        if len(silent):
            made.silent = silent
            made.attr = self.attrs_of(block, body[silent], end[silent])
        return made

    def ids(self) -> tuple[U64Array, NDArray[np.intp]]:
        """The ids of samples, sorted, and the attribute of each."""
        return self._ids, self._attr_of_id

    def _of_layout(self, layout: SampleLayout) -> NDArray[np.bool_]:
        return np.array(
            [
                (a.sample_type, a.read_format) == (layout.sample_type, layout.read_format)
                for a in self.attrs
            ]
        )

    def attrs_of(self, block: Block, body: Places, end: Places) -> NDArray[np.intp]:
        """Which event each sample is of: by its id, or there is only one kind."""
        places = {SampleLayout(a.sample_type, a.read_format).id_at for a in self.attrs}
        place = places.pop() if len(places) == 1 else None
        if place is None or not len(self._ids):
            return np.zeros(len(body), np.intp)
        at = np.where(body + place + 8 <= end, body + place, body - _HEADER)
        found = np.searchsorted(self._ids, block.column(at, _WORD))
        return self._attr_of_id[np.minimum(found, len(self._ids) - 1)]

    def _fill(
        self,
        made: Samples,
        layout: SampleLayout,
        mine: slice | NDArray[np.bool_] | Places,
        body: Places,
        end: Places,
    ) -> None:
        block, fixed = made.block, layout.fixed
        is_whole = body + 8 * len(fixed) <= end
        if not is_whole.all():
            # One shorter than its fixed part says nothing.
            mine = np.arange(len(made))[mine][is_whole]
            body, end = body[is_whole], end[is_whole]
        found = block.columns(body, _places(fixed))
        if attrs.TIME in fixed:
            made.ts_ns[mine] = np.minimum(found["time"], _FAR).view(np.int64)
        if attrs.TID in fixed:
            made.tgid[mine], made.tid[mine] = found["tgid"], found["tid"]
        if attrs.CPU in fixed:
            cpu = found["cpu"]
            made.cpu[mine] = np.where(cpu < MAX_CPUS, cpu, _NO_CPU).astype(np.int32)
        if layout.sample_type & attrs.RAW and self.common is not None:
            base, size = layout.raw_at(block, body, end)
            place = self.common.type
            is_there = size >= place.end
            number = block.numbers(np.where(is_there, base, 0), place)
            made.number[mine] = np.where(is_there, number, NO_EVENT)
            made.base[mine], made.size[mine] = base, size


def _places(fixed: Mapping[int, int]) -> dict[str, Field]:
    """Where a sample keeps what every event has, for those parts that it has."""
    return {
        name: Field(name, fixed[part] + offset, size, signed, True)
        for part, name, offset, size, signed in (
            (attrs.TIME, "time", 0, 8, False),
            (attrs.TID, "tgid", 0, 4, True),
            (attrs.TID, "tid", 4, 4, True),
            (attrs.CPU, "cpu", 0, 4, True),
        )
        if part in fixed
    }


def noise_name(attr: Attr, names: Mapping[int, str]) -> str:
    """What perf calls the event of an attribute, for those that are no tracepoints."""
    named = next((names[i] for i in attr.ids if i in names), None)
    return named or f"event type {attr.type} config {attr.config:#x}"


def printed_name(made: EventFormat) -> str:
    """What perf script prints as the name of a tracepoint."""
    return f"{made.system}:{made.name}"
