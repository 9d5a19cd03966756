"""What a capture lost without saying so: concluded from its rows and its header."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.ingest.decoding.midway import IS_NAMED, VP_ENTER, Beginning, bare_return, threads_of
from tdxtrace.ingest.decoding.pairing import Index
from tdxtrace.ingest.headers import Header
from tdxtrace.ingest.tally import Tally
from tdxtrace.tables.text import one_line

# Calls without an end or a begin that are looked at: where there are more, a probe
# was missing, and they tell nothing of full buffers.
_MAX_BROKEN: Final = 1 << 20
_MANY: Final = 64
_MANY_TIDS: Final = 1 << 16
_WHEN: Final = pl.coalesce("end_ns", "start_ns")
_NONE_BROKEN: Final = pl.DataFrame(
    schema={
        "leaf": pl.UInt16,
        "tid": pl.Int32,
        "cpu": pl.UInt16,
        "start_ns": pl.Int64,
        "end_ns": pl.Int64,
    }
)


@dataclass(slots=True)
class Watch:
    """What the calls of a source tell of losses, batch by batch."""

    is_large: bool = False
    """Whether compiled loops pay."""
    n_never: int = 0
    n_orphans: int = 0
    has_entries: set[int] = field(default_factory=set)
    """Leaves whose entries were seen; the probe of another is on its return alone."""
    beginning: Beginning = field(default_factory=Beginning)
    _n_broken: int = 0
    _broken: list[pl.DataFrame] = field(default_factory=list)
    _extents: list[pl.DataFrame] = field(default_factory=list)

    def look(self, seamcalls: pl.DataFrame) -> None:
        """Look at further calls of the source."""
        n_never, n_orphans = seamcalls["end_ns"].null_count(), seamcalls["start_ns"].null_count()
        self.n_never += n_never
        self.n_orphans += n_orphans
        threads = done = None
        if self.is_large and not n_never + n_orphans:
            threads, done = self._look_quickly(seamcalls)
        if threads is None:
            leaf = seamcalls["leaf"]
            begun = leaf.filter(seamcalls["start_ns"].is_not_null()) if n_orphans else leaf
            self.has_entries |= set(np.flatnonzero(np.bincount(begun.to_numpy())).tolist())
            threads = _quick_threads(seamcalls)
        if threads is None or not self.beginning.knows(seamcalls, threads):
            threads = threads_of(seamcalls, first=_WHEN.min(), last=_WHEN.max())
            self.beginning.look(seamcalls, threads)
        self.beginning.look_at_done(seamcalls, threads, done)
        self._extents.append(pl.DataFrame([threads[name] for name in ("tid", "first", "last")]))
        if len(self._extents) > _MANY:
            self._extents = [self._all_extents()]
        if self._n_broken <= _MAX_BROKEN and n_never + n_orphans:
            columns = ("leaf", "tid", "cpu", "start_ns", "end_ns")
            broken = seamcalls.filter(pl.col("end_ns").is_null() | bare_return()).select(columns)
            self._broken.append(broken)
            self._n_broken += broken.height

    def _look_quickly(self, seamcalls: pl.DataFrame) -> tuple[pl.DataFrame | None, Index | None]:
        """The threads of many whole calls, and which calls were done; None if it cannot be so."""
        from tdxtrace.ingest.decoding.loops import look  # noqa: PLC0415 - imports numba

        columns = [seamcalls[name] for name in ("tid", "end_ns", "leaf", "status")]
        if any(column.null_count() for column in columns):
            return None, None
        tid, ends, leaf, status = (column.to_numpy() for column in columns)
        seen = look(tid, ends, leaf, status, VP_ENTER, IS_NAMED)
        if seen is None:
            return None, None
        self.has_entries.update(seen.leaves.tolist())
        threads = {"tid": seen.tid, "enters": seen.enters}
        return pl.DataFrame(
            threads | {"first": ends[seen.first], "last": ends[seen.last]}
        ), seen.done

    def _all_extents(self) -> pl.DataFrame:
        grouped = pl.concat(self._extents).group_by("tid")
        return grouped.agg(pl.col("first").min(), pl.col("last").max())

    def broken(self) -> pl.DataFrame:
        """Calls that lack an end or a begin though their thread went on, or was there before."""
        if not self._broken or self._n_broken > _MAX_BROKEN:
            return _NONE_BROKEN.clear()
        calls = pl.concat(self._broken)
        calls = calls.join(self._all_extents(), on="tid", how="left", nulls_equal=True)
        has_entries = pl.col("leaf").is_in(list(self.has_entries))
        never = pl.col("end_ns").is_null() & (pl.col("last") != _WHEN)
        orphan = pl.col("start_ns").is_null() & (pl.col("first") != _WHEN)
        return calls.filter(never | (orphan & has_entries), pl.col("cpu").is_not_null())


def _quick_threads(seamcalls: pl.DataFrame) -> pl.DataFrame | None:
    """The threads of calls that came in the order of their ends and are whole; else None.

    One row per thread: whether it enters a vCPU, and when its calls first and last ended.
    """
    if any(seamcalls[name].null_count() for name in ("tid", "start_ns", "end_ns")):
        return None
    tid, ends = seamcalls["tid"].to_numpy(), seamcalls["end_ns"].to_numpy()
    least = int(tid.min())
    numbers = tid - least
    n = int(numbers.max()) + 1
    if n > _MANY_TIDS or (ends[1:] < ends[:-1]).any():
        return None
    # Of several values assigned to one place the last one stays.
    first, last = np.full(n, -1, np.intp), np.zeros(n, np.intp)
    last[numbers] = np.arange(len(tid))
    first[numbers[::-1]] = np.arange(len(tid) - 1, -1, -1)
    enters = np.zeros(n, np.bool_)
    enters[numbers[seamcalls["leaf"].to_numpy() == VP_ENTER]] = True
    met = np.flatnonzero(first >= 0)
    columns = {"tid": (met + least).astype(np.int32), "enters": enters[met]}
    return pl.DataFrame(columns | {"first": ends[first[met]], "last": ends[last[met]]})


def note(watch: Watch, tally: Tally, header: Header) -> None:
    """Add to ``tally`` the losses that no line of the input stands for."""
    _overwritten(tally, header)
    if not header.counts_losses:
        _buffer_full(watch.broken(), tally)
    first_ns, _ = tally.span()
    lossless = not any(gap.kind != "truncated" for gap in tally.gaps)
    if lossless and first_ns is not None and watch.beginning.is_midway():
        tally.note("started_midway", None, end_ns=first_ns)
    tally.note("unpaired_entry", watch.n_never)
    tally.note("unpaired_return", watch.n_orphans)


def nothing_in(shown: str, tally: Tally) -> str:
    """Say that a trace has no SEAMCALL and no KVM event, what it has, and what to record."""
    names = [detail for kind, detail in tally.entries if kind in ("noise", "unmapped") and detail]
    if any(kind == "no_abstime" for kind, _ in tally.entries):
        return f"{shown} has no times; switch them on: echo 1 > options/funcgraph-abstime"
    if "about something else" in names:
        return f"{shown} is a kernel log without a message about TDX; give it with --dmesg"
    if not names and not tally.events:
        return f"{shown} holds no event that is known; its first line: {_sample(tally)}"
    some = ", ".join(one_line(name, 30) for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    unmapped = any(kind == "unmapped" for kind, _ in tally.entries)
    way = (
        "say what the probes are with --map EVENT=FUNCTION"
        if unmapped
        else "record kvm:kvm_entry, kvm:kvm_exit and probes on tdh_mem_page_aug and its siblings"
    )
    return f"{shown} has no SEAMCALL and no KVM event; it has {some}{more}; {way}"


def _sample(tally: Tally) -> str:
    return next((repr(e.detail) for e in tally.entries.values() if e.detail), "only headers")


def _overwritten(tally: Tally, header: Header) -> None:
    """In overwrite mode each CPU's record starts at its first event, not before."""
    if header.entries_kept is None or header.entries_written is None:
        return
    lost = header.entries_written - header.entries_kept
    if lost <= 0:
        return
    tally.note("overwritten", lost, "entries-in-buffer < entries-written")
    for cpu in tally.cpus():
        tally.note("overwritten", None, f"CPU {cpu}", cpu=cpu, end_ns=int(tally.first_ns[cpu]))


def _buffer_full(broken: pl.DataFrame, tally: Tally) -> None:
    """With overwrite off a full buffer drops what is new, and no line says so.

    A call that never returned though its thread went on, or a return without
    entry, after the last event of some CPU, shows that the CPU's record had ended.
    """
    if any(gap.kind != "truncated" for gap in tally.gaps) or not broken.height:
        return
    latest = int(broken.select(_WHEN.max()).item())
    for cpu in tally.cpus():
        last = int(tally.last_ns[cpu])
        ends_here = (pl.col("cpu") == cpu) & (pl.col("start_ns") == last)
        if last <= latest or broken.select(ends_here.any()).item():
            tally.note("buffer_full", None, f"CPU {cpu}", cpu=cpu, start_ns=last)
