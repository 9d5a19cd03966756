"""Incremental decoding: event rows, thread names and losses since the last tick."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import polars as pl

from tdxtrace.compiler import COMPILE_BYTES, choose
from tdxtrace.ingest.batch import RecordBatch
from tdxtrace.ingest.decode.decoder import Decoder
from tdxtrace.ingest.events.registry import EventRegistry, mapping_of
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.events import SEAMCALLS, VM_ENTRIES

# Age at which an open call or vCPU entry is dropped, as its return was lost: no SEAMCALL takes
# as long, and the host's timer interrupts a vCPU.  A generous choice.
_MAX_OPEN_NS: Final = 300 * 1_000_000_000


@dataclass(frozen=True, slots=True)
class Tick:
    """Events decoded since the last tick."""

    seamcalls: pl.DataFrame
    vm_entries: pl.DataFrame
    losses: pl.DataFrame
    comms: Mapping[int, str]
    n_events: int
    """Lines or records, including events that are not used."""
    last_ns: int | None
    """Time of the newest event so far."""


@dataclass(slots=True)
class _Sink:
    """Buffer of the rows of one tick."""

    seamcalls: list[pl.DataFrame] = field(default_factory=lambda: [SEAMCALLS.empty()])
    vm_entries: list[pl.DataFrame] = field(default_factory=lambda: [VM_ENTRIES.empty()])

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Keep rows of ``seamcalls`` and ``vm_entries``; drop those of other tables."""
        if name == "seamcalls":
            self.seamcalls.append(rows)
        elif name == "vm_entries":
            self.vm_entries.append(rows)


class Ticker:
    """Decoder of events into ticks; counters restart in each, so memory is bounded."""

    def __init__(self, mappings: Iterable[str] = ()) -> None:
        """Set up a decoder.

        Args:
            mappings: ``EVENT=FUNCTION`` for probes that are not named after their function.

        Raises:
            QueryError: If a mapping is malformed.
        """
        functions = {event: (name, role) for event, name, role in map(mapping_of, mappings)}
        self.registry = EventRegistry(functions)
        self.stats = SourceStats()
        self._sink = _Sink()
        # The length of a live trace is unknown: loops are compiled as for a large input.
        self.run = choose(COMPILE_BYTES)
        self._decoder = Decoder(0, self.registry.events, self.stats, self._sink, self.run)
        self._n_lines_before = 0

    def tick(self, batches: Iterable[RecordBatch], *, is_last: bool = False) -> Tick:
        """Decode batches of events; with ``is_last`` also return calls without a return."""
        for batch in batches:
            self._decoder.feed(batch)
        if is_last:
            self._decoder.finish()
        else:
            self._decoder.flush()
        result = Tick(
            pl.concat(self._sink.seamcalls, how="diagonal"),
            pl.concat(self._sink.vm_entries),
            self.stats.losses(0),
            {tid: comm for tid, comm in self.stats.threads if comm != "<...>"},
            self.stats.n_lines - self._n_lines_before,
            self.stats.span()[1],
        )
        self._reset(result.last_ns)
        return result

    def _reset(self, last_ns: int | None) -> None:
        """Clear the counters and rows already returned, and drop old open calls."""
        stats, self._n_lines_before = self.stats, self.stats.n_lines
        stats.reset()
        self._sink.seamcalls = [SEAMCALLS.empty()]
        self._sink.vm_entries = [VM_ENTRIES.empty()]
        if last_ns is not None:
            self._decoder.drop_open(last_ns - _MAX_OPEN_NS)
