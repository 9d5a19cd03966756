"""Attempts of one batch: pairs, entries alone and returns alone become rows."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.ingest.decoding import layers
from tdxtrace.ingest.decoding.frames import Column, Room, frame
from tdxtrace.ingest.decoding.kinds import Kinds
from tdxtrace.ingest.decoding.layers import ABSENT
from tdxtrace.ingest.decoding.pairing import Index
from tdxtrace.ingest.decoding.words import either, from_registers, of, prefer
from tdxtrace.ingest.raw import UNKNOWN, BoolArray, RawEvents, U64Array, Words
from tdxtrace.tables.events import PROBES, SEAMCALLS
from tdxtrace.tdx.wrappers import PAGES

# fn: leaf in bits 15:0, version in bits 23:16; bit 63 is a call to P-SEAMLDR.
_LEAF_MASK: Final = np.uint64(0xFFFF)
_SEAMLDR: Final = np.uint64(1 << 63)
_PAGE_SHIFT: Final = np.uint64(12)
# Columns whose numbers a source may not tell.
_NUMBERED: Final = ("start_cpu", "cpu", "tid", "tgid")
_PAIR_LINES: Final = 2
_OPERANDS: Final = ("td_id", "vp_id", "gpa", "level", "page")
_FURTHER_PAGES: Final = frozenset(PAGES[1:])


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
        self.is_whole = not (len(alone) or len(orphan))
        """Whether every row is a pair."""
        self.start, self.end = entry, back
        if not self.is_whole:
            start = np.concatenate([entry, alone, np.full(len(orphan), ABSENT)])
            end = np.concatenate([back, np.full(len(alone), ABSENT), orphan])
            order = np.argsort(np.where(end != ABSENT, end, start), kind="stable")
            self.start, self.end = start[order], end[order]
        self.has_start, self.has_end = self.start != ABSENT, self.end != ABSENT
        self.first = np.where(self.has_start, self.start, self.end)
        """Position of each row's entry, or of its return if no entry was seen."""
        self.last = np.where(self.has_end, self.end, self.start)
        """Position of each row's return, or of its entry if no return was seen."""
        fields = batch.fields()
        self.early, self.late = fields.pick(self.first), fields.pick(self.last)
        self.event = batch.event.take(self.last).astype(np.intp)
        """Which event each row ends with."""
        self.dropped = np.zeros(len(self.start), np.bool_)
        self.parents: Index | None = None

    def merge_wrappers(self) -> int:
        """Let SEAMCALLs inside a wrapper's call stand for it; return how many lines that drops."""
        if not self.kinds.has_seamcalls:
            return 0
        inner = self.kinds.probe.take(self.event) == PROBES.index("seamcall")
        if not inner.any() or inner.all():
            return 0
        thread = self.batch.tid[self.last].astype(np.int64)
        self.parents = layers.parents_of_pairs(thread, self.start, self.end, inner)
        leaf, _, _ = self._leaf()
        status, _ = of(self.late, "status")
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
        nameless = self.kinds.leaf.take(self.event) == UNKNOWN
        if not nameless.any() and "fn" not in self.early.names():
            return 0, 0
        fn, has_fn = either(self.early, self.late, "fn")
        _, has_leaf = either(self.early, self.late, "leaf")
        unknown = nameless & ~has_fn & ~has_leaf & ~self.dropped
        loader = has_fn & (fn >= _SEAMLDR) & ~self.dropped
        lines = self.has_start.astype(np.intp) + self.has_end
        self.dropped |= unknown | loader
        return int(lines[loader].sum()), int(lines[unknown].sum())

    def frame(self, source: int, room: Room | None) -> pl.DataFrame:
        """The rows as ``seamcalls``, in the order of their lines, kept in ``room``."""
        columns, seen = self._places()
        columns["source"] = source
        leaf, columns["version"], seen["version"] = self._leaf()
        columns["leaf"] = leaf
        for name, (value, there) in self._words(leaf).items():
            columns[name], seen[name] = value, there
        seen["status"] &= self.has_end
        columns["probe"] = self.kinds.probe.take(self.event)
        made = frame(SEAMCALLS, len(self.first), columns, seen, room=room)
        return made.filter(~pl.Series(self.dropped)) if self.dropped.any() else made

    def _places(self) -> tuple[dict[str, Column], dict[str, BoolArray]]:
        """When and where each call began and ended, and who made it."""
        batch, first, last = self.batch, self.first, self.last
        begun, ended, known = batch.ts_ns.take(first), batch.ts_ns.take(last), self.has_start
        # Clocks of two CPUs may disagree (trace_clock "local"): then it is not known how
        # long the call took.
        forward = begun <= ended
        # function_graph prints a call without children on one line, with its duration.
        if "duration_ns" in self.late.names():
            took, has_took = self.late.get("duration_ns")
            begun, known = begun - took.view(np.int64), known | has_took
        n_lines = self.has_start.astype(np.uint8) + self.has_end
        columns: dict[str, Column] = {
            "seq": batch.line.take(last).view(np.uint64),
            "start_ns": begun,
            "end_ns": ended,
            "start_cpu": batch.cpu.take(first),
            "cpu": batch.cpu.take(last),
            "tid": batch.tid.take(last),
            "n_lines": _PAIR_LINES if self.is_whole else n_lines,
        }
        if batch.tgid.max(initial=UNKNOWN) != UNKNOWN:
            columns["tgid"] = np.maximum(batch.tgid.take(first), batch.tgid.take(last))
        numbered = (name for name in _NUMBERED if name in columns)
        seen: dict[str, BoolArray] = {
            name: np.not_equal(columns[name], UNKNOWN) for name in numbered
        }
        seen["start_cpu"] &= self.has_start
        seen["start_ns"], seen["end_ns"] = known & forward, self.has_end
        if batch.in_irq.max(initial=UNKNOWN) != UNKNOWN:
            ended_in, begun_in = batch.in_irq.take(last), batch.in_irq.take(first)
            in_irq = np.where(ended_in == UNKNOWN, begun_in, ended_in)
            columns["in_irq"], seen["in_irq"] = in_irq == 1, in_irq != UNKNOWN
        return columns, seen

    def _leaf(self) -> tuple[U64Array, U64Array, BoolArray]:
        """Leaf and version: of the probe, of ``fn``, or as a tracepoint printed them."""
        first, last = self.early, self.late
        fixed = self.kinds.leaf.take(self.event).astype(np.uint64)
        if first.names().isdisjoint(("fn", "leaf", "version")):
            return fixed, np.zeros(len(fixed), np.uint64), np.zeros(len(fixed), np.bool_)
        fn, has_fn = either(first, last, "fn")
        printed, has_printed = either(first, last, "leaf")
        leaf = np.where(has_fn, fn & _LEAF_MASK, fixed)
        leaf = np.where(has_printed, printed, leaf)
        version = (fn >> np.uint64(16)) & np.uint64(0xFF)
        told, has_told = either(first, last, "version")
        return leaf, np.where(has_told, told, version), has_fn | has_told

    def _words(self, leaf: U64Array) -> dict[str, Words]:
        first, last = self.early, self.late
        further = sorted(_FURTHER_PAGES & (first.names() | last.names()))
        words = {
            name: either(first, last, name)
            for name in (*_OPERANDS, "ext_err1", "ext_err2", *further)
        }
        gfn, has_gfn = either(first, last, "gfn")
        if has_gfn.any():
            words["gpa"] = prefer(words["gpa"], (gfn << _PAGE_SHIFT, has_gfn))
        words["status"] = of(last, "status")
        for name, found in from_registers(first, leaf).items():
            words[name] = prefer(words[name], found) if name in words else found
        for name, register in (("ext_err1", "out_rcx"), ("ext_err2", "out_rdx")):
            if register in last.names():
                words[name] = prefer(words[name], last.get(register))
        if self.parents is not None:
            self._inherit(words)
        return words

    def _inherit(self, words: dict[str, Words]) -> None:
        """Give SEAMCALLs inside a wrapper's call what only the wrapper's probe saw."""
        assert self.parents is not None
        child = np.flatnonzero(self.parents != ABSENT)
        parent = self.parents[child]
        for name in (*_OPERANDS, *(_FURTHER_PAGES & words.keys())):
            value, there = words[name]
            take = there[parent]
            value[child[take]] = value[parent[take]]
            there[child[take]] = True
