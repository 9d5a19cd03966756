"""From KVM's tracepoints to vCPU entries, page faults and other host events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.compiler import Runner
from tdxtrace.ingest.batch import UNKNOWN, I64Array, RecordBatch, concatenate
from tdxtrace.ingest.decode.events import Column, Kinds, Words, frame, make_rows, pair, read_fields
from tdxtrace.ingest.events.registry import Event
from tdxtrace.ingest.loops import pairing
from tdxtrace.tables.events import HOST_EVENTS, PAGE_FAULTS, VM_ENTRIES
from tdxtrace.tables.schema import Table

# A thread runs one vCPU, and enters it again only after it came out.
_MAX_OPEN: Final = 1
_KVM_ISA_VMX: Final = 1  # Linux arch/x86/include/uapi/asm/vmx.h and arch/x86/kvm/trace.h


def _same(*names: str) -> Mapping[str, str]:
    return {name: name for name in names}


_OF_ENTRY: Final = _same("vcpu_id", "immediate_exit")
_OF_EXIT: Final = _same(
    *("vcpu_id", "exit_reason", "isa", "info1", "info2", "intr_info", "error_code", "rip"),
    "requests",
)
_OF_FAULT: Final = _same("vcpu_id", "gpa", "error_code", "rip")
_OF_HOST_EVENT: Final = _same("vcpu_id", "reason", "errno", "signed_errno", "gpa")


@dataclass(slots=True)
class VmEntries:
    """Pairs kvm_entry with kvm_exit by thread and keeps the vCPUs still inside."""

    source: int
    run: Runner[Any]
    open: RecordBatch | None = None

    def feed(self, parts: Sequence[RecordBatch], kinds: Kinds) -> pl.DataFrame:
        """Return the ``vm_entries`` rows that ``parts`` complete."""
        batch = concatenate([*([] if self.open is None else [self.open]), *parts])
        made = pair(batch, kinds, _MAX_OPEN, self.run)
        self.open = batch.take(made.fate == pairing.OPEN).detached()
        at = np.flatnonzero(made.fate >= pairing.RETURN_OF_PAIR)
        return self._frame(batch, *made.rows(at))

    def forget(self, before_ns: int) -> None:
        """Drop what began before ``before_ns`` and is still open."""
        if self.open is not None:
            self.open = self.open.take(self.open.ts_ns >= before_ns).detached()

    def finish(self) -> pl.DataFrame:
        """Return the entries whose exit was never seen."""
        if self.open is None:
            return VM_ENTRIES.empty()
        batch, self.open = self.open, None
        every = np.arange(len(batch))
        return self._frame(batch, every, np.full(len(batch), -1))

    def _frame(self, batch: RecordBatch, start: I64Array, end: I64Array) -> pl.DataFrame:
        words = read_fields(batch, ((start, _OF_ENTRY), (end, _OF_EXIT)), self.run)
        if "isa" in words and "exit_reason" in words:
            # A reason to exit counts where the processor is one of Intel's: AMD has others.
            isa, has_isa = words["isa"]
            words["exit_reason"][1][has_isa & (isa != _KVM_ISA_VMX)] = False
        columns, seen = make_rows(batch, start, end, self.run)
        columns |= {"source": self.source, **{name: value for name, (value, _) in words.items()}}
        seen |= {name: there for name, (_, there) in words.items()}
        return frame(VM_ENTRIES, len(start), columns, seen)


def page_faults(batch: RecordBatch, source: int, run: Runner[Any]) -> pl.DataFrame:
    """Return one ``page_faults`` row per event of ``batch``."""
    words = read_fields(batch, ((np.arange(len(batch)), _OF_FAULT),), run)
    return _frame(PAGE_FAULTS, batch, {"source": source}, words)


def host_events(
    batch: RecordBatch, source: int, events: Sequence[Event], run: Runner[Any]
) -> pl.DataFrame:
    """Return one ``host_events`` row per event of ``batch``."""
    words = read_fields(batch, ((np.arange(len(batch)), _OF_HOST_EVENT),), run)
    if "signed_errno" in words:
        _understand_errno(words, len(batch))
    names = pl.Series([event.name.rpartition(":")[2] for event in events], dtype=pl.String)
    return _frame(HOST_EVENTS, batch, {"source": source, "event": names.gather(batch.event)}, words)


def _understand_errno(words: dict[str, Words], n: int) -> None:
    """Let a negative errno stand for the reason: KVM prints one or the other."""
    recorded, is_there = words["signed_errno"]
    signed = recorded.view(np.int64)
    has_failed = is_there & (signed < 0)
    errno, has_errno = words.get("errno", (np.zeros(n, np.uint64), np.zeros(n, np.bool_)))
    positive = np.where(has_failed, -signed, 0).astype(np.uint64)
    words["errno"] = np.where(has_failed, positive, errno), has_errno | has_failed
    if "reason" in words:
        words["reason"][1][has_failed] = False


def _frame(
    table: Table, batch: RecordBatch, given: Mapping[str, Column], words: Mapping[str, Words]
) -> pl.DataFrame:
    """Build a table with one row per event."""
    columns: dict[str, Column] = {
        **{name: value for name, (value, _) in words.items()},
        **{name: getattr(batch, name) for name in ("ts_ns", "cpu", "tid", "tgid")},
        **{"seq": batch.line.view(np.uint64), "n_lines": 1, **given},
    }
    seen = {name: there for name, (_, there) in words.items()}
    seen |= {
        "cpu": batch.cpu != UNKNOWN,
        "tid": batch.tid != UNKNOWN,
        "tgid": batch.tgid != UNKNOWN,
    }
    return frame(table, len(batch), columns, seen)
