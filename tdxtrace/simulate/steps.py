"""The steps a guest is made of: plain tuples, so that a program is easy to write.

| step | meaning |
|---|---|
| (RUN, ns) | compute, interruptible anywhere |
| (TOUCH, gpa, access) | one access to a private page: 1 read, 2 write, 4 fetch |
| (REPEAT, 0, pages, access) | a string instruction over pages: one RIP for all of them |
| (ACCEPT, gpa, level) | TDG.MEM.PAGE.ACCEPT, re-executed until it succeeds |
| (ATTR, gpa, turns) | TDG.MEM.PAGE.ATTR.RD on a page, so many times in a row |
| (CALL, reason, ...) | an exit the guest asks for: HLT, an I/O port, a hypercall |
| (CALL, TDCALL, pages, shared) | TDG.VP.VMCALL<MapGPA>: make these pages shared, or private |
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import simpy

RUN: Final = 0
TOUCH: Final = 1
REPEAT: Final = 2
ACCEPT: Final = 3
ATTR: Final = 4
CALL: Final = 5

READ: Final = 1
WRITE: Final = 2

Step = tuple[Any, ...]


class Exit(NamedTuple):
    """A VM exit that reaches the host: RAX, RCX, RDX, R8 and R9 of TDH.VP.ENTER."""

    status: int
    qualification: int = 0
    extended: int = 0
    gpa: int = 0
    interruption: int = 0
    asked: int = 0
    """What a TDG.VP.VMCALL asks for, as KVM translates it: the reason of another exit."""


@dataclass(slots=True)
class Frame:
    """A step under way: its RIP, and how much of it is done."""

    step: Step
    rip: int
    done: int = 0


Guest = Generator[simpy.Event, object, Exit | None]
"""Time passing in a guest, up to an exit or to the end of what it was doing."""
