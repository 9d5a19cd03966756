"""Decode SEAMCALL attempts from probes; vCPU entries, faults and host events from tracepoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.compiler import Runner
from tdxtrace.ingest.batch import (
    UNKNOWN,
    BoolArray,
    I8Array,
    I64Array,
    RecordBatch,
    U64Array,
    concatenate,
)
from tdxtrace.ingest.decode.events import (
    ABSENT,
    Column,
    Kinds,
    Paired,
    Words,
    frame,
    make_rows,
    pair,
    read_fields,
)
from tdxtrace.ingest.decode.runs import NO_RUN, VcpuRuns
from tdxtrace.ingest.events.registry import Event
from tdxtrace.ingest.loops import pairing
from tdxtrace.ingest.loops import runs as loops
from tdxtrace.ingest.stats import OF_AMD, SourceStats
from tdxtrace.tables.events import (
    HOST_EVENTS,
    LOADER_CALLS,
    PAGE_FAULTS,
    PROBES,
    SEAMCALLS,
    VM_ENTRIES,
)
from tdxtrace.tables.schema import Table
from tdxtrace.tdx.leaves import parse_leaf
from tdxtrace.tdx.loader import LOADER_BIT
from tdxtrace.tdx.operands import operand_table

# A function that does not call itself can be open at most once per context of
# its CPU: task, softirq, hardirq, NMI.  Linux, include/linux/trace_recursion.h
# (TRACE_CTX_NORMAL … TRACE_CTX_NMI).  An entry deeper than that has lost its return.
MAX_CONTEXTS: Final = 4
_SEAMLDR: Final = np.uint64(LOADER_BIT)
_INNER: Final = PROBES.index("seamcall")
_VCPU_RUN: Final = PROBES.index("vcpu_run")
_WRAPPER: Final = PROBES.index("wrapper")
_VP_ENTER: Final = parse_leaf("TDH.VP.ENTER")[0]
_BOTH: Final = (*pairing.IN_REGISTERS, "ext_err1", "ext_err2", "fn", "leaf", "version", "gfn")
# The column that each slot fills, for returns and for entries; entries override returns.
_RETURN_COLUMNS: Final[Mapping[str, str]] = {
    **{"out_rcx": "ext_err1", "out_rdx": "ext_err2"},
    **{name: name for name in (*_BOTH, "status", "duration_ns")},
}
_ENTRY_COLUMNS: Final[Mapping[str, str]] = {name: name for name in (*_BOTH, *pairing.REGISTERS)}


@dataclass(slots=True)
class Calls:
    """Pairs entries with returns and keeps open calls; returns rows as they become complete."""

    source: int
    stats: SourceStats
    run: Runner[Any]
    open: RecordBatch | None = None
    """Events that wait for a return."""
    ambiguous: BoolArray | None = None
    """Whether each open entry can no longer be distinguished from others."""
    _loader_frames: list[pl.DataFrame] = field(default_factory=list)
    _runs: VcpuRuns = field(init=False)

    def __post_init__(self) -> None:
        self._runs = VcpuRuns(self.stats, self.run)

    def feed(
        self, parts: Sequence[RecordBatch], kinds: Kinds, vcpu_events: Sequence[RecordBatch] = ()
    ) -> pl.DataFrame:
        """Return the ``seamcalls`` rows that are complete with the events of ``parts``.

        Args:
            parts: Entry and return events, in order.
            kinds: Properties of events, by event ID.
            vcpu_events: kvm_entry and kvm_exit events from the same part of the source.
        """
        if not parts:
            return self._drop_repeated_returns(
                SEAMCALLS.empty(), np.zeros(0, np.uint8), kinds, vcpu_events
            )
        batch = concatenate([*([] if self.open is None else [self.open]), *parts])
        paired = pair(batch, kinds, MAX_CONTEXTS, self.run, self.ambiguous)
        is_open = paired.fate == pairing.OPEN
        if kinds.has_inner:
            is_inner = kinds.probe.take(batch.event) == _INNER
            outer = np.full(paired.n_threads, ABSENT, np.int64)
            self.run(pairing.wait_for_wrappers)(paired.thread, is_inner, is_open, outer)
        self.open = batch.take(np.flatnonzero(is_open)).detached()
        self.ambiguous = paired.partner[is_open] == pairing.AMBIGUOUS
        is_row = (paired.fate >= pairing.RETURN_OF_PAIR) & ~is_open
        return self._rows(batch, kinds, paired, is_row, vcpu_events)

    def drop_open(self, before_ns: int) -> None:
        """Drop what began before ``before_ns`` and is still open."""
        if self.open is not None and self.ambiguous is not None:
            self.ambiguous = self.ambiguous[self.open.ts_ns >= before_ns]
            self.open = self.open.take(self.open.ts_ns >= before_ns).detached()

    def finish(self, kinds: Kinds) -> pl.DataFrame:
        """Return the ``seamcalls`` rows of calls that never returned."""
        self._runs.finish()
        if self.open is None:
            return SEAMCALLS.empty()
        batch, self.open = self.open, None
        paired = pair(batch, kinds, MAX_CONTEXTS, self.run, self.ambiguous)
        return self._rows(batch, kinds, paired, paired.fate != pairing.ENTRY_OF_PAIR)

    def take_loader_calls(self) -> list[pl.DataFrame]:
        """Return the ``loader_calls`` rows that became complete since the previous call."""
        frames, self._loader_frames = self._loader_frames, []
        return frames

    def _rows(
        self,
        batch: RecordBatch,
        kinds: Kinds,
        paired: Paired,
        is_row: BoolArray,
        vcpu_events: Sequence[RecordBatch] = (),
    ) -> pl.DataFrame:
        rows = Attempts(batch, kinds, paired, np.flatnonzero(is_row), self.run)
        for kind, detail, n in rows.drop_non_attempts():
            if n:
                self.stats.count(kind, detail, None, n)
        if rows.is_loader.any():
            self._loader_frames.append(rows.loader_frame(self.source))
        return self._drop_repeated_returns(
            rows.frame(self.source), rows.run_kinds(), kinds, vcpu_events
        )

    def _drop_repeated_returns(
        self,
        rows: pl.DataFrame,
        run_kinds: loops.Bytes,
        kinds: Kinds,
        vcpu_events: Sequence[RecordBatch],
    ) -> pl.DataFrame:
        """Return the rows without returns of tdx_vcpu_run that are no attempts."""
        is_run = (kinds.probe == _VCPU_RUN) | (kinds.leaf == _VP_ENTER)
        is_needed = is_run.any() and (len(vcpu_events) or len(rows))
        return self._runs.drop_repeated(rows, run_kinds, vcpu_events) if is_needed else rows


class Attempts:
    """Attempts of one batch: pairs, lone entries and lone returns, in order of their last event."""

    def __init__(
        self, batch: RecordBatch, kinds: Kinds, paired: Paired, at: I64Array, run: Runner[Any]
    ) -> None:
        """Build attempts; ``at`` has the index of the last event of each."""
        self.batch, self.kinds, self.run = batch, kinds, run
        self.thread, self.n_threads = paired.thread.take(at), paired.n_threads
        self.start, self.end = paired.rows(at)
        self.n = len(at)
        event = batch.event.take(at)
        self.leaf = kinds.leaf.take(event)
        self.probe: I8Array = kinds.probe.take(event)
        # Read registers from a return without entry too: __seamcall leaves them unchanged.
        first = np.where(self.start >= 0, self.start, self.end)
        reads = (self.end, _RETURN_COLUMNS), (first, _ENTRY_COLUMNS)
        self.words: dict[str, Words] = read_fields(batch, reads, run)
        if not self.words.keys().isdisjoint(("fn", "leaf", "version", "gfn", *pairing.REGISTERS)):
            self._read_operands()
        self.dropped = np.zeros(self.n, np.bool_)
        fn, has_fn = self.words.get("fn", _no_words(self.n))
        self.is_loader: BoolArray = has_fn & (fn >= _SEAMLDR)
        """Whether each attempt is a call of the P-SEAMLDR."""

    def _read_operands(self) -> None:
        known = [self.words.get(name, _no_words(self.n)) for name in pairing.FIELDS]
        value, present = (np.stack(arrays) for arrays in zip(*known, strict=True))
        self.run(pairing.read_operands)(_registers(), value, present, self.leaf)
        self.words |= {name: (value[i], present[i]) for i, name in enumerate(pairing.FIELDS)}

    def drop_non_attempts(self) -> list[tuple[str, str, int]]:
        """Drop calls that are no attempts; return kind, detail and number of lines of each loss.

        Dropped are wrapper calls whose inner SEAMCALLs were recorded too; calls without a leaf,
        such as a return of ``__seamcall_ret`` whose entry, which has the leaf, was not recorded;
        and calls of the P-SEAMLDR, which have their own table.
        """
        wrapper = self._find_wrappers()
        is_wrapper = np.zeros(self.n, np.bool_)
        if wrapper is not None:
            # Wrappers never call the P-SEAMLDR.
            wrapper[self.is_loader] = ABSENT
            is_wrapper[wrapper[wrapper >= 0]] = True
            self._copy_operands(wrapper)
        unknown = (self.leaf == UNKNOWN) & ~is_wrapper
        self.dropped = is_wrapper | unknown | self.is_loader
        return [
            ("merged", "", self._n_lines(is_wrapper)),
            ("undecoded", "calls that name no leaf", self._n_lines(unknown)),
        ]

    def _n_lines(self, is_row: BoolArray) -> int:
        if not is_row.any():
            return 0
        return int((self.start[is_row] >= 0).sum() + (self.end[is_row] >= 0).sum())

    def _find_wrappers(self) -> I64Array | None:
        """Return the row of the wrapper call that encloses each SEAMCALL, ABSENT if none does.

        None unless both wrappers and low-level SEAMCALLs were recorded.
        """
        is_inner = self.probe == _INNER
        if not self.kinds.has_inner or is_inner.all() or not is_inner.any():
            return None
        wrapper = np.full(self.n, ABSENT, np.int64)
        rows = self.thread, self.start, self.end, is_inner
        row_at, latest, after = (
            np.full(size, ABSENT, np.int64)
            for size in (len(self.batch), self.n_threads, self.n_threads)
        )
        self.run(pairing.find_enclosing)(*rows, row_at, latest, wrapper)
        value, present = self.words.get("status", _no_words(self.n))
        status = np.where(present, value, np.uint64(0))
        ends_at = np.full(self.n, ABSENT, np.int64)
        self.run(pairing.find_returned)(*rows, self.leaf, status, after, ends_at, wrapper)
        return wrapper

    def _copy_operands(self, wrapper: I64Array) -> None:
        """Copy operands from wrapper calls to the SEAMCALLs inside them.

        TD, vCPU and pages replace those in registers, which are physical addresses: where only the
        wrapper of a call was recorded, it has only the wrapper's pointers, and one TD must have one
        name.  A level in a register stays: the module numbers 4K as 0 (Intel TDX module ABI), the
        wrapper as its kernel does (see ``LevelBaseDetector``).
        """
        child = np.flatnonzero(wrapper >= 0)
        parent = wrapper[child]
        for name in pairing.IN_REGISTERS if len(child) else ():
            if name in self.words:
                value, present = self.words[name]
                is_copied = present[parent]
                if name == "level":
                    is_copied &= ~present[child]
                value[child[is_copied]] = value[parent[is_copied]]
                present[child[is_copied]] = True

    def run_kinds(self) -> loops.Bytes:
        """Return the kind of each row of :meth:`frame` for :class:`VcpuRuns`."""
        run_kinds = np.full(self.n, NO_RUN, np.uint8)
        if "status" in self.words:
            # A TDH.VP.ENTER probe whose function is not printed may be on tdx_vcpu_run too; if it
            # is on a function inside, kvm_entry lies between any two of its returns.
            is_run = (self.probe == _VCPU_RUN) | self._is_entry()
            is_run &= (self.end >= 0) & self.words["status"][1]
            event = self.batch.event.take(self.end[is_run])
            is_handler = self.kinds.is_handler.take(event)
            run_kinds[is_run] = np.where(is_handler, loops.HANDLED, loops.RETURNED)
        return run_kinds[~self.dropped]

    def _is_entry(self) -> BoolArray:
        found: BoolArray = (self.probe == _WRAPPER) & (self.leaf == _VP_ENTER)
        return found

    def frame(self, source: int) -> pl.DataFrame:
        """Return the attempts as ``seamcalls`` rows, in line order."""
        columns, present = make_rows(self.batch, self.start, self.end, self.run)
        if "duration_ns" in self.words:
            # function_graph prints a call without children on one line, with its duration.
            took, has_took = self.words["duration_ns"]
            columns["start_ns"] = np.where(
                has_took, columns["end_ns"] - took.view(np.int64), columns["start_ns"]
            )
            present["start_ns"] |= has_took
        columns |= {"source": source, "leaf": self.leaf, "probe": self.probe}
        for name, (value, mask) in self.words.items():
            if name != "leaf":
                columns[name], present[name] = value, mask
        if self.dropped.any():
            return _frame_of(SEAMCALLS, ~self.dropped, columns, present)
        return frame(SEAMCALLS, self.n, columns, present)

    def loader_frame(self, source: int) -> pl.DataFrame:
        """Return the calls of the P-SEAMLDR as ``loader_calls`` rows, in line order."""
        columns, present = make_rows(self.batch, self.start, self.end, self.run)
        columns |= {"source": source, "loader_leaf": self.leaf, "probe": self.probe}
        columns["status"], present["status"] = self.words.get("status", _no_words(self.n))
        return _frame_of(LOADER_CALLS, self.is_loader, columns, present)


def _frame_of(
    table: Table,
    is_kept: BoolArray,
    columns: Mapping[str, Column],
    present: Mapping[str, BoolArray],
) -> pl.DataFrame:
    """Build rows of ``table`` from the entries where ``is_kept``."""
    indexes = np.flatnonzero(is_kept)
    columns = {n: x[indexes] if isinstance(x, np.ndarray) else x for n, x in columns.items()}
    present = {name: mask[indexes] for name, mask in present.items()}
    return frame(table, len(indexes), columns, present)


def _no_words(n: int) -> Words:
    return np.zeros(n, np.uint64), np.zeros(n, np.bool_)


@cache
def _registers() -> I8Array:
    """Return, by leaf and operand of pairing.IN_REGISTERS, the index of the register holding it."""
    table = operand_table()
    shape = int(table["leaf"].to_numpy().max()) + 1, len(pairing.IN_REGISTERS)
    made = np.full(shape, pairing.NO_REGISTER, np.int8)
    for leaf, name, register in table.select("leaf", "column", "register").iter_rows():
        register_index = pairing.REGISTERS.index(register.lower())
        made[leaf, pairing.IN_REGISTERS.index(name)] = register_index
    return made


# A thread runs one vCPU, and enters it again only after an exit.
_MAX_OPEN: Final = 1
_KVM_ISA_VMX: Final = 1  # Linux arch/x86/include/uapi/asm/vmx.h and arch/x86/kvm/trace.h


def _same_names(*names: str) -> Mapping[str, str]:
    return {name: name for name in names}


_VM_ENTRY_COLUMNS: Final = _same_names("vcpu_id", "immediate_exit")
_VM_EXIT_COLUMNS: Final = _same_names(
    *("vcpu_id", "exit_reason", "isa", "info1", "info2", "intr_info", "error_code", "rip"),
    "requests",
)
_FAULT_COLUMNS: Final = _same_names("vcpu_id", "gpa", "error_code", "rip")
_HOST_EVENT_COLUMNS: Final = _same_names(
    *("vcpu_id", "reason", "errno", "signed_errno", "gfn", "gfn_end"),
    *("port", "is_write", "size", "count", "value"),
)
_PAGE_SHIFT: Final = np.uint64(12)


@dataclass(slots=True)
class VmEntries:
    """Pairs kvm_entry with kvm_exit by thread and keeps entries without an exit yet."""

    source: int
    stats: SourceStats
    run: Runner[Any]
    open: RecordBatch | None = None
    ambiguous: BoolArray | None = None

    def feed(self, parts: Sequence[RecordBatch], kinds: Kinds) -> pl.DataFrame:
        """Return the ``vm_entries`` rows that ``parts`` complete."""
        batch = concatenate([*([] if self.open is None else [self.open]), *parts])
        paired = pair(batch, kinds, _MAX_OPEN, self.run, self.ambiguous)
        is_open = paired.fate == pairing.OPEN
        self.open = batch.take(is_open).detached()
        self.ambiguous = paired.partner[is_open] == pairing.AMBIGUOUS
        at = np.flatnonzero(paired.fate >= pairing.RETURN_OF_PAIR)
        return self._frame(batch, *paired.rows(at))

    def drop_open(self, before_ns: int) -> None:
        """Drop what began before ``before_ns`` and is still open."""
        if self.open is not None and self.ambiguous is not None:
            self.ambiguous = self.ambiguous[self.open.ts_ns >= before_ns]
            self.open = self.open.take(self.open.ts_ns >= before_ns).detached()

    def finish(self) -> pl.DataFrame:
        """Return the ``vm_entries`` rows of entries whose exit was never seen."""
        if self.open is None:
            return VM_ENTRIES.empty()
        batch, self.open = self.open, None
        all_events = np.arange(len(batch))
        return self._frame(batch, all_events, np.full(len(batch), -1))

    def _frame(self, batch: RecordBatch, start: I64Array, end: I64Array) -> pl.DataFrame:
        words = read_fields(batch, ((start, _VM_ENTRY_COLUMNS), (end, _VM_EXIT_COLUMNS)), self.run)
        if "isa" in words and "exit_reason" in words:
            # Keep exit reasons of Intel processors only: AMD numbers them differently.
            isa, has_isa = words["isa"]
            is_other = has_isa & (isa != _KVM_ISA_VMX)
            if is_other.any():
                self._record_unknown(words["exit_reason"][0][is_other], batch.line[end[is_other]])
            words["exit_reason"][1][is_other] = False
        columns, present = make_rows(batch, start, end, self.run)
        columns |= {"source": self.source, **{name: value for name, (value, _) in words.items()}}
        present |= {name: mask for name, (_, mask) in words.items()}
        return frame(VM_ENTRIES, len(start), columns, present)

    def _record_unknown(self, reason: U64Array, line: I64Array) -> None:
        """Record exit codes of AMD processors as unknown."""
        codes, first, n = np.unique(reason, return_index=True, return_counts=True)
        for code, at, n_exits in zip(codes.tolist(), first.tolist(), n.tolist(), strict=True):
            what = f"exit reason {code:#x} {OF_AMD}"
            self.stats.record_unknown(what, int(line[at]), n_exits)


def page_faults(batch: RecordBatch, source: int, run: Runner[Any]) -> pl.DataFrame:
    """Return one ``page_faults`` row per event of ``batch``."""
    words = read_fields(batch, ((np.arange(len(batch)), _FAULT_COLUMNS),), run)
    return _frame(PAGE_FAULTS, batch, {"source": source}, words)


def host_events(
    batch: RecordBatch, source: int, events: Sequence[Event], run: Runner[Any]
) -> pl.DataFrame:
    """Return one ``host_events`` row per event of ``batch``."""
    words = read_fields(batch, ((np.arange(len(batch)), _HOST_EVENT_COLUMNS),), run)
    if "signed_errno" in words:
        _split_errno(words, len(batch))
    if "gfn_end" in words:
        gfn, has_gfn = words.pop("gfn")
        gfn_end, _ = words.pop("gfn_end")
        words["gpa"] = gfn << _PAGE_SHIFT, has_gfn
        words["n_bytes"] = gfn_end - gfn << _PAGE_SHIFT, has_gfn & (gfn_end >= gfn)
    if "port" in words:
        (size, has_size), (count, _) = words.pop("size"), words.pop("count")
        n_bytes, has_bytes = words.get("n_bytes", _no_words(len(batch)))
        words["n_bytes"] = np.where(has_size, size * count, n_bytes), has_bytes | has_size
    names = pl.Series([event.name.rpartition(":")[2] for event in events], dtype=pl.String)
    return _frame(HOST_EVENTS, batch, {"source": source, "event": names.gather(batch.event)}, words)


def _split_errno(words: dict[str, Words], n: int) -> None:
    """Move a negative errno to ``errno`` and clear ``reason``: KVM prints one or the other."""
    recorded, is_present = words["signed_errno"]
    signed = recorded.view(np.int64)
    has_failed = is_present & (signed < 0)
    errno, has_errno = words.get("errno", _no_words(n))
    positive = np.where(has_failed, -signed, 0).astype(np.uint64)
    words["errno"] = np.where(has_failed, positive, errno), has_errno | has_failed
    if "reason" in words:
        words["reason"][1][has_failed] = False


def _frame(
    table: Table, batch: RecordBatch, given: Mapping[str, Column], words: Mapping[str, Words]
) -> pl.DataFrame:
    """Build rows of ``table``, one per event."""
    columns: dict[str, Column] = {
        **{name: value for name, (value, _) in words.items()},
        **{name: getattr(batch, name) for name in ("ts_ns", "cpu", "tid", "tgid")},
        **{"seq": batch.line.view(np.uint64), "n_lines": 1, **given},
    }
    present = {name: mask for name, (_, mask) in words.items()}
    present |= {
        "cpu": batch.cpu != UNKNOWN,
        "tid": batch.tid != UNKNOWN,
        "tgid": batch.tgid != UNKNOWN,
    }
    return frame(table, len(batch), columns, present)
