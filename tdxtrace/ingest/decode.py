"""From raw events to event tables, in batches whose size does not depend on the input's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tdxtrace.ingest.calls import Calls
from tdxtrace.ingest.kinds import Kinds
from tdxtrace.ingest.kvm import Entries, host_events, page_faults
from tdxtrace.ingest.raw import RawEvents, concatenate
from tdxtrace.ingest.sinks import Sink
from tdxtrace.ingest.tally import Tally
from tdxtrace.ingest.vocabulary import Event

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

    def finish(self) -> None:
        """Hand over what waits for events that will not come."""
        self._decode()
        self.sink.add("seamcalls", self._calls.finish(Kinds.of(self.events)))
        self.sink.add("vm_entries", self._entries.finish())

    def _decode(self) -> None:
        if not self._n_waiting:
            return
        raw = concatenate(self._waiting)
        self._waiting, self._n_waiting = [], 0
        # A reader may meet further events meanwhile, in a thread of its own.
        events = list(self.events)
        kinds = Kinds.of(events)
        parts = {
            kind: _select(raw, [event.kind == kind for event in events])
            for kind in ("call", "vm_entry", "page_fault", "host_event")
        }
        if len(parts["call"]):
            self.sink.add("seamcalls", self._calls.feed(parts["call"], kinds))
        if len(parts["vm_entry"]):
            self.sink.add("vm_entries", self._entries.feed(parts["vm_entry"], kinds))
        if len(parts["page_fault"]):
            self.sink.add("page_faults", page_faults(parts["page_fault"], self.source))
        if len(parts["host_event"]):
            self.sink.add("host_events", host_events(parts["host_event"], self.source, events))


def _select(raw: RawEvents, is_wanted: list[bool]) -> RawEvents:
    wanted = np.array(is_wanted, np.bool_)[raw.event]
    return raw if wanted.all() else raw.take(wanted)
