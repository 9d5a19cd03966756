"""Options of a capture: level of detail, recipe dialect, and those of a recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Detail(StrEnum):
    """How much is traced."""

    minimal = "minimal"
    full = "full"
    stock = "stock"


class Dialect(StrEnum):
    """Tools that a recipe can be written for."""

    tracefs = "tracefs"
    trace_cmd = "trace-cmd"
    perf = "perf"
    bpftrace = "bpftrace"


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """Options of ``capture record`` and ``watch``, as given on the command line."""

    detail: str
    seamcalls: bool = False
    """Probe __seamcall and __seamcall_ret too."""
    only_tds: bool = False
    """Leave out the KVM events of VMs that are no TDs."""
    rate: int | None = None
    """Events per second expected on the busiest CPU; None: the default."""
    program: Path | None = None
    """Program to probe in place of the kernel."""
    output: Path = Path("trace.dat")
    buffer: str | None = None
    """Ring buffer per CPU, such as 64M; None: derived from the rate."""
    duration: str | None = None
    """How long to record, such as 10s; None: until interrupted."""
    command: Sequence[str] = ()
    """Command to run while recording; the recording ends with it."""
    pids: Sequence[int] = ()
    """Only these processes and their children."""
    force: bool = False
    """Overwrite the output."""
