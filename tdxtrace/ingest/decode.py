"""From raw events to event tables, in batches whose size does not depend on the input's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.ingest.calls import Calls
from tdxtrace.ingest.kinds import Kinds
from tdxtrace.ingest.kvm import Entries, host_events, page_faults
from tdxtrace.ingest.raw import RawEvents, concatenate
from tdxtrace.ingest.tally import Tally
from tdxtrace.ingest.vocabulary import Event
from tdxtrace.tables.events import EVENT_TABLES

# Events decoded at a time: columns of a batch (about 30 words each) take some
# 30 MiB, and the cost of a call into numpy or polars is spread over enough rows.
BATCH_EVENTS: Final = 1 << 17


@dataclass(slots=True)
class Decoder:
    """Collects raw events of one source and turns them into tables as they come."""

    source: int
    events: list[Event]
    tally: Tally
    tables: dict[str, list[pl.DataFrame]] = field(default_factory=dict)
    _waiting: list[RawEvents] = field(default_factory=list)
    _n_waiting: int = 0
    _calls: Calls = field(init=False)
    _entries: Entries = field(init=False)

    def __post_init__(self) -> None:
        self._calls = Calls(self.source, self.tally)
        self._entries = Entries(self.source)

    def feed(self, raw: RawEvents) -> None:
        """Take events, in the order of the source."""
        self._waiting.append(raw)
        self._n_waiting += len(raw)
        if self._n_waiting >= BATCH_EVENTS:
            self._decode()

    def finish(self) -> dict[str, pl.DataFrame]:
        """Return every event table but ``threads`` and ``losses``, whole."""
        self._decode()
        self._add("seamcalls", self._calls.finish(Kinds.of(self.events)))
        self._add("vm_entries", self._entries.finish())
        return {
            table.name: pl.concat([table.empty(), *self.tables.get(table.name, [])], rechunk=False)
            for table in EVENT_TABLES
            if table.name not in ("threads", "losses")
        }

    def _decode(self) -> None:
        if not self._n_waiting:
            return
        parts, self._waiting, self._n_waiting = self._waiting, [], 0
        kinds = Kinds.of(self.events)
        self._add("seamcalls", self._calls.feed(self._of_kind(parts, "call"), kinds))
        self._add("vm_entries", self._entries.feed(self._of_kind(parts, "vm_entry"), kinds))
        faults = concatenate(self._of_kind(parts, "page_fault"))
        self._add("page_faults", page_faults(faults, self.source))
        others = concatenate(self._of_kind(parts, "host_event"))
        self._add("host_events", host_events(others, self.source, self.events))

    def _of_kind(self, parts: list[RawEvents], kind: str) -> list[RawEvents]:
        wanted = np.array([event.kind == kind for event in self.events], np.bool_)
        picked = ((part, wanted[part.event]) for part in parts)
        return [part if mine.all() else part.take(mine) for part, mine in picked if mine.any()]

    def _add(self, name: str, rows: pl.DataFrame) -> None:
        if rows.height:
            self.tables.setdefault(name, []).append(rows)
