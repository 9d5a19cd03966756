"""Detect losses that the input does not report, from its rows and its header."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.compiler import Runner, interpreted
from tdxtrace.ingest.batch import UNKNOWN, BoolArray, I32Array, I64Array
from tdxtrace.ingest.decode.events import ABSENT, number_threads, numbers_of
from tdxtrace.ingest.loops.rows import thread_spans
from tdxtrace.ingest.stats import Header, SourceStats
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tdx import leaves, word

# Losses at the end of an input: the events before them are complete.
_AT_THE_END: Final = ("truncated", "changed_while_read")


@dataclass(frozen=True, slots=True)
class ThreadSpans:
    """Time spans of the threads of one batch."""

    number: I32Array
    """By row: index of its thread in the lists below."""
    tid: list[int | None]
    """By thread: its ID; None: rows without a thread."""
    first_row: list[int]
    """By thread: the row that began first."""
    first_end_ns: list[int]
    last_end_ns: list[int]
    began_ns: I64Array
    """By row: its begin, or its end where the begin is unknown."""

    def threads_of(self, rows: BoolArray) -> set[int]:
        """Return the known threads of the rows where ``rows`` is true."""
        has_rows = np.bincount(self.number[rows], minlength=len(self.tid))
        return {tid for tid, n in zip(self.tid, has_rows, strict=True) if n and tid is not None}


def spans_of(rows: pl.DataFrame, run: Runner[Any]) -> ThreadSpans:
    """Return the spans of the threads of rows with ``tid``, ``seq``, ``start_ns``, ``end_ns``."""
    tid = numbers_of(rows["tid"], UNKNOWN)
    number, n_threads = number_threads(tid, run)
    began, ended = _column_or(rows, "start_ns", "end_ns"), _column_or(rows, "end_ns", "start_ns")
    first_row, first_end, last_end = (np.full(n_threads, ABSENT, np.int64) for _ in range(3))
    seq = rows["seq"].to_numpy(writable=True)
    run(thread_spans)(number, began, ended, seq, first_row, first_end, last_end)
    tids = [None if n == UNKNOWN else n for n in tid.take(first_row).tolist()]
    ends = first_end.tolist(), last_end.tolist()
    return ThreadSpans(number, tids, first_row.tolist(), *ends, began)


def _column_or(rows: pl.DataFrame, name: str, other: str) -> I64Array:
    """Return column ``name``, with nulls replaced from column ``other``."""
    column = rows[name]
    if column.null_count():
        column = rows.select(pl.coalesce(name, other)).to_series()
    return column.to_numpy(writable=True)


VP_ENTER: Final = leaves.parse_leaf("TDH.VP.ENTER")[0]
_SEPT_ADD: Final = leaves.parse_leaf("TDH.MEM.SEPT.ADD")[0]
_PAGE_AUG: Final = leaves.parse_leaf("TDH.MEM.PAGE.AUG")[0]
_PAGE_ADDS: Final = leaves.numbers_of(("TDH.MEM.PAGE.AUG", "TDH.MEM.PAGE.ADD"))
_FAULT_LEAVES: Final = leaves.numbers_of(("TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"))
_OF_MAPPED: Final = leaves.numbers_of(("TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE"))
# A Secure EPT page has 512 entries: an entry of the next level covers 9 bits more.
_SHIFT_2M: Final = 21
_BEGIN: Final = pl.coalesce("start_ns", "end_ns")
_PAGE: Final = ("td_id", "gpa")
_REFUSED: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_SEPT
_IS_PAGE_LEAF: Final = np.isin(np.arange(1 << 16), [*_PAGE_ADDS, _SEPT_ADD, *_OF_MAPPED])
_COMPLETED_COLUMNS: Final = ("leaf", "td_id", "gpa", "level", "start_ns", "end_ns")
# Most successful calls examined: pages used before they were added occur early in a capture.
_MAX_COMPLETED: Final = 1 << 18


class _FirstRow(NamedTuple):
    """The row of a thread that began first."""

    when_ns: int
    seq: int
    has_start: bool
    leaf: int | None = None
    status: int | None = None
    is_bare: bool = False


@dataclass(slots=True)
class StartDetector:
    """Detect from calls and entries, batch by batch, whether the source began midway.

    Any of these shows that TDs ran before the capture began: a vCPU thread that handles
    a fault before its first entry, whose first entry is refused by zero-step mitigation,
    or that has an exit without an entry; a call that returns without an entry; a page
    that is blocked or removed without having been added, or added without a Secure EPT
    page for it, though such calls were captured.  Their absence does not prove that the
    capture began first.
    """

    _vcpus: set[int] = field(default_factory=set)
    """Threads that enter a vCPU."""
    _calls: dict[int, _FirstRow] = field(default_factory=dict)
    """The first call of each thread."""
    _entries: dict[int, _FirstRow] = field(default_factory=dict)
    """The first entry to a vCPU of each thread."""
    _completed: list[pl.DataFrame] = field(default_factory=list)
    _n_completed: int = 0

    def observe_calls(self, seamcalls: pl.DataFrame, spans: ThreadSpans) -> None:
        """Examine further ``seamcalls`` rows and the spans of their threads."""
        enters = seamcalls["leaf"].to_numpy() == VP_ENTER
        self._vcpus |= spans.threads_of(enters)
        _keep_first(self._calls, seamcalls, spans)
        if self._n_completed < _MAX_COMPLETED:
            rows = _completed_of(seamcalls)
            if len(rows):
                self._completed.append(seamcalls.select(_COMPLETED_COLUMNS)[rows])
                self._n_completed += len(rows)

    def observe_entries(self, vm_entries: pl.DataFrame, spans: ThreadSpans) -> None:
        """Examine further ``vm_entries`` rows and the spans of their threads."""
        _keep_first(self._entries, vm_entries, spans)

    def has_started_midway(self, has_entries: BoolArray) -> bool:
        """Return whether a capture without losses began while TDs ran.

        Args:
            has_entries: By leaf: whether an entry was seen; other leaves may be probed on return
                only.
        """
        if not all(row.has_start for row in self._entries.values()):
            return True
        for tid, row in self._calls.items():
            if tid in self._vcpus and row.leaf in _FAULT_LEAVES:
                return True
            if row.leaf == VP_ENTER and _is_refused(row.status):
                return True
            if row.is_bare and row.leaf is not None and has_entries[row.leaf]:
                return True
        if not self._completed:
            return False
        completed = pl.concat(self._completed)
        return _unmapped_before(completed) or _without_sept_page(completed)


def _is_refused(status: int | None) -> bool:
    """Return whether zero-step mitigation refused an entry; the module may set bits 61 and 60."""
    return status is not None and status & (word.CODE_BITS | word.LOW_BITS) == _REFUSED


def _keep_first(known: dict[int, _FirstRow], rows: pl.DataFrame, spans: ThreadSpans) -> None:
    """Update ``known`` with the row of each thread that began first, if its ID was recorded."""
    for tid, at in zip(spans.tid, spans.first_row, strict=True):
        if tid is None:
            continue
        when_ns, before = int(spans.began_ns[at]), known.get(tid)
        if before is not None and before.when_ns < when_ns:
            continue
        seq = int(rows["seq"][at])
        if before is not None and before[:2] <= (when_ns, seq):
            continue
        row = rows.row(at, named=True)
        has_start = row["start_ns"] is not None
        names_nothing = all(row.get(name) is None for name in ("gpa", "td_id", "vp_id", "page"))
        fields = row.get("leaf"), row.get("status"), not has_start and names_nothing
        known[tid] = _FirstRow(when_ns, seq, has_start, *fields)


def _completed_of(seamcalls: pl.DataFrame) -> NDArray[np.intp]:
    """Return the indexes of successful page calls whose page is known."""
    is_completed = numbers_of(seamcalls["status"], word.ERROR_BIT) < word.ERROR_BIT
    is_completed &= _IS_PAGE_LEAF.take(seamcalls["leaf"].to_numpy())
    if seamcalls["gpa"].null_count():
        is_completed &= seamcalls["gpa"].is_not_null().to_numpy()
    return np.flatnonzero(is_completed)


def _has_entry() -> pl.Expr:
    """Whether the probe recorded the entry; a start taken from kvm_entry does not count.

    tdx_vcpu_run returns without kvm_entry while a zap holds vCPUs off: see entry_starts.
    """
    by_kvm_entry = pl.col("probe") == "vcpu_run", pl.col("n_lines") == 1
    return pl.col("start_ns").is_not_null() & ~pl.all_horizontal(
        *by_kvm_entry, pl.col("end_ns").is_not_null()
    )


def bare_return() -> pl.Expr:
    """Whether a row is a return without entry or arguments; a one-line probe has arguments."""
    names = ("gpa", "td_id", "vp_id", "page")
    nothing = pl.all_horizontal(pl.col(name).is_null() for name in names)
    return pl.col("start_ns").is_null() & nothing


def _unmapped_before(done: pl.DataFrame) -> bool:
    """Return whether a page was blocked or removed before it was added."""
    used = done.filter(pl.col("leaf").is_in(_OF_MAPPED))
    added = done.filter(pl.col("leaf").is_in(_PAGE_ADDS))
    return _used_before_made(used, added, _PAGE)


def _without_sept_page(done: pl.DataFrame) -> bool:
    """Return whether a 4K page was added before the Secure EPT page of its 2 MB region."""
    region = ("td_id", "region")
    numbered = done.with_columns(region=pl.col("gpa") // (1 << _SHIFT_2M))
    pages = (pl.col("leaf") == _PAGE_AUG) & (pl.col("level") == 0)
    tables = (pl.col("leaf") == _SEPT_ADD) & (pl.col("level") == 1)
    return _used_before_made(numbered.filter(pages), numbered.filter(tables), region)


def _used_before_made(used: pl.DataFrame, made: pl.DataFrame, key: tuple[str, str]) -> bool:
    """Return whether a key of ``used`` was used before it was made, though makes were captured.

    A use counts only if it ended before the make began: the making thread may be delayed on its
    return while others use the result already.
    """
    if used.is_empty() or made.is_empty():
        return False
    uses = used.group_by(key).agg(when=pl.col("end_ns").min())
    makes = made.group_by(key).agg(began=_BEGIN.min())
    both = uses.join(makes, on=key, how="left", nulls_equal=True)
    before = pl.col("began").is_null() | (pl.col("when") < pl.col("began"))
    return bool(both.select(before.any()).item())


# Most calls without an end or a begin that are examined: where there are more, a probe
# was missing, and they are no evidence of full buffers.
_MAX_UNPAIRED: Final = 1 << 20
_N_LEAVES: Final = 1 << 16
_LAST_TIME: Final = pl.coalesce("end_ns", "start_ns")
_NO_UNPAIRED: Final = SEAMCALLS.empty().select("leaf", "tid", "cpu", "start_ns", "end_ns")


@dataclass(slots=True)
class LossDetector:
    """Detect losses from the calls of a source, batch by batch."""

    run: Runner[Any] = interpreted
    n_without_return: int = 0
    n_without_entry: int = 0
    has_entries: BoolArray = field(default_factory=lambda: np.zeros(_N_LEAVES, np.bool_))
    """By leaf: whether an entry was seen; other leaves are probed on return only."""
    start: StartDetector = field(default_factory=StartDetector)
    _extents: dict[int | None, tuple[int, int]] = field(default_factory=dict)
    """By thread: earliest and latest end of its calls, ns."""
    _n_unpaired: int = 0
    _unpaired: list[pl.DataFrame] = field(default_factory=list)

    def observe_calls(self, seamcalls: pl.DataFrame) -> None:
        """Examine further ``seamcalls`` rows of the source."""
        n_without_return = seamcalls["end_ns"].null_count()
        n_without_entry = seamcalls["start_ns"].null_count()
        self.n_without_return += n_without_return
        self.n_without_entry += n_without_entry
        leaf = seamcalls["leaf"]
        begun = leaf.filter(seamcalls.select(_has_entry()).to_series()) if n_without_entry else leaf
        self.has_entries[np.flatnonzero(np.bincount(begun.to_numpy()))] = True
        spans = spans_of(seamcalls, self.run)
        self.start.observe_calls(seamcalls, spans)
        for tid, first, last in zip(spans.tid, spans.first_end_ns, spans.last_end_ns, strict=True):
            known = self._extents.get(tid, (first, last))
            self._extents[tid] = min(first, known[0]), max(last, known[1])
        if self._n_unpaired <= _MAX_UNPAIRED and n_without_return + n_without_entry:
            unpaired = seamcalls.filter(pl.col("end_ns").is_null() | bare_return())
            self._unpaired.append(unpaired.select(_NO_UNPAIRED.columns))
            self._n_unpaired += unpaired.height

    def observe_entries(self, vm_entries: pl.DataFrame) -> None:
        """Examine further ``vm_entries`` rows of the source."""
        self.start.observe_entries(vm_entries, spans_of(vm_entries, self.run))

    def unpaired(self) -> pl.DataFrame:
        """Return calls without an end before, or without a begin after, other calls of the thread.

        Columns ``leaf``, ``tid``, ``cpu``, ``start_ns`` and ``end_ns``; also ``first`` and ``last``
        (the thread's ``_extents``), except if no call lacks one or too many do: then it is empty.
        """
        if not self._unpaired or self._n_unpaired > _MAX_UNPAIRED:
            return _NO_UNPAIRED
        rows = [(tid, *extent) for tid, extent in self._extents.items()]
        schema = {"tid": pl.Int32, "first": pl.Int64, "last": pl.Int64}
        extents = pl.DataFrame(rows, schema=schema, orient="row")
        calls = pl.concat(self._unpaired).join(extents, on="tid", how="left", nulls_equal=True)
        has_entries = pl.col("leaf").is_in(np.flatnonzero(self.has_entries).tolist())
        without_return = pl.col("end_ns").is_null() & (pl.col("last") != _LAST_TIME)
        without_entry = pl.col("start_ns").is_null() & (pl.col("first") != _LAST_TIME)
        return calls.filter(
            without_return | (without_entry & has_entries), pl.col("cpu").is_not_null()
        )


def add_implied_losses(detector: LossDetector, stats: SourceStats, header: Header) -> None:
    """Add to ``stats`` the losses that no line of the input reports."""
    _overwritten(stats, header)
    if not header.counts_losses:
        _buffer_full(detector.unpaired(), stats)
    first_ns, _ = stats.span()
    is_lossless = not any(gap.kind not in _AT_THE_END for gap in stats.gaps)
    if (
        is_lossless
        and first_ns is not None
        and detector.start.has_started_midway(detector.has_entries)
    ):
        stats.record_loss("started_midway", None, end_ns=first_ns)
    stats.record_loss("unpaired_entry", detector.n_without_return)
    stats.record_loss("unpaired_return", detector.n_without_entry)


def _overwritten(stats: SourceStats, header: Header) -> None:
    """Record overwritten events; the record of each CPU then starts at its first event."""
    if header.entries_kept is None or header.entries_written is None:
        return
    lost = header.entries_written - header.entries_kept
    if lost <= 0:
        return
    stats.record_loss("overwritten", lost, "entries-in-buffer < entries-written")
    for cpu in stats.cpus():
        stats.record_loss(
            "overwritten", None, f"CPU {cpu}", cpu=cpu, end_ns=int(stats.first_ns[cpu])
        )


def _buffer_full(unpaired: pl.DataFrame, stats: SourceStats) -> None:
    """Record full buffers: with overwrite off new events are dropped, and no line reports it.

    A call that never returned though its thread had later calls, or a return without
    entry, after the last event of some CPU, shows that the CPU's record had ended.
    """
    if any(gap.kind not in _AT_THE_END for gap in stats.gaps) or not unpaired.height:
        return
    latest = int(unpaired.select(_LAST_TIME.max()).item())
    for cpu in stats.cpus():
        last = int(stats.last_ns[cpu])
        ends_here = (pl.col("cpu") == cpu) & (pl.col("start_ns") == last)
        if last <= latest or unpaired.select(ends_here.any()).item():
            stats.record_loss("buffer_full", None, f"CPU {cpu}", cpu=cpu, start_ns=last)
