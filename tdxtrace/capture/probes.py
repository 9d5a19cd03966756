"""Probes on functions of the kernel or a program, the values they fetch, and buffer sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

# Events per second on the busiest CPU.  A TD's vCPU that faults in memory makes a few
# SEAMCALLs per fault; the shortest exit and entry measured takes 3.9 us (TUM-DSE/CVM_eval
# benchmarks/vmexit/README.md), so a guest can cause at most about 250,000 entries per second and
# CPU.  A choice, not a measurement: --rate changes it.
RATE: Final = 250_000
# Longest delay of the reader in seconds, and the fill level at which it is woken
# (buffer_percent, 50: Linux Documentation/trace/ftrace.rst).
STALL_S: Final = 1.0
WAKE_SHARE: Final = 0.5
# kvm_exit, the longest of KVM's own events, takes 68 bytes (6.18 format file).
_STOCK_BYTES: Final = 68
_MIN_KB: Final = 1 << 10
_MAX_KB: Final = 1 << 20
# The first six integer arguments: System V x86-64 ABI, 3.2.3; names as in Linux
# arch/x86/kernel/ptrace.c, regoffset_table.
REGISTERS: Final = ("di", "si", "dx", "cx", "r8", "r9")
# Bytes of a record: header of four (Linux include/linux/ring_buffer.h), struct trace_entry
# (trace_events.h) and the addresses of struct kprobe_trace_entry_head or
# kretprobe_trace_entry_head (kernel/trace/trace.h).
_HEAD: Final = 4 + 8
_ENTRY_HEAD: Final = 8
_RETURN_HEAD: Final = 16
_SIZES: Final = {"x64": 8, "u64": 8, "s64": 8, "x32": 4, "s32": 4, "u32": 4}


@dataclass(frozen=True, slots=True)
class Fetch:
    """One value that a probe fetches."""

    name: str
    kind: str
    """``argument``, ``memory`` (that an argument points to) or ``result``."""
    place: int = 0
    """Number of the argument, from 1."""
    offset: int = 0
    """Bytes added to the address in the argument."""
    type: str = "x64"

    @classmethod
    def argument(cls, name: str, place: int, type_: str) -> Fetch:
        """Fetch an argument."""
        return cls(name, "argument", place, 0, type_)

    @classmethod
    def memory(cls, name: str, place: int, offset: int, type_: str = "x64") -> Fetch:
        """Fetch memory at ``offset`` bytes from the address in an argument."""
        return cls(name, "memory", place, offset, type_)

    @classmethod
    def result(cls, name: str) -> Fetch:
        """Fetch the return value."""
        return cls(name, "result")

    def words(self, is_return: bool) -> str:
        """Return the fetch in tracefs syntax: Linux Documentation/trace/kprobetrace.rst."""
        if self.kind == "result":
            return f"{self.name}=$retval:{self.type}"
        where = f"$arg{self.place}" if is_return else f"%{REGISTERS[self.place - 1]}"
        if self.kind == "memory":
            where = f"+{self.offset}({where})"
        return f"{self.name}={where}:{self.type}"


@dataclass(frozen=True, slots=True)
class Probe:
    """An entry or return probe."""

    group: str
    function: str
    is_return: bool
    fetches: tuple[Fetch, ...]
    location: str = field(default="")
    """``PATH:0xOFFSET`` in a program; "": the kernel's function."""

    @property
    def event(self) -> str:
        """Name of the event; readers recognise the function in it."""
        return f"{self.function}_{'return' if self.is_return else 'entry'}"

    @property
    def name(self) -> str:
        """``group/event``."""
        return f"{self.group}/{self.event}"

    @property
    def line(self) -> str:
        """Definition for dynamic_events, kprobe_events or uprobe_events."""
        side = "r" if self.is_return else "p"
        words = [fetch.words(self.is_return) for fetch in self.fetches]
        return " ".join([f"{side}:{self.name}", self.location or self.function, *words])

    @property
    def n_bytes(self) -> int:
        """Size of a record in the ring buffer."""
        head = _HEAD + (_RETURN_HEAD if self.is_return else _ENTRY_HEAD)
        size = head + sum(_SIZES[fetch.type] for fetch in self.fetches)
        return (size + 3) & -4


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """Tracepoint of the kernel."""

    system: str
    event: str
    filter: str = ""

    @property
    def name(self) -> str:
        """``system/event``."""
        return f"{self.system}/{self.event}"


def bytes_per_event(probes: Iterable[Probe]) -> float:
    """Return the mean record size in bytes, assuming that all probes fire equally often."""
    sizes = [probe.n_bytes for probe in probes]
    return sum(sizes) / len(sizes) if sizes else _STOCK_BYTES


def size_kb(probes: Iterable[Probe], rate: int) -> int:
    """Return the buffer per CPU in KiB, a power of two.

    Args:
        probes: Probes that write into the buffer.
        rate: Events per second on the busiest CPU.
    """
    needed = rate * bytes_per_event(probes) * STALL_S / (1 - WAKE_SHARE) / 1024
    size = _MIN_KB
    while size < needed and size < _MAX_KB:
        size *= 2
    return size


def affordable_kb(size: int, n_cpus: int, available_kb: int | None) -> int:
    """Return ``size`` (KiB per CPU), halved until all CPUs take at most a quarter of memory."""
    if available_kb is None:
        return size
    while size > _MIN_KB and size * n_cpus * 4 > available_kb:
        size //= 2
    return size
