"""Options of a capture: level of detail, recipe dialect, and those of a recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

HELP: Final = {
    "btf": "Types of that kernel; then of its kvm_intel, if a module.",
    "buffer": "Per CPU, e.g. 64M; else from --rate.",
    "command": "Record while it runs.",
    "dialect": "Tool to record with.",
    "duration": "How long, e.g. 10s; else to Ctrl-C.",
    "force": "Overwrite the output.",
    "json": "Print one JSON object.",
    "kallsyms": "A copy of its /proc/kallsyms.",
    "kernel": "For that kernel, not for this one.",
    "level": "minimal: faults and zaps, returns only; stock: KVM's own events.",
    "only_tds": "Leave out KVM's events of VMs that are no TDs.",
    "output": "trace.dat, trace.txt, or a folder of raw pages.",
    "pid": "Only this process and its children; repeatable.",
    "program": "Probe a program with functions named like the wrappers, not the kernel.",
    "quiet": "No progress, no summary.",
    "rate": "Events per second on the busiest CPU.",
    "seamcalls": "Probe __seamcall too: shows retries for entropy.",
    "tracefs": "Where tracefs is mounted.",
}
"""Help text of each option of ``capture``."""
DOCTOR: Final = "Check what can be traced on this host; print impact and fix of what is missing."
PLAN: Final = "Print the exact recipe for a kernel as a script: probes, events, clock, buffer."
RECORD: Final = "Record in a private tracefs instance, and remove it and its probes at the end."
CLEAN: Final = "Remove probes and instances of killed recorders, and nothing of other tools."


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
    histogram = "histogram"


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """Options of ``capture record`` and ``watch``, from the command line."""

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
