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
_REPEATED: Final = "entries seen in tdx_vcpu_run and again in tdx_handle_exit"
_STALE: Final = "returns of tdx_vcpu_run, held off by a zap, without an entry"
_OPEN: Final = "last returns of tdx_vcpu_run, perhaps without an entry"
_INT64: Final = np.iinfo(np.int64)
_EMPTY: Final = np.zeros(0, np.int64)
_NO_WINDOWS: Final = (_EMPTY, _EMPTY)
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
    _undecided: pl.DataFrame = field(default_factory=SEAMCALLS.empty)
    """Undecided rows of earlier batches."""
    _n_gaps: int = 0
    """Number of losses in ``_lost``; -1 to rebuild it, as a loss without an end may change."""
    _latest: Loss | None = None
    """The last of them, to detect that a live trace started a new list."""
    _lost: tuple[I64Array, I64Array, I64Array] = (_EMPTY, _EMPTY, np.zeros(2, np.int64))

    def drop_repeated(
        self, rows: pl.DataFrame, kinds: runs.Bytes, vcpu_events: Sequence[RecordBatch]
    ) -> pl.DataFrame:
        """Return the rows that are attempts; keep back rows that are undecided so far.

        Args:
            rows: Further ``seamcalls`` rows, in the order of their last lines.
            kinds: By row: RETURNED, HANDLED or NO_RUN.
            vcpu_events: kvm_entry and kvm_exit events from the same part of the source.
        """
        at = np.flatnonzero(kinds != NO_RUN)
        fate, pending_fate = self._classify(rows, at, kinds[at], vcpu_events)
        resolved = self._resolve(pending_fate)
        if not fate.any():
            return _concatenated(resolved, rows)
        returns = rows[at]
        self._undecided = _concatenated(
            self._undecided, returns.filter(pl.Series(fate == runs.UNDECIDED))
        )
        self._count(_REPEATED, returns.filter(pl.Series(fate == runs.REPEATED)))
        self._count(_STALE, returns.filter(pl.Series(fate == runs.STALE)))
        is_kept = np.ones(rows.height, np.bool_)
        is_kept[at] = fate == runs.ENTERED
        return _concatenated(resolved, rows.filter(pl.Series(is_kept)))

    def finish(self) -> None:
        """Count the rows that stayed undecided as noise and drop them."""
        self._count(_OPEN, self._undecided)
        self._undecided = SEAMCALLS.empty()

    def _classify(
        self,
        rows: pl.DataFrame,
        at: I64Array,
        kinds: runs.Bytes,
        vcpu_events: Sequence[RecordBatch],
    ) -> tuple[runs.Bytes, dict[int, int]]:
        """Return the fate of the rows ``at``, and by thread the fate of its undecided rows."""
        n_vcpu_events = sum(map(len, vcpu_events))
        returns = rows.select("seq", "end_ns", "status", "cpu", "tid")[at]
        seq = returns["seq"].to_numpy().view(np.int64)
        return_cpu = numbers_of(returns["cpu"], UNKNOWN)
        return_tid = _threads(numbers_of(returns["tid"], UNKNOWN), return_cpu)
        tid = np.concatenate([*(_threads(part.tid, part.cpu) for part in vcpu_events), return_tid])
        line = np.concatenate([*(part.line for part in vcpu_events), seq])
        time_ns = np.concatenate([*(part.ts_ns for part in vcpu_events), returns["end_ns"]])
        status = np.concatenate([np.zeros(n_vcpu_events, np.uint64), returns["status"]])
        cpu = np.concatenate([*(part.cpu for part in vcpu_events), return_cpu])
        kind = np.concatenate([np.full(n_vcpu_events, runs.IN_GUEST, np.uint8), kinds])
        order = np.argsort(line, kind="stable")
        number, n_threads = number_threads(tid.astype(np.int32)[order], self.run)
        first = np.full(n_threads, 0, np.int64)
        first[number[::-1]] = order[::-1]
        tids = tid[first]
        state_rows = self._state_rows(tids)
        state, pending_fate = self._state[state_rows], np.empty(n_threads, np.uint8)
        fate = np.empty(len(order), np.uint8)
        columns = kind[order], status[order], time_ns[order], cpu.astype(np.int64)[order]
        self.run(runs.classify_returns)(
            number, *columns, *self._windows(), state, pending_fate, fate
        )
        self._state[state_rows] = state
        by_row = np.empty(len(order), np.uint8)
        by_row[order] = fate
        return by_row[n_vcpu_events:], dict(zip(tids.tolist(), pending_fate.tolist(), strict=True))

    def _state_rows(self, tids: I32Array) -> I64Array:
        """Return the rows of threads in ``_state``, which grows for new threads."""
        known = self._number
        state_rows = np.array(
            [known.setdefault(tid, len(known)) for tid in tids.tolist()], np.int64
        )
        if len(known) > len(self._state):
            state = np.zeros((2 * len(known), runs.N_STATES), np.int64)
            state[: len(self._state)] = self._state
            self._state = state
        return state_rows

    def _resolve(self, pending_fate: dict[int, int]) -> pl.DataFrame:
        """Return undecided rows that turned out to be attempts; drop those that did not."""
        if self._undecided.is_empty():
            return self._undecided
        fate = _THREAD.replace_strict(pending_fate, default=runs.UNDECIDED, return_dtype=pl.UInt8)
        rows = self._undecided.with_columns(fate=fate)
        self._undecided = rows.filter(pl.col("fate") == runs.UNDECIDED).drop("fate")
        self._count(_STALE, rows.filter(pl.col("fate") == runs.STALE))
        return rows.filter(pl.col("fate") == runs.ENTERED).drop("fate")

    def _count(self, reason: str, rows: pl.DataFrame) -> None:
        if rows.height:
            self.stats.count("noise", reason, None, int(rows["n_lines"].sum()))

    def _windows(self) -> tuple[I64Array, I64Array, I64Array]:
        """Return start and end of windows of lost events by CPU, and each CPU's first window."""
        gaps = list(self.stats.gaps)
        latest = gaps[-1] if gaps else None
        if len(gaps) != self._n_gaps or latest is not self._latest:
            losses = [gap for gap in gaps if gap.kind in _LOSS_KINDS]
            cpu = np.array([gap.cpu for gap in losses], np.int64)
            start = [_INT64.min if gap.start_ns is None else gap.start_ns for gap in losses]
            end = [_INT64.max if gap.end_ns is None else gap.end_ns for gap in losses]
            self._lost = _by_cpu(cpu, np.array(start, np.int64), np.array(end, np.int64))
            is_closed = all(gap.end_ns is not None for gap in losses)
            self._n_gaps, self._latest = len(gaps) if is_closed else -1, latest
        return self._lost


def _threads(tid: I32Array, cpu: I32Array) -> I32Array:
    """Return thread IDs; a CPU replaces a thread that was not printed, as in pairs of calls."""
    return np.where(tid == UNKNOWN, -2 - cpu.astype(np.int32), tid)


def _concatenated(one: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
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
