"""Decode batches of events into event tables, and write these to a sink: memory or a store.

Memory use of the decoder does not depend on the size of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, Protocol

import numpy as np
import polars as pl

from tdxtrace.compiler import Runner, interpreted
from tdxtrace.ingest.batch import RecordBatch, concatenate
from tdxtrace.ingest.decode.calls import Calls, VmEntries, host_events, page_faults
from tdxtrace.ingest.decode.copies import drop_copies, end_of_group
from tdxtrace.ingest.decode.entry_starts import EntryStarts, fill_starts
from tdxtrace.ingest.decode.events import Kinds
from tdxtrace.ingest.decode.implied_losses import LossDetector
from tdxtrace.ingest.events.registry import Event
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.schema import Table
from tdxtrace.tdx import leaves, wrappers

# A page of level n (4K = 0) is aligned to 12 + 9 n bits: Intel SDM, EPT paging.
_BITS_4K = 12
_BITS_PER_LEVEL = 9


@dataclass(slots=True)
class LevelBaseDetector:
    """Detects from page levels, batch by batch, which level number a 4K page has.

    Up to Linux 7.1 the wrappers take the module's level (4K = 0), from 7.2 on ``enum
    pg_level`` (4K = 1): the same probe prints other numbers.  A level 0 proves the
    former; a page that is not aligned to its size under the former proves the latter.
    """

    has_levels: bool = False
    has_zero: bool = False
    has_misaligned: bool = False

    def observe(self, seamcalls: pl.DataFrame) -> None:
        """Examine further ``seamcalls`` rows, with levels as captured."""
        if self.has_zero or seamcalls["level"].null_count() == seamcalls.height:
            return
        columns = seamcalls.select("probe", "level", "leaf", "gpa")
        levels = columns.filter(pl.col("probe") != "seamcall", pl.col("level").is_not_null())
        if levels.is_empty():
            return
        self.has_levels = True
        self.has_zero = bool((levels["level"] == 0).any())
        bits = _BITS_4K + _BITS_PER_LEVEL * pl.col("level").cast(pl.UInt64)
        misaligned = pl.col("gpa") % pl.lit(2, pl.UInt64).pow(bits) != 0
        paged = levels.filter(pl.col("leaf") != leaves.parse_leaf("TDH.MEM.SEPT.ADD")[0])
        self.has_misaligned |= bool(paged.select(misaligned.any()).item())

    def base(self, given: int | None, kernels: Sequence[str | None]) -> tuple[int, str]:
        """Return the level number of a 4K page and the reason for it, as text.

        Args:
            given: The base given by the user, if any.
            kernels: Kernel versions recorded in the inputs.
        """
        if given is not None:
            return given, "given by the user"
        if not self.has_levels:
            return 0, "no levels in the capture"
        if self.has_zero:
            return 0, "a level 0 occurs"
        if self.has_misaligned:
            return 1, "pages are not aligned to the size that a 0-based level would mean"
        named = {
            base for kernel in kernels if kernel and (base := wrappers.level_base(kernel)) in (0, 1)
        }
        if len(named) == 1:
            return named.pop(), f"kernel {next(k for k in kernels if k)}"
        return 0, "assumed; use --level-base 1 for Linux 7.2 and later"


def normalize_levels(seamcalls: pl.DataFrame, base: int) -> pl.DataFrame:
    """Return ``seamcalls`` with 4K as level 0; SEAMCALL registers always use that."""
    if base == 0:
        return seamcalls
    raw = pl.col("probe") == "seamcall"
    lowered = (
        pl.when(raw | (pl.col("level") < base))
        .then("level")
        .otherwise(pl.col("level") - pl.lit(base, pl.UInt8))
    )
    return seamcalls.with_columns(level=lowered)


class Sink(Protocol):
    """Receiver of rows of event tables as they are decoded."""

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Append rows to the table ``name``."""


@dataclass(slots=True)
class MemorySink:
    """Sink that keeps all rows in memory."""

    tables: dict[str, list[pl.DataFrame]] = field(default_factory=dict)

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Append rows to the table ``name``."""
        self.tables.setdefault(name, []).append(rows)

    def result(self) -> dict[str, pl.DataFrame]:
        """Return every event table by name, in the catalog's order."""
        return {table.name: self._joined(table) for table in EVENT_TABLES}

    def _joined(self, table: Table) -> pl.DataFrame:
        """Concatenate the frames of a table; some may lack optional columns."""
        if table.name not in self.tables:
            return table.empty()
        frames = [table.empty(), *self.tables[table.name]]
        rows = pl.concat(frames, how="diagonal", rechunk=False)
        return rows.select(column.name for column in table.columns if column.name in rows)


