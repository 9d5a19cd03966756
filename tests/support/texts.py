"""Trace text as files for the reader."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import polars as pl

from tdxtrace.ingest.read import read_trace
from tdxtrace.tables.trace import Trace

BUSY = 0x8000_0200_0000_0092


def as_bytes(text: str | bytes) -> bytes:
    """The bytes of a file that holds ``text``."""
    return text if isinstance(text, bytes) else text.encode()


def read_text(*texts: str | bytes, name: str = "trace.txt", **options: Any) -> Trace:  # noqa: ANN401
    """Read files that hold ``texts``, one source each."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, text in enumerate(texts):
            paths.append(Path(folder) / f"{number}-{name}")
            paths[-1].write_bytes(as_bytes(text))
        return read_trace(*paths, **options)


def line(stamp: str, event: str, task: str = "CPU 0/KVM-7", cpu: int = 1) -> str:
    """One line of a tracefs ``trace`` file."""
    comm, _, tid = task.rpartition("-")
    return f"{comm:>16}-{tid:<7} [{cpu:03}] ..... {stamp}: {event}\n"


def aug(stamp: str, arguments: str = "td=0x7d000 gpa=0x80000000 level=0", **place: Any) -> str:  # noqa: ANN401
    """The entry of tdh_mem_page_aug, probed by symbol."""
    return line(stamp, f"aug: (tdh_mem_page_aug+0x4/0xb0) {arguments}", **place)


def aug_ret(stamp: str, arguments: str = "ret=0x0", **place: Any) -> str:  # noqa: ANN401
    """The return of tdh_mem_page_aug."""
    caller = "tdx_sept_set_private_spte+0x9b/0x1a0 [kvm_intel]"
    return line(stamp, f"aug_ret: ({caller} <- tdh_mem_page_aug) {arguments}", **place)


# One call, for tests of other lines that give no row.
ONE_CALL = aug("1.000001") + aug_ret("1.000003")


def accounts(trace: Trace) -> list[tuple[int, int]]:
    """For each source: lines read, and lines that are a header, part of a row, or a loss."""
    found = []
    for number, source in enumerate(trace.provenance.sources):
        rows = [frame for frame in trace.tables().values() if "n_lines" in frame.columns]
        lines = sum(int(f.filter(pl.col("source") == number)["n_lines"].sum()) for f in rows)
        found.append((source.n_lines, source.n_headers + lines))
    return found


def is_accounted_for(trace: Trace) -> bool:
    """Whether every line of every source is counted exactly once."""
    return all(read == counted for read, counted in accounts(trace))


def lost(trace: Trace) -> dict[str, int]:
    """Lines that each kind of loss accounts for."""
    kinds = trace.losses.group_by(pl.col("kind").cast(pl.String), maintain_order=True)
    return {kind: n for kind, n in kinds.agg(pl.col("n_lines").sum()).rows() if n}
