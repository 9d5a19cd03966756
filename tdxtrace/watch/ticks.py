"""What came since the last look: rows of the event tables, names of threads, losses."""

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

# A call or a stay in the guest that began so long ago has lost its end: no SEAMCALL takes
# as long, and a vCPU is interrupted by the host's timer.  A choice, and generous.
_FORGET_NS: Final = 300 * 1_000_000_000


@dataclass(frozen=True, slots=True)
class Tick:
    """What came between two looks."""

    seamcalls: pl.DataFrame
    vm_entries: pl.DataFrame
    losses: pl.DataFrame
    comms: Mapping[int, str]
    n_events: int
    """Lines or records, our own and others."""
    last_ns: int | None
    """Time of the newest event so far."""


@dataclass(slots=True)
class _Sink:
    """Keeps the rows of one tick."""

    seamcalls: list[pl.DataFrame] = field(default_factory=lambda: [SEAMCALLS.empty()])
    vm_entries: list[pl.DataFrame] = field(default_factory=lambda: [VM_ENTRIES.empty()])

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Keep rows of the tables that are looked at."""
        if name == "seamcalls":
            self.seamcalls.append(rows)
        elif name == "vm_entries":
            self.vm_entries.append(rows)


class Ticker:
    """Turns events into ticks; what is counted is counted anew in each, so nothing grows."""

    def __init__(self, mappings: Iterable[str] = ()) -> None:
        """Begin.

        Args:
            mappings: ``EVENT=FUNCTION`` for probes whose names say nothing.

        Raises:
            QueryError: If a mapping is none.
        """
        told = {event: (name, role) for event, name, role in map(mapping_of, mappings)}
        self.registry = EventRegistry(told)
        self.stats = SourceStats()
        self._sink = _Sink()
        # What is followed goes on and on: it is large.
        run = choose(COMPILE_BYTES)
        self._decoder = Decoder(0, self.registry.events, self.stats, self._sink, run)
        self._n_before = 0

    def tick(self, batches: Iterable[RecordBatch], *, is_last: bool = False) -> Tick:
        """Decode what came; at the end also what waits for returns that will not come."""
        for batch in batches:
            self._decoder.feed(batch)
        if is_last:
            self._decoder.finish()
        else:
            self._decoder.flush()
        made = Tick(
            pl.concat(self._sink.seamcalls, how="diagonal"),
            pl.concat(self._sink.vm_entries),
            self.stats.losses(0),
            {tid: comm for tid, comm in self.stats.threads if comm != "<...>"},
            self.stats.n_lines - self._n_before,
            self.stats.span()[1],
        )
        self._renew(made.last_ns)
        return made

    def _renew(self, last_ns: int | None) -> None:
        """Forget what was told; go on counting where we are."""
        stats, self._n_before = self.stats, self.stats.n_lines
        stats.gaps.clear()
        stats.entries.clear()
        stats.threads.clear()
        stats.events.clear()
        self._sink.seamcalls = [SEAMCALLS.empty()]
        self._sink.vm_entries = [VM_ENTRIES.empty()]
        if last_ns is not None:
            self._decoder.forget(last_ns - _FORGET_NS)
