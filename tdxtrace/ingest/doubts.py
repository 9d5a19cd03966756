"""What a capture lost without saying so: concluded from its rows and its header."""

from __future__ import annotations

import numpy as np
import polars as pl

from tdxtrace.ingest.headers import Header
from tdxtrace.ingest.tally import Tally
from tdxtrace.tables.text import one_line


def note(seamcalls: pl.DataFrame, tally: Tally, header: Header) -> None:
    """Add to ``tally`` the losses that no line of the input stands for."""
    _overwritten(tally, header)
    _buffer_full(seamcalls, tally)
    _unpaired(seamcalls, tally)


def nothing_in(shown: str, tally: Tally) -> str:
    """Say that a trace has no SEAMCALL and no KVM event, what it has, and what to record."""
    names = [detail for kind, detail in tally.entries if kind in ("noise", "unmapped") and detail]
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


def _buffer_full(seamcalls: pl.DataFrame, tally: Tally) -> None:
    """With overwrite off a full buffer drops what is new, and no line says so.

    A call that never returned though its thread went on, or a return without
    entry, after the last event of some CPU, shows that the CPU's record had ended.
    Where no entry of a leaf was recorded at all, its probe is on the return alone.
    """
    if any(gap.kind != "truncated" for gap in tally.gaps) or not seamcalls.height:
        return
    when = pl.coalesce("end_ns", "start_ns")
    last_of_thread = when == when.max().over("tid")
    first_of_thread = when == when.min().over("tid")
    never = pl.col("end_ns").is_null() & ~last_of_thread
    whole = pl.col("gpa").is_null() & pl.col("td_id").is_null() & pl.col("vp_id").is_null()
    orphan = pl.col("start_ns").is_null() & whole & ~first_of_thread
    has_entries = pl.col("start_ns").is_not_null().any().over("leaf")
    broken = seamcalls.filter(never | (orphan & has_entries), pl.col("cpu").is_not_null())
    if not broken.height:
        return
    latest = int(broken.select(when.max()).item())
    for cpu in tally.cpus():
        last = int(tally.last_ns[cpu])
        if last <= latest or last in _ends_on(broken, cpu):
            tally.note("buffer_full", None, f"CPU {cpu}", cpu=cpu, start_ns=last)


def _ends_on(broken: pl.DataFrame, cpu: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return broken.filter(pl.col("cpu") == cpu)["start_ns"].drop_nulls().to_numpy()


def _unpaired(seamcalls: pl.DataFrame, tally: Tally) -> None:
    never, orphans = seamcalls.select(
        never=pl.col("end_ns").is_null().sum(), orphans=pl.col("start_ns").is_null().sum()
    ).row(0)
    tally.note("unpaired_entry", never)
    tally.note("unpaired_return", orphans)
