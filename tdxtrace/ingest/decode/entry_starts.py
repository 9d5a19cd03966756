"""Find start times of vCPU entries probed on return only: the time of the kvm_entry before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.compiler import Runner
from tdxtrace.ingest.batch import UNKNOWN, I64Array, RecordBatch
from tdxtrace.ingest.decode.events import ABSENT, number_threads
from tdxtrace.ingest.events.registry import Event
from tdxtrace.ingest.loops import pairing
from tdxtrace.tables.events import SEAMCALLS

_COLUMNS: Final = ("seq", "start_ns", "start_cpu")
_SCHEMA: Final = {name: SEAMCALLS.schema[name] for name in _COLUMNS}
_NO_STARTS: Final = pl.DataFrame(schema=_SCHEMA)
# Rows of the arrays of events, a column for each event.
_ROLE, _LINE, _NS, _CPU, _TID, _VCPU = range(6)


@dataclass(slots=True)
class EntryStarts:
    """Finds the kvm_entry of each return of tdx_vcpu_run, batch by batch.

    tdx_vcpu_run traces kvm_entry just before TDH.VP.ENTER and kvm_exit at most once after it, and
    returns, on one CPU: Linux 6.16 to 7.2 arch/x86/kvm/vmx/tdx.c, called with interrupts off.  So
    the start of a call is the latest kvm_entry of its thread, if no event that the thread emits
    outside the function (a SEAMCALL, kvm_page_fault, kvm_userspace_exit) and no second kvm_exit
    lies between, and if the CPU is the same, and the vCPU too where the probe records it.
    tdx_handle_exit, if probed instead, is called soon after; on another CPU it gets no start.

    Without such a kvm_entry the call has no start.  Either kvm_entry was not recorded, or there was
    none: tdx_vcpu_run returns at once with the status of the previous entry while a zap holds vCPUs
    off.  The rule must not match that return, nor the kvm_entry of a VM without TDX, of another
    thread, of another vCPU in the same thread, or of an entry whose own return was lost.
    """

    run: Runner[Any]
    _open: I64Array = field(default_factory=lambda: np.zeros((6, 0), np.int64))
    """The kvm_entry of each thread that has no return yet, and the kvm_exit after it."""

    def feed(self, parts: Sequence[RecordBatch], events: Sequence[Event]) -> pl.DataFrame:
        """Return ``seq``, ``start_ns`` and ``start_cpu`` of the calls whose start was found.

        Args:
            parts: Events of the source, in order.
            events: The event of each event ID.
        """
        role = _roles(events)
        if pairing.KVM_ENTRY not in role or pairing.RUN_RETURN not in role:
            return _NO_STARTS
        table = np.concatenate(
            [self._open, *(_thread_events(part, role) for part in parts)], axis=1
        )
        thread, n_threads = number_threads(table[_TID].astype(np.int32), self.run)
        entered, exited = (np.full(n_threads, ABSENT, np.int64) for _ in range(2))
        found = np.full(len(thread), ABSENT, np.int64)
        keys = table[_ROLE], table[_CPU], table[_VCPU]
        self.run(pairing.find_entry_starts)(thread, *keys, entered, exited, found)
        open_events = np.concatenate([entered, exited])
        self._open = table[:, np.sort(open_events[open_events >= 0])]
        returns = np.flatnonzero(found >= 0)
        start = found[returns]
        is_before = table[_NS, start] <= table[_NS, returns]
        returns, start = returns[is_before], start[is_before]
        columns = table[_LINE, returns], table[_NS, start], table[_CPU, start]
        return pl.DataFrame(
            [
                pl.Series(name, column).cast(_SCHEMA[name], strict=False)
                for name, column in zip(_COLUMNS, columns, strict=True)
            ]
        )

    def drop_open(self, before_ns: int) -> None:
        """Drop open kvm_entry events before ``before_ns``."""
        self._open = self._open[:, self._open[_NS] >= before_ns]


def fill_starts(seamcalls: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    """Return ``seamcalls`` with missing starts and start CPUs filled from ``found``, by ``seq``."""
    if found.is_empty():
        return seamcalls
    starts = seamcalls.select("seq").join(found, on="seq", how="left", maintain_order="left")
    names = _COLUMNS[1:]
    return seamcalls.with_columns(pl.coalesce(pl.col(n), starts[n]).alias(n) for n in names)


def _roles(events: Sequence[Event]) -> I64Array:
    """Return the role of each event; all NOTHING where entries of tdx_vcpu_run are probed."""
    if any(e.probe == "vcpu_run" and e.role == "entry" for e in events):
        return np.full(len(events), pairing.IGNORED, np.int64)
    return np.array([_role(event) for event in events], np.int64)


def _role(event: Event) -> int:
    if event.kind == "vm_entry":
        return pairing.KVM_ENTRY if event.role == "entry" else pairing.KVM_EXIT
    if event.kind in ("call", "page_fault", "host_event"):
        return pairing.RUN_RETURN if event.probe == "vcpu_run" else pairing.OUTSIDE
    return pairing.IGNORED


def _thread_events(part: RecordBatch, role: I64Array) -> I64Array:
    """Return the events of a batch that have a role, a column each; without those in interrupts."""
    roles = role.take(part.event)
    at = np.flatnonzero((roles != pairing.IGNORED) & (part.in_irq != 1))
    selected = part.take(at)
    vcpu, has_vcpu = selected.get("vcpu_id")
    # Where the tool did not print the thread, the CPU replaces it, as in pairs of calls.
    tid = np.where(selected.tid == UNKNOWN, -2 - selected.cpu, selected.tid)
    number = np.where(has_vcpu, vcpu.astype(np.int64), UNKNOWN)
    rows = roles[at], selected.line, selected.ts_ns, selected.cpu, tid, number
    return np.stack([row.astype(np.int64) for row in rows])
