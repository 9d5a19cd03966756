"""Probes on functions of the kernel or a program, and the values they fetch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

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
    """``argument``, ``behind`` (memory that an argument points to), ``result``."""
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
    def behind(cls, name: str, place: int, offset: int, type_: str = "x64") -> Fetch:
        """Fetch memory ``offset`` bytes past the address in an argument."""
        return cls(name, "behind", place, offset, type_)

    @classmethod
    def result(cls, name: str) -> Fetch:
        """Fetch the return value."""
        return cls(name, "result")

    def words(self, is_return: bool) -> str:
        """Return the fetch in tracefs syntax: Linux Documentation/trace/kprobetrace.rst."""
        if self.kind == "result":
            return f"{self.name}=$retval:{self.type}"
        where = f"$arg{self.place}" if is_return else f"%{REGISTERS[self.place - 1]}"
        if self.kind == "behind":
            where = f"+{self.offset}({where})"
        return f"{self.name}={where}:{self.type}"


@dataclass(frozen=True, slots=True)
class Probe:
    """An entry or return probe."""

    group: str
    function: str
    is_return: bool
    fetches: tuple[Fetch, ...]
    spot: str = field(default="")
    """``PATH:0xOFFSET`` in a program; "": the kernel's function."""

    @property
    def event(self) -> str:
        """Name of the event; it contains the function, which readers look for."""
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
        return " ".join([f"{side}:{self.name}", self.spot or self.function, *words])

    @property
    def n_bytes(self) -> int:
        """Size of a record in the ring buffer."""
        head = _HEAD + (_RETURN_HEAD if self.is_return else _ENTRY_HEAD)
        size = head + sum(_SIZES[fetch.type] for fetch in self.fetches)
        return (size + 3) & -4


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """Tracepoint of the kernel."""

    system: str
    event: str
    filter: str = ""

    @property
    def name(self) -> str:
        """``system/event``."""
        return f"{self.system}/{self.event}"
