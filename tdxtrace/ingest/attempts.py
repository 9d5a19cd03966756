"""Attempts of one batch: pairs, entries alone and returns alone become rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.ingest.frames import Values, frame
from tdxtrace.ingest.kinds import Kinds
from tdxtrace.ingest.pairing import Index
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, RawEvents, U64Array
from tdxtrace.ingest.words import Words, either, from_registers, prefer
from tdxtrace.tables.events import PROBES, SEAMCALLS

# fn: leaf in bits 15:0, version in bits 23:16; bit 63 is a call to P-SEAMLDR.
_LEAF_MASK: Final = np.uint64(0xFFFF)
_PAGE_SHIFT: Final = np.uint64(12)
_ABSENT: Final = np.iinfo(np.intp).min


@dataclass(slots=True)
class Attempts:
    """Attempts of one batch: pairs, entries alone, returns alone; in that order."""

    batch: RawEvents
    kinds: Kinds
    entry: Index
    back: Index
    alone: Index
    orphan: Index
    dropped: BoolArray | None = None
    parents: Index | None = None

    @property
    def at_entry(self) -> Index:
        """Position of each row's entry, _ABSENT where none was seen."""
        return np.concatenate([self.entry, self.alone, np.full(len(self.orphan), _ABSENT)])

    @property
    def at_return(self) -> Index:
        """Position of each row's return, _ABSENT where none was seen."""
        return np.concatenate([self.back, np.full(len(self.alone), _ABSENT), self.orphan])

    def merge_wrappers(self) -> int:
        """Let SEAMCALLs inside a wrapper's call stand for it; return how many calls that drops."""
        probe = self.kinds.probe[self.batch.event[self.back]]
        inner = probe == PROBES.index("seamcall")
        if not inner.any() or inner.all():
            return 0
        outer = np.flatnonzero(~inner)
        thread = self.batch.tid.astype(np.int64) << 32
        starts = thread[self.entry[outer]] + self.entry[outer]
        order = np.argsort(starts)
        outer, starts = outer[order], starts[order]
        inside = np.flatnonzero(inner)
        mine = thread[self.entry[inside]] + self.entry[inside]
        found = np.searchsorted(starts, mine) - 1
        parent = outer[np.maximum(found, 0)]
        fits = (
            (found >= 0)
            & (self.batch.tid[self.entry[parent]] == self.batch.tid[self.entry[inside]])
            & (self.back[parent] > self.back[inside])
        )
        self.parents = np.full(len(self.entry), _ABSENT)
        self.parents[inside[fits]] = parent[fits]
        self.dropped = np.zeros(len(self.at_entry), np.bool_)
        self.dropped[np.unique(parent[fits])] = True
        return int(self.dropped.sum())

    def frame(self, source: int) -> pl.DataFrame:
        """The rows as ``seamcalls``, in the order of their lines."""
        start, end = self.at_entry, self.at_return
        first = np.where(start != _ABSENT, start, end)
        last = np.where(end != _ABSENT, end, start)
        columns, seen = self._places(first, last, start != _ABSENT, end != _ABSENT)
        columns["source"] = np.full(len(first), source, np.uint16)
        leaf, columns["version"], seen["version"] = self._leaf(first, last)
        columns["leaf"] = leaf
        for name, (value, there) in self._words(leaf, first, last).items():
            columns[name], seen[name] = value, there
        seen["status"] &= end != _ABSENT
        probe = pl.Series(self.kinds.probe[self.batch.event[last]], dtype=pl.UInt32)
        texts = {"probe": probe.cat.to(pl.Enum(PROBES))}
        made = frame(SEAMCALLS, len(first), columns, seen, texts)
        if self.dropped is not None:
            made = made.filter(~pl.Series(self.dropped))
        return made if made["seq"].is_sorted() else made.sort("seq")

    def _places(
        self, first: Index, last: Index, has_start: BoolArray, has_end: BoolArray
    ) -> tuple[dict[str, Values], dict[str, BoolArray]]:
        """When and where each call began and ended, and who made it."""
        batch = self.batch
        # function_graph prints a call without children on one line, with its duration.
        duration, has_duration = batch.value("duration_ns")[last], batch.has("duration_ns")[last]
        tgid = np.maximum(batch.tgid[first], batch.tgid[last])
        in_irq = np.where(batch.in_irq[last] == UNKNOWN, batch.in_irq[first], batch.in_irq[last])
        columns: dict[str, Values] = {
            "seq": batch.line[last].astype(np.uint64),
            "start_ns": batch.ts_ns[first] - duration.astype(np.int64),
            "end_ns": batch.ts_ns[last],
            "start_cpu": batch.cpu[first],
            "cpu": batch.cpu[last],
            "tid": batch.tid[last],
            "tgid": tgid,
            "in_irq": in_irq == 1,
            "n_lines": has_start.astype(np.uint8) + has_end.astype(np.uint8),
        }
        seen = {name: columns[name] != UNKNOWN for name in ("start_cpu", "cpu", "tid", "tgid")}
        seen["start_cpu"] &= has_start
        seen["start_ns"], seen["end_ns"] = has_start | has_duration, has_end
        seen["in_irq"] = in_irq != UNKNOWN
        return columns, seen

    def _leaf(self, first: Index, last: Index) -> tuple[U64Array, U64Array, BoolArray]:
        """Leaf and version: of the probe, of ``fn``, or as a tracepoint printed them."""
        batch = self.batch
        fn, has_fn = either(batch, "fn", first, last)
        printed, has_printed = either(batch, "leaf", first, last)
        fixed = self.kinds.leaf[batch.event[last]]
        leaf = np.where(has_fn, fn & _LEAF_MASK, fixed.astype(np.uint64))
        leaf = np.where(has_printed, printed, leaf)
        version = (fn >> np.uint64(16)) & np.uint64(0xFF)
        told, has_told = either(batch, "version", first, last)
        return leaf, np.where(has_told, told, version), has_fn | has_told

    def _words(self, leaf: U64Array, first: Index, last: Index) -> dict[str, Words]:
        batch = self.batch
        words = {
            name: either(batch, name, first, last)
            for name in ("td_id", "vp_id", "gpa", "level", "page", "ext_err1", "ext_err2")
        }
        gfn, has_gfn = either(batch, "gfn", first, last)
        gpa, has_gpa = words["gpa"]
        words["gpa"] = np.where(has_gpa, gpa, gfn << _PAGE_SHIFT), has_gpa | has_gfn
        words["status"] = batch.value("status")[last], batch.has("status")[last]
        for name, found in from_registers(batch, leaf, first).items():
            words[name] = prefer(words[name], found)
        for name, register in (("ext_err1", "out_rcx"), ("ext_err2", "out_rdx")):
            printed = batch.value(register)[last], batch.has(register)[last]
            words[name] = prefer(words[name], printed)
        if self.parents is not None:
            self._inherit(words)
        return words

    def _inherit(self, words: dict[str, Words]) -> None:
        """Give SEAMCALLs inside a wrapper's call what only the wrapper's probe saw."""
        assert self.parents is not None
        child = np.flatnonzero(self.parents != _ABSENT)
        parent = self.parents[child]
        for name in ("td_id", "vp_id", "gpa", "level", "page"):
            value, there = words[name]
            take = there[parent]
            value[child[take]] = value[parent[take]]
            there[child[take]] = True
