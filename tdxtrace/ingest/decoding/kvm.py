"""From KVM's tracepoints to vCPU entries, page faults and other host events."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from tdxtrace.ingest.decoding.frames import Values, frame
from tdxtrace.ingest.decoding.kinds import Kinds
from tdxtrace.ingest.decoding.pairing import Index, pair_next
from tdxtrace.ingest.events.vocabulary import Event
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, RawEvents, concatenate
from tdxtrace.tables.events import HOST_EVENTS, PAGE_FAULTS, VM_ENTRIES

_EXIT_FIELDS = ("exit_reason", "info1", "info2", "intr_info", "error_code", "rip", "requests")


@dataclass(slots=True)
class Entries:
    """Pairs kvm_entry with kvm_exit by thread and keeps the vCPUs still inside."""

    source: int
    open: RawEvents = field(default_factory=lambda: concatenate([]))

    def feed(self, parts: list[RawEvents], kinds: Kinds) -> pl.DataFrame:
        """Return the ``vm_entries`` rows that ``parts`` complete."""
        batch = concatenate([self.open, *parts])
        entry, back, given_up, orphan = _pair(batch, kinds)
        still = np.ones(len(batch), np.bool_)
        still[np.concatenate([entry, back, given_up, orphan])] = False
        self.open = batch.take(still)
        return self._frame(batch, entry, back, given_up, orphan)

    def forget(self, before_ns: int) -> None:
        """Drop what began before ``before_ns`` and is still open."""
        if len(self.open) and (self.open.ts_ns < before_ns).any():
            self.open = self.open.take(self.open.ts_ns >= before_ns)

    def finish(self) -> pl.DataFrame:
        """Return the entries whose exit was never seen."""
        batch, self.open = self.open, concatenate([])
        none = np.zeros(0, np.intp)
        return self._frame(batch, none, none, np.arange(len(batch)), none)

    def _frame(
        self, batch: RawEvents, entry: Index, back: Index, alone: Index, orphan: Index
    ) -> pl.DataFrame:
        first = np.concatenate([entry, alone, orphan])
        last = np.concatenate([back, alone, orphan])
        n = len(first)
        has_start = np.arange(n) < len(entry) + len(alone)
        has_end = np.concatenate([np.ones(len(entry)), np.zeros(len(alone)), np.ones(len(orphan))])
        ended = has_end.astype(np.bool_)
        columns, seen = _common(batch, last, self.source, has_start.astype(np.uint8) + ended)
        columns |= {"start_ns": batch.ts_ns[first], "end_ns": batch.ts_ns[last]}
        seen |= {"start_ns": has_start, "end_ns": ended}
        vcpu = batch.has("vcpu_id")[last]
        columns["vcpu_id"] = np.where(
            vcpu, batch.value("vcpu_id")[last], batch.value("vcpu_id")[first]
        )
        seen["vcpu_id"] = vcpu | batch.has("vcpu_id")[first]
        for name in _EXIT_FIELDS:
            columns[name] = batch.value(name)[last]
            seen[name] = batch.has(name)[last] & ended
        columns["immediate_exit"] = batch.value("immediate_exit")[first] != 0
        seen["immediate_exit"] = batch.has("immediate_exit")[first] & has_start
        made = frame(VM_ENTRIES, n, columns, seen)
        return made.sort("seq") if len(alone) or len(orphan) else made


def page_faults(raw: RawEvents, source: int) -> pl.DataFrame:
    """Return one ``page_faults`` row per event of ``raw``."""
    every = np.arange(len(raw))
    columns, seen = _common(raw, every, source, np.ones(len(raw), np.uint8))
    columns["ts_ns"] = raw.ts_ns
    _copy(raw, ("vcpu_id", "gpa", "error_code", "rip"), columns, seen)
    return frame(PAGE_FAULTS, len(raw), columns, seen)


def host_events(raw: RawEvents, source: int, events: list[Event]) -> pl.DataFrame:
    """Return one ``host_events`` row per event of ``raw``."""
    every = np.arange(len(raw))
    columns, seen = _common(raw, every, source, np.ones(len(raw), np.uint8))
    columns["ts_ns"] = raw.ts_ns
    _copy(raw, ("vcpu_id", "reason", "errno", "gpa"), columns, seen)
    names = [e.name.rpartition(":")[2] for e in events]
    texts = pl.Series([names[i] for i in raw.event.tolist()], dtype=pl.String)
    return frame(HOST_EVENTS, len(raw), columns, seen, {"event": texts})


def _pair(batch: RawEvents, kinds: Kinds) -> tuple[Index, Index, Index, Index]:
    # A thread runs one vCPU, and enters it again only after it came out.
    thread = np.where(batch.tid != UNKNOWN, batch.tid, -2 - batch.cpu).astype(np.int64)
    return pair_next(thread, kinds.is_return[batch.event])


def _common(
    batch: RawEvents, at: Index, source: int, n_lines: Values
) -> tuple[dict[str, Values], dict[str, BoolArray]]:
    columns: dict[str, Values] = {
        "source": np.full(len(at), source, np.uint16),
        "seq": batch.line[at].astype(np.uint64),
        "cpu": batch.cpu[at],
        "tid": batch.tid[at],
        "tgid": batch.tgid[at],
        "n_lines": n_lines.astype(np.uint8),
    }
    return columns, {name: columns[name] != UNKNOWN for name in ("cpu", "tid", "tgid")}


def _copy(
    raw: RawEvents,
    names: tuple[str, ...],
    columns: dict[str, Values],
    seen: dict[str, BoolArray],
) -> None:
    for name in names:
        columns[name] = raw.value(name)
        seen[name] = raw.has(name)
