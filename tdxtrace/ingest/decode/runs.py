"""Separate returns of tdx_vcpu_run that are attempts at TDH.VP.ENTER from those that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.compiler import Runner
from tdxtrace.ingest.batch import UNKNOWN, BoolArray, I32Array, I64Array, RecordBatch
from tdxtrace.ingest.decode.events import number_threads, numbers_of
from tdxtrace.ingest.loops import runs
from tdxtrace.ingest.stats import Loss, SourceStats
from tdxtrace.tables.events import SEAMCALLS

NO_RUN: Final = 255
_LOSS_KINDS: Final = ("lost_events", "overwritten", "buffer_full", "throttled")
_AGAIN: Final = "entries seen in tdx_vcpu_run and again in tdx_handle_exit"
_STALE: Final = "returns of tdx_vcpu_run, held off by a zap, without an entry"
_OPEN: Final = "last returns of tdx_vcpu_run, perhaps without an entry"
_FAR: Final = np.iinfo(np.int64)
_NOTHING: Final = np.zeros(0, np.int64)
_NO_WINDOWS: Final = (_NOTHING, _NOTHING)
# The CPU replaces a thread that the tool did not print, as in pairs of calls.
_THREAD: Final = pl.coalesce("tid", -2 - pl.col("cpu").cast(pl.Int32)).fill_null(UNKNOWN)


@dataclass(slots=True)
class VcpuRuns:
    """Drops rows of tdx_vcpu_run that are no attempts: see :mod:`tdxtrace.ingest.loops.runs`.

    It needs kvm_entry or kvm_exit of the same thread before and after a return.  Where these are
    not recorded every return counts as an attempt, as one held off by a zap cannot be distinguished
    from a refused entry.  Undecided returns at the end of a recording are dropped, so that no
    attempt is invented.
    """

    stats: SourceStats
    run: Runner[Any]
    _number: dict[int, int] = field(default_factory=dict)
    """By thread ID: its row in ``_state``."""
    _state: I64Array = field(default_factory=lambda: np.zeros((0, runs.N_STATES), np.int64))
    _held: pl.DataFrame = field(default_factory=SEAMCALLS.empty)
    """Undecided rows of earlier batches."""
    _n_gaps: int = 0
    """Number of losses in ``_lost``; -1 to rebuild it, as a loss without an end may change."""
    _latest: Loss | None = None
    """The last of them, to detect that a live trace started a new list."""
    _lost: tuple[I64Array, I64Array, I64Array] = (_NOTHING, _NOTHING, np.zeros(2, np.int64))

    def sift(
        self, rows: pl.DataFrame, what: runs.Bytes, beside: Sequence[RecordBatch]
    ) -> pl.DataFrame:
        """Return the rows that are attempts; keep back rows that are undecided so far.

        Args:
            rows: Further ``seamcalls`` rows, in the order of their last lines.
            what: By row: RETURNED, HANDLED or NO_RUN.
            beside: kvm_entry and kvm_exit events from the same part of the source.
        """
        at = np.flatnonzero(what != NO_RUN)
        fate, coming = self._judge(rows, at, what[at], beside)
        released = self._decide(coming)
        if not fate.any():
            return _joined(released, rows)
        own = rows[at]
        self._held = _joined(self._held, own.filter(pl.Series(fate == runs.UNDECIDED)))
        self._count(_AGAIN, own.filter(pl.Series(fate == runs.TOLD_AGAIN)))
        self._count(_STALE, own.filter(pl.Series(fate == runs.STALE)))
        kept = np.ones(rows.height, np.bool_)
        kept[at] = fate == runs.ENTERED
        return _joined(released, rows.filter(pl.Series(kept)))

    def finish(self) -> None:
        """Count the rows that stayed undecided as noise and drop them."""
        self._count(_OPEN, self._held)
        self._held = SEAMCALLS.empty()

    def _judge(
        self, rows: pl.DataFrame, at: I64Array, what: runs.Bytes, beside: Sequence[RecordBatch]
    ) -> tuple[runs.Bytes, dict[int, int]]:
        """Return the fate of the rows ``at``, and by thread the fate of its undecided rows."""
        n_beside = sum(map(len, beside))
        own = rows.select("seq", "end_ns", "status", "cpu", "tid")[at]
        seq, own_cpu = own["seq"].to_numpy().view(np.int64), numbers_of(own["cpu"], UNKNOWN)
        own_tid = _threads(numbers_of(own["tid"], UNKNOWN), own_cpu)
        tid = np.concatenate([*(_threads(part.tid, part.cpu) for part in beside), own_tid])
        line = np.concatenate([*(part.line for part in beside), seq])
        when = np.concatenate([*(part.ts_ns for part in beside), own["end_ns"]])
        status = np.concatenate([np.zeros(n_beside, np.uint64), own["status"]])
        cpu = np.concatenate([*(part.cpu for part in beside), own_cpu])
        kind = np.concatenate([np.full(n_beside, runs.IN_GUEST, np.uint8), what])
        order = np.argsort(line, kind="stable")
        number, n_threads = number_threads(tid.astype(np.int32)[order], self.run)
        first = np.full(n_threads, 0, np.int64)
        first[number[::-1]] = order[::-1]
        tids = tid[first]
        mine = self._numbers(tids)
        state, coming = self._state[mine], np.empty(n_threads, np.uint8)
        fate = np.empty(len(order), np.uint8)
        told = kind[order], status[order], when[order], cpu.astype(np.int64)[order]
        self.run(runs.judge_returns)(number, *told, *self._windows(), state, coming, fate)
        self._state[mine] = state
        by_row = np.empty(len(order), np.uint8)
        by_row[order] = fate
        return by_row[n_beside:], dict(zip(tids.tolist(), coming.tolist(), strict=True))

    def _numbers(self, tids: I32Array) -> I64Array:
        """Return the rows of threads in ``_state``, which grows for new threads."""
        known = self._number
        mine = np.array([known.setdefault(tid, len(known)) for tid in tids.tolist()], np.int64)
        if len(known) > len(self._state):
            state = np.zeros((2 * len(known), runs.N_STATES), np.int64)
            state[: len(self._state)] = self._state
            self._state = state
        return mine

    def _decide(self, coming: dict[int, int]) -> pl.DataFrame:
        """Return undecided rows that turned out to be attempts; drop those that did not."""
        if self._held.is_empty():
            return self._held
        fate = _THREAD.replace_strict(coming, default=runs.UNDECIDED, return_dtype=pl.UInt8)
        told = self._held.with_columns(fate=fate)
        self._held = told.filter(pl.col("fate") == runs.UNDECIDED).drop("fate")
        self._count(_STALE, told.filter(pl.col("fate") == runs.STALE))
        return told.filter(pl.col("fate") == runs.ENTERED).drop("fate")

    def _count(self, why: str, rows: pl.DataFrame) -> None:
        if rows.height:
            self.stats.count("noise", why, None, int(rows["n_lines"].sum()))

    def _windows(self) -> tuple[I64Array, I64Array, I64Array]:
        """Return start and end of windows of lost events by CPU, and each CPU's first window."""
        gaps = list(self.stats.gaps)
        latest = gaps[-1] if gaps else None
        if len(gaps) != self._n_gaps or latest is not self._latest:
            told = [gap for gap in gaps if gap.kind in _LOSS_KINDS]
            cpu = np.array([gap.cpu for gap in told], np.int64)
            start = [_FAR.min if gap.start_ns is None else gap.start_ns for gap in told]
            end = [_FAR.max if gap.end_ns is None else gap.end_ns for gap in told]
            self._lost = _by_cpu(cpu, np.array(start, np.int64), np.array(end, np.int64))
            is_closed = all(gap.end_ns is not None for gap in told)
            self._n_gaps, self._latest = len(gaps) if is_closed else -1, latest
        return self._lost


