"""Guest programs: streams of steps that the vCPUs of a TD execute.

A program is a generator of steps, which are tuples.  Pages are numbered from the start of the
TD's private memory; pages that a scenario maps in advance are accepted.

| step | meaning |
|---|---|
| (RUN, ns) | compute, interruptible anywhere |
| (TOUCH, gpa, access) | one access to a private page: 1 read, 2 write, 4 fetch |
| (REPEAT, 0, pages, access) | a string instruction over pages, all at one RIP |
| (ACCEPT, gpa, level) | TDG.MEM.PAGE.ACCEPT, re-executed until it succeeds |
| (ATTR, gpa, n) | TDG.MEM.PAGE.ATTR.RD on a page, n times in a row |
| (VMCALL, reason, ...) | TDG.VP.VMCALL: HLT, an I/O port, a hypercall |
| (VMCALL, TDCALL, pages, shared) | TDG.VP.VMCALL<MapGPA>: make pages shared or private |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tdxtrace.simulate.module.abi import EXIT_CPUID, EXIT_HLT, EXIT_IO, EXIT_MSR_WRITE, EXIT_TDCALL
from tdxtrace.simulate.thread import RandomStream

RUN: Final = 0
TOUCH: Final = 1
REPEAT: Final = 2
ACCEPT: Final = 3
ATTR: Final = 4
VMCALL: Final = 5

READ: Final = 1
WRITE: Final = 2

Step = tuple[Any, ...]


class VmExit(NamedTuple):
    """A VM exit that reaches the host: RAX, RCX, RDX, R8 and R9 of TDH.VP.ENTER."""

    status: int
    qualification: int = 0
    extended: int = 0
    gpa: int = 0
    interruption: int = 0
    vmcall_reason: int = 0
    """Reason of a TDG.VP.VMCALL, as the VMX exit reason that KVM translates it to."""


@dataclass(slots=True)
class Frame:
    """A step in progress: its RIP, and the completed part (ns, pages or calls)."""

    step: Step
    rip: int
    done: int = 0


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """The guest of one TD in a scenario."""

    program: str
    pages: int = 512
    """Number of pages that it accesses, from ``first_page`` on."""
    first_page: int = 0
    run_us: int = 50
    """Mean time of computation between two accesses, accepts or exits."""
    exit_share: float = 0.1
    """Share of accesses that are followed by a TDG.VP.VMCALL (HLT, I/O, MSR, CPUID)."""
    halt_share: float = 0.3
    """Share of HLT among these exits."""
    begin_ms: int = 0
    run_pages: int = 8
    """Pages of one string instruction or one conversion."""
    firmware_us: int = 0
    """Time for which vCPU 0 runs firmware before all vCPUs accept memory (firmware)."""
    handler_pages: int = 0
    """Pages after those of the program that the guest's interrupt handlers accept, one at each
    interrupt; each vCPU accepts its share."""


@dataclass(frozen=True, slots=True)
class VcpuPlace:
    """The vCPU that runs a program: number, number of vCPUs, random stream, start of memory."""

    number: int
    n_vcpus: int
    random: RandomStream
    memory: int

    def gpa(self, page: int) -> int:
        """Guest physical address of a page of the TD's private memory."""
        return self.memory + (page << 12)