@dataclass(slots=True)
class SourceSink:
    """Passes the rows of one source to ``target`` and to the detectors of levels and losses."""

    target: Sink
    level_base: LevelBaseDetector
    losses: LossDetector = field(default_factory=LossDetector)
    n_rows: int = 0
    n_intel: int = 0
    """Rows that only Intel hosts have: SEAMCALLs, and exits with a reason of VMX."""

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Pass rows of the table ``name`` to the target and the detectors."""
        if not rows.height:
            return
        self.n_rows += rows.height
        if name == "seamcalls":
            self.n_intel += rows.height
            self.level_base.observe(rows)
            self.losses.observe_calls(rows)
        elif name == "vm_entries":
            self.n_intel += rows["exit_reason"].count()
            self.losses.observe_entries(rows)
        self.target.add(name, rows)


# Events decoded at a time: columns of a batch (about 30 words each) take some
# 8 MiB, and the cost of a call into numpy or polars is spread over enough rows.
BATCH_EVENTS: Final = 1 << 15
# Most events that wait for copies from other buffers.  A choice.
_MAX_WAITING: Final = 1 << 18


@dataclass(slots=True)
class Decoder:
    """Decodes the events of one source into rows of a sink, batch by batch."""

    source: int
    events: list[Event]
    stats: SourceStats
    sink: Sink
    run: Runner[Any] = interpreted
    _buffered: list[RecordBatch] = field(default_factory=list)
    _n_buffered: int = 0
    _calls: Calls = field(init=False)
    _entries: VmEntries = field(init=False)
    _starts: EntryStarts = field(init=False)

    def __post_init__(self) -> None:
        self._calls = Calls(self.source, self.stats, self.run)
        self._entries = VmEntries(self.source, self.stats, self.run)
        self._starts = EntryStarts(self.run)

    def feed(self, batch: RecordBatch) -> None:
        """Add events, in the order of the source; decode when BATCH_EVENTS are waiting."""
        self._buffered.append(batch)
        self._n_buffered += len(batch)
        if self._n_buffered >= BATCH_EVENTS:
            self.flush()

    def flush(self, *, is_last: bool = False) -> None:
        """Decode all events fed so far, without waiting for a full batch: for live output.

        If the recording has several buffers, events whose copies may still come are kept back,
        unless ``is_last``.
        """
        if not self._n_buffered:
            return
        parts, self._buffered, self._n_buffered = self._buffered, [], 0
        if self.stats.n_buffers > 1:
            parts = self._without_copies(concatenate(parts), is_last=is_last)
        # Copy: a reader in another thread may append further events meanwhile.
        events = list(self.events)
        kinds = Kinds.of(events)
        by_kind = _by_kind(parts, events)
        starts = self._starts.feed(parts, events)
        calls, vcpu_events = by_kind.get("call", ()), by_kind.get("vm_entry", ())
        for part in chain(calls, vcpu_events):
            self.stats.record_without_thread(part.tid, part.ts_ns)
        if calls or vcpu_events:
            rows = self._calls.feed(calls, kinds, vcpu_events)
            self.sink.add("seamcalls", fill_starts(rows, starts))
            self._add_loader_calls()
        if entries := by_kind.get("vm_entry"):
            self.sink.add("vm_entries", self._entries.feed(entries, kinds))
        if faults := by_kind.get("page_fault"):
            rows = page_faults(concatenate(faults), self.source, self.run)
            self.sink.add("page_faults", rows)
        if others := by_kind.get("host_event"):
            rows = host_events(concatenate(others), self.source, events, self.run)
            self.sink.add("host_events", rows)

    def _add_loader_calls(self) -> None:
        for rows in self._calls.take_loader_calls():
            self.sink.add("loader_calls", rows)

    def _without_copies(self, batch: RecordBatch, *, is_last: bool) -> list[RecordBatch]:
        """Return events without copies; keep back those whose copies may still come."""
        is_whole = is_last or len(batch) > _MAX_WAITING
        end = len(batch) if is_whole else end_of_group(batch)
        if end < len(batch):
            rest = batch.take(np.arange(end, len(batch))).detached()
            self._buffered, self._n_buffered = [rest], len(rest)
        complete = batch.take(np.arange(end))
        kept = drop_copies(complete, self.stats.n_buffers, self.run)
        if n := len(complete) - len(kept):
            self.stats.count("noise", "events that another buffer has too", None, n)
        return [kept] if len(kept) else []

    def drop_open(self, before_ns: int) -> None:
        """Drop open calls and entries that began before ``before_ns``: their end was lost."""
        self._calls.drop_open(before_ns)
        self._entries.drop_open(before_ns)
        self._starts.drop_open(before_ns)

    def finish(self) -> None:
        """Decode the events left and write the rows of calls and entries that never ended."""
        self.flush(is_last=True)
        self.sink.add("seamcalls", self._calls.finish(Kinds.of(self.events)))
        self._add_loader_calls()
        self.sink.add("vm_entries", self._entries.finish())


def _by_kind(parts: Sequence[RecordBatch], events: Sequence[Event]) -> dict[str, list[RecordBatch]]:
    """Return the events of each kind; parts with a single kind are not copied."""
    kinds = {event.kind for event in events} - {"noise", "unmapped"}
    if len(kinds) == 1:
        return {kind: list(parts) for kind in kinds}
    found: dict[str, list[RecordBatch]] = {}
    for kind in sorted(kinds):
        is_kind = np.array([event.kind == kind for event in events])
        for part in parts:
            at = np.flatnonzero(is_kind.take(part.event))
            if len(at):
                selected = part if len(at) == len(part) else part.take(at)
                found.setdefault(kind, []).append(selected)
    return found
