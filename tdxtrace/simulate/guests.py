"""Guests: what the vCPUs of a TD do, as streams of steps.

A program is a generator of steps (``steps``).  Memory is counted in pages from the start
of the TD's private memory; what a scenario maps beforehand is accepted already.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.draws import Draws
from tdxtrace.simulate.steps import (
    ACCEPT,
    ATTR,
    CALL,
    READ,
    REPEAT,
    RUN,
    TOUCH,
    WRITE,
    Step,
)
from tdxtrace.simulate.words import (
    EXIT_CPUID,
    EXIT_HLT,
    EXIT_IO,
    EXIT_MSR_WRITE,
    EXIT_TDCALL,
)


@dataclass(frozen=True, slots=True)
class Guest:
    """What a scenario says of the guest of one TD."""

    program: str
    pages: int = 512
    """Pages it works on, from ``first_page`` on."""
    first_page: int = 0
    run_us: int = 50
    """Mean time it computes between two things worth telling."""
    exit_share: float = 0.1
    """How often that ends in an exit it asks for (HLT, I/O, MSR, CPUID)."""
    halt_share: float = 0.3
    """How many of these are HLT."""
    begin_ms: int = 0
    run_pages: int = 8
    """Pages of one string instruction, of one conversion."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One vCPU's place: which of how many, its chance, where the memory begins."""

    number: int
    n_vcpus: int
    draws: Draws
    memory: int

    def gpa(self, page: int) -> int:
        """Guest physical address of a page of the TD's private memory."""
        return self.memory + (page << 12)


def steady(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Compute, touch memory that is there, exit now and then."""
    while True:
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 1000)
        if guest.pages:
            yield TOUCH, seat.gpa(guest.first_page + seat.draws.below(guest.pages)), WRITE
        if seat.draws.chance(guest.exit_share):
            yield _exit(guest, seat)


def _exit(guest: Guest, seat: Seat) -> Step:
    u = seat.draws.random()
    if u < guest.halt_share:
        return CALL, EXIT_HLT
    others = (EXIT_IO, EXIT_MSR_WRITE, EXIT_CPUID)
    return CALL, others[seat.draws.below(len(others))]


def boot(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Accept all memory, each vCPU its share, page after page; then run steadily."""
    for page in range(seat.number, guest.pages, seat.n_vcpus):
        yield ACCEPT, seat.gpa(guest.first_page + page), 0
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 10)
    yield from steady(guest, seat)


def boot_large(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Accept memory by 2 MB, falling back to 4 KB where the host maps no large pages."""
    for page in range(512 * seat.number, guest.pages, 512 * seat.n_vcpus):
        yield ACCEPT, seat.gpa(guest.first_page + page), 1
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 10)
    yield from steady(guest, seat)


def balloon(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Take pages from a pool and accept them again and again, as a balloon deflates."""
    while True:
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 1000)
        for _ in range(guest.run_pages):
            page = seat.draws.below(guest.pages)
            yield ACCEPT, seat.gpa(guest.first_page + page), 0
        if seat.draws.chance(guest.exit_share):
            yield _exit(guest, seat)


def convert(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Convert pages to shared and back, each vCPU in a region of its own, and accept them."""
    share = max(guest.run_pages, guest.pages // seat.n_vcpus)
    first = guest.first_page + seat.number * share
    while True:
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 1000)
        at = first + seat.draws.below(max(1, share - guest.run_pages))
        pages = [seat.gpa(at + i) for i in range(guest.run_pages)]
        yield CALL, EXIT_TDCALL, pages, True
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 1000)
        yield CALL, EXIT_TDCALL, pages, False
        for gpa in pages:
            yield ACCEPT, gpa, 0


def fresh(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Touch pages without accepting them first: #VE does it (pending_ve_disable = 0)."""
    for page in range(seat.number, guest.pages, seat.n_vcpus):
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 10)
        yield TOUCH, seat.gpa(guest.first_page + page), WRITE if page % 4 else READ
    yield from steady(guest, seat)


def contend(guest: Guest, seat: Seat) -> Iterator[Step]:
    """All vCPUs touch the same fresh pages at the same time."""
    for page in range(guest.pages):
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 10)
        yield TOUCH, seat.gpa(guest.first_page + page), READ if page % 2 else WRITE
    yield from steady(guest, seat)


def string_copy(guest: Guest, seat: Seat) -> Iterator[Step]:
    """REP MOVS over runs of pages that the host may have blocked: one RIP for a whole run."""
    while True:
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 1000)
        at = seat.draws.below(max(1, guest.pages - guest.run_pages))
        pages = [seat.gpa(guest.first_page + at + i) for i in range(guest.run_pages)]
        yield REPEAT, 0, pages, WRITE
        if seat.draws.chance(guest.exit_share):
            yield _exit(guest, seat)


def hotplug(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Run on a little memory; then a block is plugged in, and every vCPU accepts its share."""
    ran = 0
    while ran < guest.begin_ms * 1_000_000:
        step = RUN, 1 + seat.draws.exponential(guest.run_us * 1000)
        ran += step[1]
        yield step
    yield from boot(guest, seat)


def hold_entries(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Hostile: read the attributes of the same few pages without end, to hold their entries."""
    while True:
        page = guest.first_page + seat.draws.below(guest.pages)
        yield ATTR, seat.gpa(page), 40
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 1000)


def accept_again(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Hostile: accept the same 2 MB pages over and over; each holds its entry for long."""
    while True:
        page = guest.first_page + 512 * seat.draws.below(max(1, guest.pages // 512))
        yield ACCEPT, seat.gpa(page), 1
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 1000)


def idle(guest: Guest, seat: Seat) -> Iterator[Step]:
    """Halt, wake up for a timer, halt again."""
    while True:
        yield RUN, 1 + seat.draws.exponential(guest.run_us * 100)
        yield CALL, EXIT_HLT


PROGRAMS: Final[dict[str, Callable[[Guest, Seat], Iterator[Step]]]] = {
    "accept-again": accept_again,
    "balloon": balloon,
    "boot": boot,
    "boot-large": boot_large,
    "contend": contend,
    "convert": convert,
    "fresh": fresh,
    "hold-entries": hold_entries,
    "hotplug": hotplug,
    "idle": idle,
    "steady": steady,
    "string-copy": string_copy,
}


def program_named(name: str) -> Callable[[Guest, Seat], Iterator[Step]]:
    """Return a guest program by its name.

    Raises:
        ValueError: If there is none of that name; says the nearest.
    """
    if name not in PROGRAMS:
        near = difflib.get_close_matches(name, PROGRAMS, n=1, cutoff=0)[0]
        raise ValueError(f"no guest {name!r}; nearest: {near}; all: {', '.join(PROGRAMS)}")
    return PROGRAMS[name]
