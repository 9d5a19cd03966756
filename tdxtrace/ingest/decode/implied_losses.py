"""What a capture lost without saying so: concluded from its rows and its header."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.compiler import Runner, interpreted
from tdxtrace.ingest.batch import BoolArray
from tdxtrace.ingest.decode.trace_start import StartDetector, bare_return, spans_of
from tdxtrace.ingest.provenance import Header
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.text import one_line

# Calls without an end or a begin that are looked at: where there are more, a probe
# was missing, and they tell nothing of full buffers.
_MAX_BROKEN: Final = 1 << 20
_N_LEAVES: Final = 1 << 16
_WHEN: Final = pl.coalesce("end_ns", "start_ns")
_NONE_BROKEN: Final = SEAMCALLS.empty().select("leaf", "tid", "cpu", "start_ns", "end_ns")


@dataclass(slots=True)
class LossDetector:
    """What the calls of a source tell of losses, batch by batch."""

    run: Runner[Any] = interpreted
    n_never: int = 0
    n_orphans: int = 0
    has_entries: BoolArray = field(default_factory=lambda: np.zeros(_N_LEAVES, np.bool_))
    """By leaf: whether an entry was seen; the probe of another is on its return alone."""
    start: StartDetector = field(default_factory=StartDetector)
    _extents: dict[int | None, tuple[int, int]] = field(default_factory=dict)
    """When the calls of each thread first and last ended, ns."""
    _n_broken: int = 0
    _broken: list[pl.DataFrame] = field(default_factory=list)

    def observe_calls(self, seamcalls: pl.DataFrame) -> None:
        """Take further ``seamcalls`` rows of the source."""
        n_never, n_orphans = seamcalls["end_ns"].null_count(), seamcalls["start_ns"].null_count()
        self.n_never += n_never
        self.n_orphans += n_orphans
        leaf = seamcalls["leaf"]
        begun = leaf.filter(seamcalls["start_ns"].is_not_null()) if n_orphans else leaf
        self.has_entries[begun.to_numpy()] = True
        spans = spans_of(seamcalls, self.run)
        self.start.observe_calls(seamcalls, spans)
        for tid, first, last in zip(spans.tid, spans.first_end_ns, spans.last_end_ns, strict=True):
            known = self._extents.get(tid, (first, last))
            self._extents[tid] = min(first, known[0]), max(last, known[1])
        if self._n_broken <= _MAX_BROKEN and n_never + n_orphans:
            broken = seamcalls.filter(pl.col("end_ns").is_null() | bare_return())
            self._broken.append(broken.select(_NONE_BROKEN.columns))
            self._n_broken += broken.height

    def observe_entries(self, vm_entries: pl.DataFrame) -> None:
        """Take further ``vm_entries`` rows of the source."""
        self.start.observe_entries(vm_entries, spans_of(vm_entries, self.run))

    def broken(self) -> pl.DataFrame:
        """Calls that lack an end or a begin though their thread went on, or was there before."""
        if not self._broken or self._n_broken > _MAX_BROKEN:
            return _NONE_BROKEN
        rows = [(tid, *extent) for tid, extent in self._extents.items()]
        schema = {"tid": pl.Int32, "first": pl.Int64, "last": pl.Int64}
        extents = pl.DataFrame(rows, schema=schema, orient="row")
        calls = pl.concat(self._broken).join(extents, on="tid", how="left", nulls_equal=True)
        has_entries = pl.col("leaf").is_in(np.flatnonzero(self.has_entries).tolist())
        never = pl.col("end_ns").is_null() & (pl.col("last") != _WHEN)
        orphan = pl.col("start_ns").is_null() & (pl.col("first") != _WHEN)
        return calls.filter(never | (orphan & has_entries), pl.col("cpu").is_not_null())


def note(detector: LossDetector, stats: SourceStats, header: Header) -> None:
    """Add to ``stats`` the losses that no line of the input stands for."""
    _overwritten(stats, header)
    if not header.counts_losses:
        _buffer_full(detector.broken(), stats)
    first_ns, _ = stats.span()
    lossless = not any(gap.kind != "truncated" for gap in stats.gaps)
    if lossless and first_ns is not None and detector.start.is_midway():
        stats.record_loss("started_midway", None, end_ns=first_ns)
    stats.record_loss("unpaired_entry", detector.n_never)
    stats.record_loss("unpaired_return", detector.n_orphans)


def nothing_in(shown: str, stats: SourceStats) -> str:
    """Say that a trace has no SEAMCALL and no KVM event, what it has, and what to record."""
    names = [detail for kind, detail in stats.entries if kind in ("noise", "unmapped") and detail]
    if any(kind == "no_abstime" for kind, _ in stats.entries):
        return f"{shown} has no times; switch them on: echo 1 > options/funcgraph-abstime"
    if "about something else" in names:
        return f"{shown} is a kernel log without a message about TDX; give it with --dmesg"
    if not names and not stats.events:
        return f"{shown} holds no event that is known; its first line: {_sample(stats)}"
    some = ", ".join(one_line(name, 30) for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    unmapped = any(kind == "unmapped" for kind, _ in stats.entries)
    way = (
        "say what the probes are with --map EVENT=FUNCTION"
        if unmapped
        else "record kvm:kvm_entry, kvm:kvm_exit and probes on tdh_mem_page_aug and its siblings"
    )
    return f"{shown} has no SEAMCALL and no KVM event; it has {some}{more}; {way}"


def _sample(stats: SourceStats) -> str:
    return next((repr(e.detail) for e in stats.entries.values() if e.detail), "only headers")


def _overwritten(stats: SourceStats, header: Header) -> None:
    """In overwrite mode each CPU's record starts at its first event, not before."""
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


def _buffer_full(broken: pl.DataFrame, stats: SourceStats) -> None:
    """With overwrite off a full buffer drops what is new, and no line says so.

    A call that never returned though its thread went on, or a return without
    entry, after the last event of some CPU, shows that the CPU's record had ended.
    """
    if any(gap.kind != "truncated" for gap in stats.gaps) or not broken.height:
        return
    latest = int(broken.select(_WHEN.max()).item())
    for cpu in stats.cpus():
        last = int(stats.last_ns[cpu])
        ends_here = (pl.col("cpu") == cpu) & (pl.col("start_ns") == last)
        if last <= latest or broken.select(ends_here.any()).item():
            stats.record_loss("buffer_full", None, f"CPU {cpu}", cpu=cpu, start_ns=last)