def steady(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Compute, access mapped memory, sometimes exit."""
    while True:
        yield RUN, 1 + place.random.exponential(guest.run_us * 1000)
        if guest.pages:
            yield TOUCH, place.gpa(guest.first_page + place.random.below(guest.pages)), WRITE
        if place.random.chance(guest.exit_share):
            yield _exit(guest, place)


def _exit(guest: GuestSpec, place: VcpuPlace) -> Step:
    u = place.random.uniform()
    if u < guest.halt_share:
        return VMCALL, EXIT_HLT
    others = (EXIT_IO, EXIT_MSR_WRITE, EXIT_CPUID)
    return VMCALL, others[place.random.below(len(others))]


def boot(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Accept all memory in 4 KB pages, each vCPU its share; then continue as ``steady``."""
    for page in range(place.number, guest.pages, place.n_vcpus):
        yield ACCEPT, place.gpa(guest.first_page + page), 0
        yield RUN, 1 + place.random.exponential(guest.run_us * 10)
    yield from steady(guest, place)


def firmware(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Run firmware on vCPU 0, which writes each step to a port; then boot on all vCPUs.

    The other vCPUs start one step later, when the guest's kernel starts them.
    """
    step = guest.firmware_us * 1000 // _FIRMWARE_STEPS
    for number in range(_FIRMWARE_STEPS):
        yield RUN, 1 + step
        if place.number == 0:
            yield VMCALL, EXIT_IO, FIRMWARE_PORT, number
    if place.number:
        yield RUN, 1 + step
    yield from boot(guest, place)


def boot_large(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Accept memory in 2 MB pages, falling back to 4 KB if the host maps no large pages."""
    for page in range(512 * place.number, guest.pages, 512 * place.n_vcpus):
        yield ACCEPT, place.gpa(guest.first_page + page), 1
        yield RUN, 1 + place.random.exponential(guest.run_us * 10)
    yield from steady(guest, place)


def balloon(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Accept pages of a pool repeatedly, as when a balloon deflates."""
    while True:
        yield RUN, 1 + place.random.exponential(guest.run_us * 1000)
        for _ in range(guest.run_pages):
            page = place.random.below(guest.pages)
            yield ACCEPT, place.gpa(guest.first_page + page), 0
        if place.random.chance(guest.exit_share):
            yield _exit(guest, place)


def convert(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Convert pages to shared and back, and accept them; each vCPU has its own region."""
    share = max(guest.run_pages, guest.pages // place.n_vcpus)
    first = guest.first_page + place.number * share
    while True:
        yield RUN, 1 + place.random.exponential(guest.run_us * 1000)
        at = first + place.random.below(max(1, share - guest.run_pages))
        pages = [place.gpa(at + i) for i in range(guest.run_pages)]
        yield VMCALL, EXIT_TDCALL, pages, True
        yield RUN, 1 + place.random.exponential(guest.run_us * 1000)
        yield VMCALL, EXIT_TDCALL, pages, False
        for gpa in pages:
            yield ACCEPT, gpa, 0


def fresh(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Access pages that the #VE handler accepts (pending_ve_disable = 0)."""
    for page in range(place.number, guest.pages, place.n_vcpus):
        yield RUN, 1 + place.random.exponential(guest.run_us * 10)
        yield TOUCH, place.gpa(guest.first_page + page), WRITE if page % 4 else READ
    yield from steady(guest, place)


def contend(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Access the same unaccepted pages on all vCPUs at the same time."""
    for page in range(guest.pages):
        yield RUN, 1 + place.random.exponential(guest.run_us * 10)
        yield TOUCH, place.gpa(guest.first_page + page), READ if page % 2 else WRITE
    yield from steady(guest, place)


def string_copy(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Execute REP MOVS over pages that the host may have blocked, all at one RIP."""
    while True:
        yield RUN, 1 + place.random.exponential(guest.run_us * 1000)
        at = place.random.below(max(1, guest.pages - guest.run_pages))
        pages = [place.gpa(guest.first_page + at + i) for i in range(guest.run_pages)]
        yield REPEAT, 0, pages, WRITE
        if place.random.chance(guest.exit_share):
            yield _exit(guest, place)


def hotplug(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Run on little memory; then accept a new block, each vCPU its share."""
    ran = 0
    while ran < guest.begin_ms * 1_000_000:
        step = RUN, 1 + place.random.exponential(guest.run_us * 1000)
        ran += step[1]
        yield step
    yield from boot(guest, place)


def hold_entries(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Attack: read the attributes of the same few pages endlessly, to lock their entries."""
    while True:
        page = guest.first_page + place.random.below(guest.pages)
        yield ATTR, place.gpa(page), 40
        yield RUN, 1 + place.random.exponential(guest.run_us * 1000)


def accept_again(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Attack: accept the same 2 MB pages repeatedly; each ACCEPT locks its entry for long."""
    while True:
        page = guest.first_page + 512 * place.random.below(max(1, guest.pages // 512))
        yield ACCEPT, place.gpa(page), 1
        yield RUN, 1 + place.random.exponential(guest.run_us * 1000)


def accept_and_convert(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Attack: accept 2 MB pages on one vCPU while the next vCPU converts them to shared.

    ACCEPT of 2 MB locks its entry while 512 pages are zeroed.  Host priority gives the entry to
    the host afterwards, or at its kick; the guest then has to start again.
    """
    n_large = max(1, guest.pages // 512)
    while True:
        page = guest.first_page + 512 * place.random.below(n_large)
        yield RUN, 1 + place.random.exponential(guest.run_us * 1000)
        if place.number % 2:
            yield VMCALL, EXIT_TDCALL, [place.gpa(page)], True
            yield VMCALL, EXIT_TDCALL, [place.gpa(page)], False
        else:
            yield ACCEPT, place.gpa(page), 1


def interrupt_handler(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Yield the accepts of the interrupt handlers of one vCPU, one at each interrupt.

    Their pages are not adjacent, like a kernel's allocations in atomic context, so that some need
    a new Secure EPT page.
    """
    first = guest.first_page + guest.pages
    for n in range(place.number, guest.handler_pages, place.n_vcpus):
        yield ACCEPT, place.gpa(first + n * _HANDLER_STRIDE), 0


def idle(guest: GuestSpec, place: VcpuPlace) -> Iterator[Step]:
    """Halt, wake up for a timer, halt again."""
    while True:
        yield RUN, 1 + place.random.exponential(guest.run_us * 100)
        yield VMCALL, EXIT_HLT


# Port of QEMU's isa-debug-exit, to which instrumented firmware writes a number for each step.
FIRMWARE_PORT: Final = 0xF4
_FIRMWARE_STEPS: Final = 6


PROGRAMS: Final[dict[str, Callable[[GuestSpec, VcpuPlace], Iterator[Step]]]] = {
    "accept-and-convert": accept_and_convert,
    "accept-again": accept_again,
    "balloon": balloon,
    "boot": boot,
    "boot-large": boot_large,
    "contend": contend,
    "convert": convert,
    "firmware": firmware,
    "fresh": fresh,
    "hold-entries": hold_entries,
    "hotplug": hotplug,
    "idle": idle,
    "steady": steady,
    "string-copy": string_copy,
}


# Distance in pages between two pages accepted by interrupt handlers; a choice of the model.
_HANDLER_STRIDE: Final = 128
# Programs that lock entries repeatedly without a reason, as no honest guest does.
HOSTILE_PROGRAMS: Final = frozenset({"accept-again", "accept-and-convert", "hold-entries"})


def program_named(name: str) -> Callable[[GuestSpec, VcpuPlace], Iterator[Step]]:
    """Return a guest program by its name.

    Raises:
        ValueError: If the name is unknown; the message gives the nearest name.
    """
    if name not in PROGRAMS:
        nearest = difflib.get_close_matches(name, PROGRAMS, n=1, cutoff=0)[0]
        raise ValueError(f"no guest {name!r}; nearest: {nearest}; all: {', '.join(PROGRAMS)}")
    return PROGRAMS[name]