def _threads(tid: I32Array, cpu: I32Array) -> I32Array:
    """Return thread IDs; a CPU replaces a thread that was not printed, as in pairs of calls."""
    return np.where(tid == UNKNOWN, -2 - cpu.astype(np.int32), tid)


def _joined(one: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """Concatenate two frames, each of which may lack optional columns."""
    if one.is_empty() or other.is_empty():
        return one if other.is_empty() else other
    return pl.concat([one, other], how="diagonal")


def _by_cpu(cpu: I64Array, start: I64Array, end: I64Array) -> tuple[I64Array, I64Array, I64Array]:
    """Group windows by CPU, and sort and merge those of each; also return first windows."""
    parts = [_NO_WINDOWS]
    first = np.zeros(int(cpu.max(initial=UNKNOWN)) + 3, np.int64)
    for number in np.unique(cpu).tolist():
        parts.append(_merged(start[cpu == number], end[cpu == number]))
        first[number + 2] = len(parts[-1][0])
    starts, ends = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return starts, ends, np.cumsum(first)


def _merged(start: I64Array, end: I64Array) -> tuple[I64Array, I64Array]:
    """Sort windows and merge those that overlap."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    is_first: BoolArray = np.ones(len(start), np.bool_)
    is_first[1:] = start[1:] > end[:-1]
    is_last = np.append(is_first[1:], [True])[: len(start)]
    return start[is_first], end[is_last]
