"""Attempts of one batch: pairs, entries alone and returns alone become rows."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.ingest.decoding import layers
from tdxtrace.ingest.decoding.frames import Values, frame
from tdxtrace.ingest.decoding.kinds import Kinds
from tdxtrace.ingest.decoding.layers import ABSENT
from tdxtrace.ingest.decoding.pairing import Index
from tdxtrace.ingest.decoding.words import Words, either, from_registers, prefer
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, RawEvents, U64Array
from tdxtrace.tables.events import PROBES, SEAMCALLS

# fn: leaf in bits 15:0, version in bits 23:16; bit 63 is a call to P-SEAMLDR.
_LEAF_MASK: Final = np.uint64(0xFFFF)
_SEAMLDR: Final = np.uint64(1 << 63)
_PAGE_SHIFT: Final = np.uint64(12)


class Attempts:
    """Attempts of one batch, in the order of their lines."""

    def __init__(
        self,
        batch: RawEvents,
        kinds: Kinds,
        entry: Index,
        back: Index,
        alone: Index,
        orphan: Index,
    ) -> None:
        """Take pairs (``entry``, ``back``), entries alone and returns alone."""
        self.batch, self.kinds = batch, kinds
        self.start = np.concatenate([entry, alone, np.full(len(orphan), ABSENT)])
        self.end = np.concatenate([back, np.full(len(alone), ABSENT), orphan])
        if len(alone) or len(orphan):
            order = np.argsort(np.where(self.end != ABSENT, self.end, self.start), kind="stable")
            self.start, self.end = self.start[order], self.end[order]
        self.has_start, self.has_end = self.start != ABSENT, self.end != ABSENT
        self.first = np.where(self.has_start, self.start, self.end)
        """Position of each row's entry, or of its return if no entry was seen."""
        self.last = np.where(self.has_end, self.end, self.start)
        """Position of each row's return, or of its entry if no return was seen."""
        self.dropped = np.zeros(len(self.start), np.bool_)
        self.parents: Index | None = None

    def merge_wrappers(self) -> int:
        """Let SEAMCALLs inside a wrapper's call stand for it; return how many lines that drops."""
        inner = self.kinds.probe[self.batch.event[self.last]] == PROBES.index("seamcall")
        if not inner.any() or inner.all():
            return 0
        thread = self.batch.tid[self.last].astype(np.int64)
        self.parents = layers.parents_of_pairs(thread, self.start, self.end, inner)
        leaf, _, _ = self._leaf()
        status = self.batch.value("status")[self.last]
        later = layers.parents_of_returns(thread, self.start, self.end, inner, leaf, status)
        self.parents = np.where(self.parents != ABSENT, self.parents, later)
        gone = np.unique(self.parents[self.parents != ABSENT])
        self.dropped[gone] = True
        return int(self.has_start[gone].sum()) + len(gone)

    def leave_out(self) -> tuple[int, int]:
        """Leave out what is no leaf of the module; return the lines of P-SEAMLDR's and others.

        P-SEAMLDR's calls have bit 63 of ``fn`` set; others name no leaf, as a return
        of ``__seamcall_ret`` whose entry, which named it, was not recorded.
        """
        nameless = self.kinds.leaf[self.batch.event[self.last]] == UNKNOWN
        if not nameless.any() and "fn" not in self.batch.values:
            return 0, 0
        fn, has_fn = either(self.batch, "fn", self.first, self.last)
        _, has_leaf = either(self.batch, "leaf", self.first, self.last)
        unknown = nameless & ~has_fn & ~has_leaf & ~self.dropped
        loader = has_fn & (fn >= _SEAMLDR) & ~self.dropped
        lines = self.has_start.astype(np.intp) + self.has_end
        self.dropped |= unknown | loader
        return int(lines[loader].sum()), int(lines[unknown].sum())

    def frame(self, source: int) -> pl.DataFrame:
        """The rows as ``seamcalls``, in the order of their lines."""
        columns, seen = self._places()
        columns["source"] = np.full(len(self.first), source, np.uint16)
        leaf, columns["version"], seen["version"] = self._leaf()
        columns["leaf"] = leaf
        for name, (value, there) in self._words(leaf).items():
            columns[name], seen[name] = value, there
        seen["status"] &= self.has_end
        probe = pl.Series(self.kinds.probe[self.batch.event[self.last]], dtype=pl.UInt32)
        texts = {"probe": probe.cat.to(pl.Enum(PROBES))}
        made = frame(SEAMCALLS, len(self.first), columns, seen, texts)
        return made.filter(~pl.Series(self.dropped)) if self.dropped.any() else made

    def _places(self) -> tuple[dict[str, Values], dict[str, BoolArray]]:
        """When and where each call began and ended, and who made it."""
        batch, first, last = self.batch, self.first, self.last
        begun, ended, known = batch.ts_ns[first], batch.ts_ns[last], self.has_start
        # Clocks of two CPUs may disagree (trace_clock "local"): then it is not known how
        # long the call took.
        forward = begun <= ended
        # function_graph prints a call without children on one line, with its duration.
        if "duration_ns" in batch.values:
            begun = begun - batch.values["duration_ns"][last].astype(np.int64)
            known = known | batch.present["duration_ns"][last]
        tgid = np.maximum(batch.tgid[first], batch.tgid[last])
        in_irq = np.where(batch.in_irq[last] == UNKNOWN, batch.in_irq[first], batch.in_irq[last])
        columns: dict[str, Values] = {
            "seq": batch.line[last].astype(np.uint64),
            "start_ns": begun,
            "end_ns": ended,
            "start_cpu": batch.cpu[first],
            "cpu": batch.cpu[last],
            "tid": batch.tid[last],
            "tgid": tgid,
            "in_irq": in_irq == 1,
            "n_lines": self.has_start.astype(np.uint8) + self.has_end,
        }
        seen = {name: columns[name] != UNKNOWN for name in ("start_cpu", "cpu", "tid", "tgid")}
        seen["start_cpu"] &= self.has_start
        seen["start_ns"], seen["end_ns"] = known & forward, self.has_end
        seen["in_irq"] = in_irq != UNKNOWN
        return columns, seen

    def _leaf(self) -> tuple[U64Array, U64Array, BoolArray]:
        """Leaf and version: of the probe, of ``fn``, or as a tracepoint printed them."""
        batch, first, last = self.batch, self.first, self.last
        fixed = self.kinds.leaf[batch.event[last]].astype(np.uint64)
        if not batch.values.keys() & {"fn", "leaf", "version"}:
            return fixed, np.zeros(len(last), np.uint64), np.zeros(len(last), np.bool_)
        fn, has_fn = either(batch, "fn", first, last)
        printed, has_printed = either(batch, "leaf", first, last)
        leaf = np.where(has_fn, fn & _LEAF_MASK, fixed)
        leaf = np.where(has_printed, printed, leaf)
        version = (fn >> np.uint64(16)) & np.uint64(0xFF)
        told, has_told = either(batch, "version", first, last)
        return leaf, np.where(has_told, told, version), has_fn | has_told

    def _words(self, leaf: U64Array) -> dict[str, Words]:
        batch, first, last = self.batch, self.first, self.last
        words = {
            name: either(batch, name, first, last)
            for name in ("td_id", "vp_id", "gpa", "level", "page", "ext_err1", "ext_err2")
        }
        gfn, has_gfn = either(batch, "gfn", first, last)
        if has_gfn.any():
            words["gpa"] = prefer(words["gpa"], (gfn << _PAGE_SHIFT, has_gfn))
        words["status"] = batch.value("status")[last], batch.has("status")[last]
        for name, found in from_registers(batch, leaf, first).items():
            words[name] = prefer(words[name], found)
        for name, register in (("ext_err1", "out_rcx"), ("ext_err2", "out_rdx")):
            if register in batch.values:
                printed = batch.values[register][last], batch.present[register][last]
                words[name] = prefer(words[name], printed)
        if self.parents is not None:
            self._inherit(words)
        return words

    def _inherit(self, words: dict[str, Words]) -> None:
        """Give SEAMCALLs inside a wrapper's call what only the wrapper's probe saw."""
        assert self.parents is not None
        child = np.flatnonzero(self.parents != ABSENT)
        parent = self.parents[child]
        for name in ("td_id", "vp_id", "gpa", "level", "page"):
            value, there = words[name]
            take = there[parent]
            value[child[take]] = value[parent[take]]
            there[child[take]] = True
