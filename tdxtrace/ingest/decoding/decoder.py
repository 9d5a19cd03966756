"""From raw events to event tables, in batches whose size does not depend on the input's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.ingest.decoding.calls import Calls
from tdxtrace.ingest.decoding.frames import Room
from tdxtrace.ingest.decoding.kinds import Kinds
from tdxtrace.ingest.decoding.kvm import Entries, host_events, page_faults
from tdxtrace.ingest.decoding.sinks import Sink
from tdxtrace.ingest.events.vocabulary import Event
from tdxtrace.ingest.memory import keep_freed
from tdxtrace.ingest.raw import MANY_EVENTS, RawEvents, concatenate
from tdxtrace.ingest.tally import Tally

# Events decoded at a time: columns of a batch (about 30 words each) take some
# 30 MiB, and the cost of a call into numpy or polars is spread over enough rows.
BATCH_EVENTS: Final = 1 << 17


@dataclass(slots=True)
class Decoder:
    """Collects raw events of one source and turns them into rows as they come."""

    source: int
    events: list[Event]
    tally: Tally
    sink: Sink
    is_large: bool = False
    """Whether compiled loops pay."""
    _waiting: list[RawEvents] = field(default_factory=list)
    _n_waiting: int = 0
    _calls: Calls = field(init=False)
    _entries: Entries = field(init=False)

    def __post_init__(self) -> None:
        keep_freed()
        room = Room() if self.sink.keeps_rows else None
        self._calls = Calls(self.source, self.tally, room, self.is_large)
        self._entries = Entries(self.source)

    def feed(self, raw: RawEvents) -> None:
        """Take events, in the order of the source."""
        self._waiting.append(raw)
        self._n_waiting += len(raw)
        if self._n_waiting >= BATCH_EVENTS or len(raw) >= MANY_EVENTS:
            self._decode()

    def flush(self) -> None:
        """Decode what was fed, however little it is: for what is looked at as it comes."""
        self._decode()
        self._add_calls(self._calls.rest())

    def forget(self, before_ns: int) -> None:
        """Drop what began before ``before_ns`` and has not ended: its end was lost."""
        self._calls.forget(before_ns)
        self._entries.forget(before_ns)

    def finish(self) -> None:
        """Hand over what waits for events that will not come."""
        self._decode()
        self._add_calls(self._calls.finish(Kinds.of(self.events)))
        self.sink.add("vm_entries", self._entries.finish())

    def _add_calls(self, frames: list[pl.DataFrame]) -> None:
        for rows in frames:
            self.sink.add("seamcalls", rows)

    def _decode(self) -> None:
        if not self._n_waiting:
            return
        parts, self._waiting, self._n_waiting = self._waiting, [], 0
        # A reader may meet further events meanwhile, in a thread of its own.
        events = list(self.events)
        kinds = Kinds.of(events)
        by_kind = _by_kind(parts, events)
        if calls := by_kind.get("call"):
            self._add_calls(self._calls.feed(calls, kinds))
        if entries := by_kind.get("vm_entry"):
            self.sink.add("vm_entries", self._entries.feed(entries, kinds))
        if faults := by_kind.get("page_fault"):
            raw = concatenate(faults)
            self.sink.add("page_faults", page_faults(raw, self.source))
        if others := by_kind.get("host_event"):
            raw = concatenate(others)
            self.sink.add("host_events", host_events(raw, self.source, events))


def _by_kind(parts: list[RawEvents], events: list[Event]) -> dict[str, list[RawEvents]]:
    """The events of each kind: whole parts where they hold no other."""
    kinds = np.array([event.kind for event in events])
    found: dict[str, list[RawEvents]] = {}
    rows = {event.kind for event in events} - {"noise", "unmapped"}
    if rows == {"call"}:
        return {"call": parts}
    for part in parts:
        # To count the few events is quicker than to look up what each line is.
        met = np.unique(kinds[np.flatnonzero(np.bincount(part.event))]).tolist()
        for kind in met:
            mine = part if len(met) == 1 else part.take((kinds == kind)[part.event])
            # The fields of calls are read when their rows are made.
            found.setdefault(kind, []).append(mine if kind == "call" else mine.settled())
    return found
